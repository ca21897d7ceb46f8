"""Numbers of the kept runs that stand in sentences: what each one is, by name, and what the words around it rest on."""

import re

import numpy as np

from experiments.advise.records import read_throughput
from experiments.convergence import report as convergence_report
from experiments.critical_batch_size import report as critical_batch_size_report
from experiments.harness import arms, rate_grid
from experiments.large_batch import records as large_batch_records
from experiments.large_batch.report import percent
from experiments.split_backward.records import cost_ratio, final, num_lost, rate_of, to_target
from experiments.split_backward.verdict import against, examples_ratio, paired
from jaxbatch.advice import full_sweep
from jaxbatch.advice.learning_rates import rate_exponent
from jaxbatch.intervals import Interval, interval
from jaxbatch.training.goals import as_goal
from scripts import measured_score
from scripts.measured_runs import read


def split_ratio(name: str, other: str) -> Interval:
    """Examples to the target, the split ÷ another arm, each at its own rate."""
    run = read(f"split_backward/{name}")
    return examples_ratio(run.records, "tuned", other, as_goal(run.config.target))


def split_standing(name: str, other: str, protocol: str = "tuned") -> str:
    """Whether the split is better, worse, the same or unstable against another arm."""
    run = read(f"split_backward/{name}")
    return against(run.records, protocol, other, as_goal(run.config.target))[0]


def split_rate(name: str, arm: str) -> float:
    """The best rate of an arm."""
    return rate_of(read(f"split_backward/{name}").records, "tuned", arm)


def split_cost(name: str, kind: str) -> Interval:
    """The time of a kind of step ÷ that of an ordinary step."""
    return cost_ratio(read(f"split_backward/{name}").records, kind)


def small_against_split(name: str) -> Interval:
    """The time of K small steps ÷ that of one split step."""
    rounds = [record for record in read(f"split_backward/{name}").records if record["kind"] == "cost"]
    return interval([row["small_ms"] / row["split_ms"] for row in rounds], np.median)


def split_distance(name: str) -> float:
    """The largest distance between the split and one update at K times the rate after one batch, as a share of the step."""
    return max(record["batch_split_scaled"] for record in read(f"split_backward/{name}").records if record["kind"] == "distance")


def split_misses(name: str) -> int:
    """The runs of the split at its own rate that do not reach the target."""
    run = read(f"split_backward/{name}")
    return int(np.isnan(to_target(run.records, "tuned", "split", "examples", as_goal(run.config.target))).sum())


def split_ends_alike(name: str) -> bool:
    """Whether the test accuracy of the split at its own rate shows no difference from that of one update."""
    run = read(f"split_backward/{name}")
    return not paired(run.records, "tuned", "one", f"test_{as_goal(run.config.target).metric}").excludes(0)


def lost_at_one_rate(name: str, arm: str) -> int:
    """The runs of an arm at the shared rate that diverged or collapsed."""
    run = read(f"split_backward/{name}")
    return num_lost(run.records, "original", arm, as_goal(run.config.target))


def worst_at_one_rate(name: str, arm: str) -> float:
    """The lowest test accuracy of an arm at the shared rate, in percent."""
    return 100 * float(np.nanmin(final(read(f"split_backward/{name}").records, "original", arm, "test_accuracy")))


def best_rates() -> dict[str, float]:
    """The best rate of each size on MNIST, by name `b<size>`."""
    run = read("learning_rate_grid/mnist")
    return {f"b{size}": rate for size, rate in rate_grid.best_rates(run.config, run.records).items()}


def rates_stop_growing() -> bool:
    """Whether the best rate grows over the small sizes, and not from the last but one to the last."""
    rates = list(best_rates().values())
    return rates[0] < rates[1] < rates[2] and rates[-1] <= rates[-2]


def grid_exponent() -> Interval:
    """The exponent by which the best rate grows with the batch, over all sizes."""
    run = read("learning_rate_grid/mnist")
    return rate_exponent(rate_grid.results(run.config, run.records))


def exponents() -> dict[str, float]:
    """The exponents from each size to the next, by name `p<size>` of the larger one."""
    rates = {int(name[1:]): rate for name, rate in best_rates().items()}
    pairs = zip(rates, list(rates)[1:], strict=False)
    return {f"p{larger}": float(np.log(rates[larger] / rates[size]) / np.log(larger / size)) for size, larger in pairs}


def grid_updates(size: int) -> Interval:
    """The updates to the target of a size at its best rate, in the runs of the grid."""
    run = read("learning_rate_grid/mnist")
    result = rate_grid.results(run.config, run.records)[size]
    return interval(result.updates_to_goal[result.best])


def grid_reaches(size: int) -> bool:
    """Whether every run of a size at its best rate reaches the target."""
    run = read("learning_rate_grid/mnist")
    result = rate_grid.results(run.config, run.records)[size]
    return bool(np.isfinite(result.updates_to_goal[result.best]).all())


def epochs_at_one_rate(size: int) -> float:
    """The epochs to the target at the shared rate."""
    return float(convergence_report.to_target(convergence_report.runs_of(read("convergence/mnist").records, "same", size), "epochs"))


def reaching_sizes(table: str) -> list[int]:
    """The sizes of which every run reaches the target, with the same rate or a tuned one."""
    return convergence_report.all_reached(read("convergence/mnist").records, table)


def critical_on_mnist() -> Interval:
    """The critical batch size of the study of convergence."""
    fit = convergence_report.fit_critical(read("convergence/mnist").records, "tuned")
    return fit.critical_batch_size if fit else Interval(np.nan, np.nan, np.nan, 0)


def noise_on_mnist() -> dict[str, Interval]:
    """The noise scale on the way, by name `from<percent>`."""
    run = read("convergence/mnist")
    scales = convergence_report.stretches(run.records, as_goal(run.config.target))
    return {f"from{100 * low:.0f}": scale for (low, _), scale in scales.items()}


def standing(name: str, arm: str) -> large_batch_records.Standing:
    """An arm of the huge-batch study against plain training."""
    run = read(f"large_batch/{name}")
    return large_batch_records.standing(run.config, run.records, arm)


def closed(name: str, arm: str) -> Interval:
    """The part of the gap to the small batch that an arm closes, in percent."""
    return percent(standing(name, arm).closed)


def gain(name: str, arm: str) -> Interval:
    """The points by which an arm ends above plain training."""
    return percent(standing(name, arm).gain)


def gap(name: str, arm: str) -> Interval:
    """The points by which an arm ends above the small batch."""
    return percent(standing(name, arm).gap)


def kinds(name: str, *arms: str) -> set[str]:
    """What arms do against plain training: helps, harms, lost or nothing."""
    return {standing(name, arm).kind for arm in arms}


def loss_parts(name: str, arm: str) -> large_batch_records.Parts:
    """The two parts of an arm's gap to the small batch in test loss."""
    run = read(f"large_batch/{name}")
    return large_batch_records.parts(run.config, run.records, arm)


def arm_rate(name: str, arm: str) -> float:
    """The rate of an arm's reported runs."""
    return float(large_batch_records.ends(read(f"large_batch/{name}").records, arm, "learning_rate")[0])


def times_the_updates(name: str, arm: str) -> float:
    """The updates of an arm ÷ those of plain training."""
    mine, plain = (large_batch_records.ends(read(f"large_batch/{name}").records, one, "updates")[0] for one in (arm, "plain"))
    return float(mine / plain)


def half_width(one: Interval) -> float:
    """Half of the width of an interval."""
    return (one.high - one.low) / 2


def accuracy_of(name: str, arm: str) -> Interval:
    """The test accuracy of an arm at the end, in percent."""
    return percent(large_batch_records.mean(large_batch_records.ends(read(f"large_batch/{name}").records, arm, "test_accuracy")))


def last_errors(name: str, one: str, other: str) -> Interval:
    """The difference of two arms of AdaBatch in test error after the last epoch, in points, seed by seed."""
    run = read(f"adabatch/{name}")
    ends = [arms.errors(run.config, run.records, arm)[:, -1] for arm in (one, other)]
    return interval(ends[0] - ends[1])


def critical_ways(name: str) -> list[critical_batch_size_report.Estimate]:
    """The critical batch size by each way: first the fit, if there is one, then the noise in each third, then branches."""
    run = read(f"critical_batch_size/{name}")
    return critical_batch_size_report.ways(run.config, run.records)


def mean_noise(name: str) -> float:
    """The mean of the noise scale over the three thirds of the way."""
    return float(np.mean([one.critical_batch_size.value for one in critical_ways(name) if one.name.startswith("noise")]))


def score(name: str) -> dict[str, str]:
    """The median and the worst regret over the scored cases: of `advise`, or of what people do instead."""
    line = next(line for line in measured_score.lines() if line.startswith(f"{name}:"))
    [(median, worst)] = re.findall(r"median regret ([\d.naif]+), worst ([\d.naif]+)", line)
    return {"median": median, "worst": worst}


def seeds(name: str) -> int:
    """The seeds of a run."""
    return read(name).config.seeds


def sweep_updates(size: int) -> float:
    """The mean updates to the goal of a batch size at its best rate, in the sweep of the critical batch size."""
    rows = [record for record in read("critical_batch_size/digits").records if record["kind"] == "sweep"]
    return float(np.mean(full_sweep.best_rates(rows)[size][1]))


def update_ms(size: int) -> float:
    """The time of an update as advice timed it, in milliseconds."""
    return 1e3 * read_throughput(read("advise/digits").records).seconds[size].value


def knee() -> float:
    """The batch size from which on the device was busy, as advice timed it."""
    return read_throughput(read("advise/digits").records).knee.value
