"""What the records say of a bound."""

from collections.abc import Sequence

from jaxbatch.results.records import Record


def speed_up(records: Sequence[Record], model: str, machine: str) -> float:
    """Bound on the time of the fixed arm ÷ that of the adaptive one, for the same examples.

    Example:
        >>> times = {1: 2.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}
        >>> records = [{"model": "m", "machine": "x", "batch_size": size, "step_ms": ms} for size, ms in times.items()]
        >>> round(speed_up(records, "m", "x"), 3)
        1.667
    """
    mine = sorted((record["batch_size"], record["step_ms"]) for record in records if (record["model"], record["machine"]) == (model, machine))
    per_example = [ms / size for size, ms in mine]
    return per_example[0] * len(per_example) / sum(per_example)
