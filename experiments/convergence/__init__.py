"""How many updates, epochs, examples and seconds does each batch size need to reach a target, such as an accuracy?

Table 1 gives every size the same learning rate, as the study was first done. Table 2 gives each size the rate that
experiments.learning_rate_grid found best for it, and uses other seeds than that grid; the grid is run first if its results
are missing. Table 2 is the fair comparison. The target is checked on a sixth of the training set that is held out (the
validation part); the test set is used once, at the end of a run. The study also fits the critical batch size (above it, a
larger batch saves few updates) and measures the gradient noise scale (the gradient's variance ÷ its squared length).

    python -m experiments.convergence                      about 4 minutes, the grid included
    python -m experiments.convergence --dataset mnist      about 8 minutes after the grid
    python -m experiments.convergence --task my_task.py:make_task --target "loss<0.4"      a task of your own

The measured answer is in docs/mnist_study.md.
"""
