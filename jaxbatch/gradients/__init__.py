"""Gradients of a batch: of each example, of its groups, summed over parts, and how noisy they are."""
