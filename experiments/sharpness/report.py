"""Tables and verdict of the sharpness study, from its records alone."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.harness.optimizers import heavy_ball, optimizer_words
from experiments.harness.study import describe_setting
from jaxbatch.advice.full_sweep import best_rates
from jaxbatch.gradients.split import largest_stable_curvature
from jaxbatch.intervals import Interval, interval, ratio_of_means
from jaxbatch.results.records import Record, as_number
from jaxbatch.results.report import print_table
from jaxbatch.training.goals import as_goal

ROUNDING = 1e-5  # of the largest eigenvalue: a smallest one above minus this may be 0


def sweep_of(records: Sequence[Record]) -> list[Record]:
    """The rows of the sweep."""
    return [record for record in records if record["kind"] == "sweep"]


def title_of(config, comparison: str) -> str:
    """A comparison in words."""
    return f"after {config.epochs:g} epochs" if comparison == "epochs" else f"at a training loss of {config.train_loss:g}"


def stability_limit(config, rate: float) -> float | None:
    """The curvature at which a run with this rate is no longer stable, 2 (1 + momentum) / rate; None where the optimizer is not SGD."""
    momentum = heavy_ball(config)
    return None if momentum is None else largest_stable_curvature(rate, momentum) - (getattr(config, "weight_decay", None) or 0.0)


def held_out_metric(records: Sequence[Record]) -> str:
    """The metric on data that are not trained on, as it is named in records of lines."""
    names = [name for record in records if record["kind"] == "line" for name in record if name.startswith("validation_")]
    return names[0].removeprefix("validation_") if names else "loss"


def solutions(records: Sequence[Record], comparison: str) -> list[tuple[Record, Record]]:
    """The small and the large batch's solution of every seed that has both."""
    rows = [record for record in records if record["kind"] == "solution" and record["comparison"] == comparison]
    by_seed: dict[int, list[Record]] = {}
    for row in sorted(rows, key=lambda row: row["batch_size"]):
        by_seed.setdefault(row["seed"], []).append(row)
    return [(pair[0], pair[1]) for _, pair in sorted(by_seed.items()) if len(pair) == 2]


def ratio(pairs: Sequence[tuple[Record, Record]], name: str) -> Interval:
    """The large batch's mean over the small one's, over seeds, with Fieller's interval."""
    return ratio_of_means(*([as_number(pair[position][name]) for pair in pairs] for position in (1, 0)), nonnegative=True)


def barriers(records: Sequence[Record], comparison: str, name: str) -> list[float]:
    """For each seed, how far the line's loss rises above the straight line between its ends' losses."""
    rows = [record for record in records if record["kind"] == "line" and record["comparison"] == comparison]
    heights = []
    for seed in sorted({row["seed"] for row in rows}):
        curve = {row["point"]: row[name] for row in rows if row["seed"] == seed and 0 <= row["point"] <= 1}
        if {0.0, 1.0} <= set(curve):
            above = [as_number(value) - (1 - t) * as_number(curve[0.0]) - t * as_number(curve[1.0]) for t, value in curve.items()]
            heights.append(float(np.max(above)))  # NaN if one is
    return heights


def further(records: Sequence[Record], comparison: str, size: int, with_size: int) -> list[tuple[float, float]]:
    """For each seed, the highest and the last loss of further training, as parts of the loss at its start; a run that diverged counts as infinite."""
    wanted = {"kind": "continued", "comparison": comparison, "batch_size": size, "with_batch_size": with_size}
    rows, peaks_and_ends = [record for record in records if wanted.items() <= record.items()], []
    for seed in sorted({row["seed"] for row in rows}):
        curve = sorted((row["epoch"], row["loss"]) for row in rows if row["seed"] == seed and row["loss"] is not None)
        if any(row["loss"] is None for row in rows if row["seed"] == seed):
            peaks_and_ends.append((np.inf, np.inf))
            continue
        values = np.array([loss for _, loss in curve]) / curve[0][1]
        peaks_and_ends.append((float(values.max()), float(values[-1])))
    return peaks_and_ends


def has_negative_curvature(row: Record) -> bool:
    """Whether a direction of negative curvature is proved; False where the eigenvalues are not finite."""
    return as_number(row["smallest"]) < -ROUNDING * as_number(row["largest"])


def is_no_minimum(row: Record) -> bool:
    """Whether a direction of negative curvature is proved, or an exact gradient step lowers the training loss by a hundredth."""
    return has_negative_curvature(row) or as_number(row["loss_after_step"]) < 0.99 * as_number(row["loss"])


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """The rates, then both comparisons."""
    describe_setting(console, config, provenance, optimizer_words(config), f"rates chosen by updates to {config.target}")
    rates, metric = {size: rate for size, (rate, _) in best_rates(sweep_of(records)).items()}, as_goal(config.target).metric
    for comparison in ("epochs", "loss"):
        pairs, rows = solutions(records, comparison), []
        for position, size in enumerate((config.small_batch_size, config.large_batch_size)):
            if not pairs:
                break
            of = lambda name, position=position: interval([pair[position][name] for pair in pairs])
            limit = stability_limit(config, rates[size])
            rows.append(
                [
                    f"{size:,}",
                    f"{rates[size]:g}",
                    f"{of('updates'):,.0f}",
                    f"{of('loss'):.3g}",
                    f"{of(f'test_{metric}'):.4g}",
                    f"{of('largest'):.3g}",
                    "none" if limit is None else f"{limit:.3g}",
                    f"{of('smallest'):.2g}",
                    f"{of('trace'):.3g}",
                    f"{of('gradient_norm'):.2g}",
                ]
            )
        columns = ["B", "rate", "updates", "training loss", f"test {metric}", "largest λ", "2(1+β)/η", "smallest λ", "trace", "gradient"]
        print_table(console, f"Solutions {title_of(config, comparison)}, {len(pairs)} seeds with both", columns, rows)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """Whether the large batch's solutions are sharper, and whether they are local minima, as far as the numbers allow."""
    best = best_rates(sweep_of(records))
    missing = [size for size in (config.small_batch_size, config.large_batch_size) if size not in best]
    if missing:
        return [f"No rate reached {config.target} with every seed at B = {', '.join(map(str, missing))}: nothing to compare. Raise --max-epochs."]
    lost = [record for record in records if record["kind"] == "trained" and record["diverged"]]
    sentences = [f"B = {row['batch_size']}, seed {row['seed']} diverged after {row['updates']} updates." for row in lost]
    for comparison in ("epochs", "loss"):
        pairs = solutions(records, comparison)
        if not pairs:
            sentences.append(f"No seed reached both solutions {title_of(config, comparison)}. Raise --max-epochs or --train-loss.")
            continue
        sentences.append(sharper(config, pairs, comparison) + edge(config, pairs, {size: rate for size, (rate, _) in best.items()}))
    pairs, comparison = max(((solutions(records, name), name) for name in ("loss", "epochs")), key=lambda one: len(one[0]))
    return [*sentences, *local_minimum(config, records, pairs, comparison)] if pairs else sentences


def sharper(config, pairs: Sequence[tuple[Record, Record]], comparison: str) -> str:
    """The ratio of curvatures, at which losses, and the difference on the test set."""
    top, trace = ratio(pairs, "largest"), ratio(pairs, "trace")
    metric = as_goal(config.target).metric
    better = interval([as_number(large[f"test_{metric}"]) - as_number(small[f"test_{metric}"]) for small, large in pairs], scale="linear")
    if len(pairs) < 3:
        judgement = "too few seeds to tell"
    else:
        judgement = "sharper" if top.excludes(1) and top.value > 1 else "flatter" if top.excludes(1) else "no difference shows"
    losses = [interval([pair[position]["loss"] for pair in pairs]).value for position in (1, 0)]
    held_out = f", and the test loss is {ratio(pairs, 'test_loss'):.2f} times as large" if metric != "loss" and "test_loss" in pairs[0][0] else ""
    return (
        f"{title_of(config, comparison).capitalize()}, the largest eigenvalue at B = {config.large_batch_size} is {top:.2f} times that at "
        f"B = {config.small_batch_size} ({judgement}), and the trace is {trace:.2f} times as large, at training losses of {losses[0]:.3g} and "
        f"{losses[1]:.3g}; test {metric} differs by {better:+.4f}{held_out}."
    )


def edge(config, pairs: Sequence[tuple[Record, Record]], rates: dict[int, float]) -> str:
    """How near the largest eigenvalues are to the edge of stability, as a sentence; empty for Adam."""
    sizes = (config.small_batch_size, config.large_batch_size)
    limits = [stability_limit(config, rates[size]) for size in sizes]
    if None in limits:
        return ""
    shares = [interval([as_number(pair[position]["largest"]) / (limits[position] or 1) for pair in pairs]) for position in (0, 1)]
    shares_text = " and ".join(f"{share:.2f} at B = {size}" for share, size in zip(shares, sizes, strict=True))
    return f" The largest eigenvalue divided by the edge of stability, 2(1+β)/η, is {shares_text}."


def local_minimum(config, records: Sequence[Record], pairs: Sequence[tuple[Record, Record]], comparison: str) -> list[str]:
    """Whether the large batch's solutions are local minima, by curvature, a gradient step, the line and further training."""
    large, count = [pair[1] for pair in pairs], len(pairs)
    negative = [sum(map(has_negative_curvature, rows)) for rows in (large, [pair[0] for pair in pairs])]
    drop = interval([100 * (1 - as_number(row["loss_after_step"]) / as_number(row["loss"])) for row in large], scale="linear")
    sentences = [
        f"{title_of(config, comparison).capitalize()}, negative curvature is proved at {negative[0]} of {count} solutions of B = "
        f"{config.large_batch_size} and at {negative[1]} of B = {config.small_batch_size}; one exact gradient step lowers the large batch's loss by "
        f"{drop:.1f}%."
    ]
    height = interval(barriers(records, comparison, "loss"), scale="linear")
    if height.n:
        ends = interval([np.max([as_number(one["loss"]) for one in pair]) for pair in pairs]).value
        above = f"above the straight line between its values at the ends, the higher of which is {ends:.3g}"
        sentences.append(f"Between the two solutions the training loss rises by {height:.3g} {above}.")
    small, huge = config.small_batch_size, config.large_batch_size
    on, across, control = (further(records, comparison, *sizes) for sizes in ((huge, huge), (huge, small), (small, small)))
    if on and across and control:
        last, peak, end, own = (interval([one[k] for one in rows]) for rows, k in ((on, 1), (across, 0), (across, 1), (control, 1)))
        word = "it rises first" if peak.low > 1.1 else "it falls smoothly" if peak.high <= 1.1 and end.value < 1 else "the seeds differ"
        sentences.append(
            f"After {config.epochs} more epochs with its own batch, the large batch's loss is {last:.2f} times what it was. After "
            f"{config.continue_epochs} more epochs with B = {small} it is {end:.2f} times, and {peak:.2f} at its highest ({word}); the small "
            f"batch's own loss is then {own:.2f} times."
        )
    none, falls = sum(is_no_minimum(row) for row in large), sum(end < 1 for _, end in on)
    counts_text = (
        f"{none} of {count} large-batch solutions are not local minima, and the loss of {falls} of {len(on)} falls further with the large "
        "batch itself"
    )
    claim = "«Large batches fall into a local minimum»"
    if count < 3:
        return [*sentences, f"{counts_text}; too few seeds for a verdict on {claim}."]
    if none == count and falls == len(on) > 0:
        return [*sentences, f"{claim} does not hold here: {counts_text}."]
    word = "is not contradicted" if none == falls == 0 else "is neither shown nor excluded"
    return [*sentences, f"{claim} {word} here: {counts_text}."]
