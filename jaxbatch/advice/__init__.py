"""Advice on batch sizes: the memory that they need, the largest that fits, how to fit one that does not, the time of a step."""
