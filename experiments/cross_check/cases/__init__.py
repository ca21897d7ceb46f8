"""What the cross-check computes, the truths it is compared with, and the bounds on the differences."""
