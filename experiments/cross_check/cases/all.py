"""Every computation of the cross-check.

Functions call the library by its public names and run as one program. NumPy computes the truths, in part with a
:class:`experiments.cross_check.cases.truth.Tape`. Inputs are drawn from a seed and rounded to the precision of the computation; the
truth is computed from the rounded inputs.
"""

from collections.abc import Iterator

from experiments.cross_check.cases import layers, library, networks
from experiments.cross_check.cases.case import Case


def all_cases() -> Iterator[Case]:
    """Yields all cases, in the order of the table."""
    yield from layers.reductions()
    yield from layers.single_layers()
    yield from library.gradients()
    yield from library.updates()
    yield from networks.networks()
    yield from networks.training()
    yield from library.several_devices()
