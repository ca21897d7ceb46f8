"""Gradients of a batch, of its groups and of its examples, sums of gradients over parts, and the gradients' noise."""
