"""One forward, several backward: is anything gained by K updates from one big batch?

A batch of B examples goes forward once. Then K optimizer updates are made from the gradients of its K groups, all taken at
the weights before the first update. Four arms (ways to use a batch) see the same examples in the same order:

    (a) one     one update per batch
    (b) split   one forward, K updates from the K groups' gradients
    (c) scaled  one update per batch at K times the learning rate
    (d) small   K ordinary batches of B / K, each with its own forward at the current weights

The arms are compared twice: at one rate for (a), (b) and (d), as the question was first asked, and each at its own best rate.
The best rates are chosen from one grid with one budget on a sixth of the training set that is held out. (With a rate of its
own, (c) is the same as (a).) The target is measured on that sixth, too; the test set is used once, at the end of
each run.

    python -m experiments.split_backward                                                      about 5 minutes
    python -m experiments.split_backward --dataset mnist --batch-size 600 --num-groups 10     about 45 minutes
    python -m experiments.split_backward --task my_task.py:make_task --target "loss<0.4"                 a task of your own

The measured answer is in docs/split_backward.md.
"""
