"""How large is the critical batch size, measured in three ways, and do they agree?

Below the critical batch size, a larger batch saves updates almost in proportion; above it, it saves few. The study measures it
from the updates that several sizes need to a target, each at its best rate; from the gradient's noise on the way of one run; and
by branches, which are short trainings from states of that run with larger batches and larger rates. Each way has its interval
and its cost in examples.

    python -m experiments.critical_batch_size                      about 5 minutes
    python -m experiments.critical_batch_size --dataset mnist --examples 12000

The measured answer is in docs/critical_batch_size.md.
"""
