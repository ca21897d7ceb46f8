"""What is recorded of a path."""

import numpy as np
from jaxtyping import Float

from jaxbatch.results.records import Record


def describe_path(path: Float[np.ndarray, "T 2"], nose: Float[np.ndarray, "2"]) -> Record:
    """Length, overshoot and end of a path; ``steps_to_near`` until it first comes within 0.25 of the target.

    Overshoot is the farthest distance beyond the target that the path reaches, seen from the start.

    Example:
        >>> path = np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
        >>> numbers = describe_path(path, np.array([2.0, 0.0]))
        >>> numbers["length"], numbers["overshoot"], numbers["end_distance"], numbers["straightness"]
        (5.0, 1.0, 1.0, 0.2)
    """
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    direction = (nose - path[0]) / np.linalg.norm(nose - path[0])
    distance = np.linalg.norm(path - nose, axis=1)
    near = np.flatnonzero(distance < 0.25)
    return {
        "length": float(steps.sum()),
        "straightness": float(np.linalg.norm(path[-1] - path[0]) / steps.sum()),
        "overshoot": float(max(0.0, ((path - nose) @ direction).max())),
        "end_distance": float(distance[-1]),
        "steps_to_near": int(near[0]) if len(near) else None,
    }
