"""Is the large batch's minimum sharper, and is it a local minimum?

Each seed trains from the same initial weights with a small and a huge batch, each at its own best rate, chosen on a held-out part. The
solutions are compared after equal epochs and at equal training loss, because a loss that is still high has another curvature. For
each solution the study measures the largest and smallest eigenvalues of the training loss's Hessian, its trace, the gradient, one
exact gradient step, the loss along the line between the two, and what further training with the small batch does.

    python -m experiments.sharpness --model mlp          about 2 minutes
    python -m experiments.sharpness                      about 10 minutes
    python -m experiments.sharpness --dataset mnist --model mlp --epochs 4 --train-loss 0.1

The measured answer is in docs/sharpness.md.
"""
