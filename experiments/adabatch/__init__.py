"""Does a batch that grows while the rate decays train as well as a small one, and how much faster?

Four arms (the ways to train that are compared) run for the same epochs. Every few epochs they change:

    (a) small      keeps its batch and multiplies its rate by decay / growth (with AdamW by decay / √growth)
    (b) adaptive   multiplies its batch by growth and its rate by decay: the same effective rate as (a)
    (c) large      has the largest batch of (b) from the start, and the rates of (a)
    (d) tuned      is (a) with the best of several starting rates, since the fixed rate may be a bad one for (a)

    python -m experiments.adabatch                                                  about 1 minute
    python -m experiments.adabatch --dataset cifar10 --model resnet20 --small       a small version of the protocol, on CPU
    python -m experiments.adabatch --devices 1,2,4                                  (b) on several devices as well
    python -m experiments.adabatch --dataset generated --model transformer          a language model, with AdamW
    python -m experiments.adabatch --task my_task.py:make_task                      a task of your own, judged by its accuracy or loss
    python -m experiments.adabatch_figures --dataset cifar10                        all networks side by side, from their files

The rate of (d) is chosen on a sixth of the training set, which is held out for this. Then all arms train on the whole
training set; the test error is recorded, but nothing is chosen by it. Forward and backward passes are timed separately for
every batch size, side by side. Loading, loss and optimizer are left out.
"""
