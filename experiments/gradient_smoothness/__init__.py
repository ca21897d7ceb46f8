"""How smooth is training at each batch size: how far do the loss and the gradient's direction jump?

The study measures the loss of the first 1000 iterations, the angle between one gradient and the next, and how far a batch's
gradient is from the full gradient (that of the whole training set), at the start and after training. In theory, the squared
error falls as 1 / B, where B is the batch size.

    python -m experiments.gradient_smoothness                      about 2 minutes
    python -m experiments.gradient_smoothness --dataset mnist      about 10 minutes
    python -m experiments.gradient_smoothness --task my_task.py:make_task      a task of your own; its prepare is applied once

The measured answer is in docs/mnist_study.md.
"""
