"""How many cores this process may use."""

import os


def num_cores() -> int:
    """The cores that the process may run on, which can be fewer than the machine has.

    Example:
        >>> num_cores() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
