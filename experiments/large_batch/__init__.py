"""What helps when the batch must be huge? All known remedies side by side at one budget, against a small batch.

Every arm (a way to train) sees the same examples for the same epochs. Its learning rate is chosen from one grid with the same
seeds, on a sixth of the training set that is held out. Then it trains with other seeds, and the test set is used once, at the
end. The rules that scale the rate of the small batch have nothing to choose; the arm "longer" is a control with more epochs.

    python -m experiments.large_batch                              about 4 minutes
    python -m experiments.large_batch --dataset mnist              about 30 minutes
    python -m experiments.large_batch --dataset mnist --batch-size 20000
    python -m experiments.large_batch --dataset cifar10 --examples 10000 --model simple_cnn
    python -m experiments.large_batch --dataset cifar10 --examples 10000 --batch-size 4096 --model resnet20      with batch statistics
    python -m experiments.large_batch --task my_task.py:make_task --metric "loss<"      a task of your own

The arms, the protocol and the measured answer stand in docs/large_batch.md.
"""
