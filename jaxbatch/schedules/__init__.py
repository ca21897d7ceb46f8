"""Batch sizes by epoch, and the learning rates that go with them."""
