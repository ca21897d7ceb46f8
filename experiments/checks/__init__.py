"""What the cross-check computes, the truths it is held against, and the bounds between them."""
