"""Which learning rate goes with each batch size, and how does it grow: linearly, with the square root, otherwise?

Every rate is tried at every batch size, with several seeds; all rates and seeds of a size are one compiled program. The best
rate of a size is the one whose runs reach the target with the fewest updates. The study fits the best rates as B^p,
where B is the batch size. Runs are judged on a sixth of the training set that is held out; the test set is not used.

    python -m experiments.learning_rate_grid                      about 2 minutes
    python -m experiments.learning_rate_grid --dataset mnist      about 30 minutes
    python -m experiments.learning_rate_grid --task my_task.py:make_task --target "loss<0.4"      a task of your own

The measured answer is in docs/mnist_study.md.
"""
