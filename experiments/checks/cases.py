"""Every computation of the cross-check.

Functions call the library by its public names and run as one program; truths are NumPy, at most a
:class:`experiments.checks.truth.Tape`. Inputs are drawn from a seed; what a machine is given is rounded to its precision
first, and the truth is that of the rounded inputs.
"""

from collections.abc import Iterator

from experiments.checks import layers, library, networks
from experiments.checks.case import Case


def all_cases() -> Iterator[Case]:
    """In the order of the table."""
    yield from layers.reductions()
    yield from layers.single_layers()
    yield from library.gradients()
    yield from library.updates()
    yield from networks.networks()
    yield from networks.training()
    yield from library.several_devices()
