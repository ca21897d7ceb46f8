"""How long does an epoch take at each batch size, and above which size is loading the data the limit?

The study compares two ways to give data to the device, in one run. `resident`: the data are on the device, and an epoch is
one compiled program. `streamed`: the host decodes images from PNG and shifts them at random, batch by batch, while the device
works. It also times computation alone, loading alone, and the shares of forward, backward and optimizer.

    python -m experiments.iteration_speed                      about 2 minutes
    python -m experiments.iteration_speed --dataset mnist      about 3 minutes
    python -m experiments.iteration_speed --task my_task.py:make_task      a task of your own; its data stay on the device, so loading is not timed

The measured answer is in docs/mnist_study.md.
"""
