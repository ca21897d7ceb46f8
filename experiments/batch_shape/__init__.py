"""Is a batch size that is a power of two, or a multiple of 8, faster than its neighbours?

A training step is timed at powers of two, at multiples of 8 and at odd sizes next to them, in random order, many times.
A larger batch takes longer anyway. To remove this effect, the time at a size is divided by the time at the same place on the
line through its odd neighbours. The study also reports the memory of each step, from the compiled program.

    python -m experiments.batch_shape                      about 6 minutes
    python -m experiments.batch_shape --models mlp --dtypes float32      about 1 minute

The measured answer is in docs/mnist_study.md.
"""
