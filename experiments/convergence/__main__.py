"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
from rich.console import Console

import jaxbatch as jb
from experiments.convergence import __doc__ as question
from experiments.convergence import figure, report
from experiments.convergence.report import rate_of
from experiments.harness.command_line import for_quick
from experiments.harness.goal_words import better, is_share
from experiments.harness.optimizers import kind_of
from experiments.harness.rate_grid import GridConfig, best_rates, measure_grid, resolve_grid
from experiments.harness.schedules import ScheduleFlags, fill_schedule, make_for_length
from experiments.harness.speed import SpeedConfig, measure_missing_speed
from experiments.harness.study import check_positive, open_study, run_study, show_results
from experiments.harness.target import TargetConfig, num_updates, resolve_target
from experiments.harness.task import DEEP, load_choosing_task
from jaxbatch.advice.probes import last_without
from jaxbatch.augment import batch_shapes
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.evaluation import make_task_evaluate, metrics_argument
from jaxbatch.training.fitting import fit_with
from jaxbatch.training.goals import check_goal, until_reached
from jaxbatch.training.run_programs import RunPrograms
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState, start_shapes

OTHER_SEEDS = 1000  # added to the seeds, so that no rate is judged by the runs that chose it
NOISE_EXAMPLES, QUICK_NOISE_EXAMPLES = 600, 60  # drawn at each evaluation for the gradient noise scale
TABLES = ("same", "tuned")


@dataclasses.dataclass(frozen=True)
class Config(ScheduleFlags, TargetConfig):
    """Flags of the study."""

    learning_rate: float | None = None
    """Learning rate of table 1, the same for all sizes. Default: 0.02 for SGD, 0.001 for Adam, 0.01 for an optimizer of your own."""
    tuned_rates: tuple[float, ...] | None = None
    """Rates of table 2, in the order of the batch sizes. Default: the best of experiments.learning_rate_grid."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and its own order of examples."""
    grid_seeds: int = 3
    """Number of seeds of the grid that chooses the rates of table 2."""
    speed_rounds: int = 5
    """Rounds in which an iteration with loading is timed."""

    own_lengths = True
    long_to_compile = (*DEEP, "simple_cnn")  # two sizes at two rates, with a grid before and the times of an iteration


def resolve(config: Config, task: Task) -> Config:
    """Fills in what depends on the data set, shrinks for --quick, and checks."""
    if config.tuned_rates is not None and config.batch_sizes is not None and len(config.tuned_rates) == len(config.batch_sizes):
        pairs = sorted(zip(config.batch_sizes, config.tuned_rates, strict=True))  # sizes are sorted below
        config = dataclasses.replace(config, tuned_rates=tuple(rate for _, rate in pairs))
    config = fill_schedule(resolve_target(for_quick(config, seeds=2, grid_seeds=2, speed_rounds=2), task))
    config = dataclasses.replace(config, learning_rate=kind_of(config).rate if config.learning_rate is None else config.learning_rate)
    check_positive(config, "grid_seeds", "learning_rate", "speed_rounds", "tuned_rates")
    if config.tuned_rates is not None and len(config.tuned_rates) != len(config.batch_sizes):
        raise ValueError(f"--tuned-rates: {len(config.tuned_rates)} rates for {len(config.batch_sizes)} batch sizes. Give one rate for each.")
    return config


def find_tuned_rates(config: Config, task: Task, console: Console) -> dict[int, float]:
    """Maps batch size to its best rate, from the grid's own run folder; runs the grid if it is not finished."""
    if config.tuned_rates is not None:
        return dict(zip(config.batch_sizes, config.tuned_rates, strict=True))
    shared = {field.name for flags in (TargetConfig, ScheduleFlags) for field in dataclasses.fields(flags)}
    shared -= {"seeds", "overwrite", "resume", "evaluations_per_epoch"}
    settled = tuple(sorted({*shared, "seeds"}))  # by this study, also where the grid's --quick would be shorter
    grid = GridConfig(**{name: getattr(config, name) for name in shared} | {"seeds": config.grid_seeds, "given": settled})
    grid = resolve_grid(grid, task)
    run = open_study("learning_rate_grid", grid, console, task)
    measure_grid(grid, task, run, console)
    return best_rates(grid, run.records)


def measure_run(shared: RunPrograms, config: Config, key_fields: Record, test: Callable[[TrainState], float], with_noise: bool) -> Iterator[Record]:
    """Trains until the target or the end. Yields the noise at every evaluation, then one last record of the run.

    Args:
        shared: of a task whose ``test_data`` are the validation part, and of the run's optimizer.
        config: of the study.
        key_fields: what identifies the run: ``table``, ``batch_size``, ``seed`` and ``learning_rate``.
        test: computes the target's metric on the test set; called once.
        with_noise: whether the gradient's noise is measured in the runs at tuned rates.
    """
    task, batch_size, seed = shared.task, key_fields["batch_size"], OTHER_SEEDS + key_fields["seed"]
    fit_config = jb.FitConfig(
        shared.optimizer,
        batch_size,
        jb.steps(num_updates(config, task, batch_size)),
        seed=seed,
        evaluations_per_epoch=config.evaluations_per_epoch,
    )
    goal = check_goal(task, config.target)
    seconds, best, last, more_than = 0.0, 0.0 if is_share(goal) else None, None, 0
    name, validated = goal.metric, f"validation_{goal.metric}"
    for record in until_reached(fit_with(shared, fit_config, None), goal):
        more_than, last = last_without(last["updates"] if last else 0, record["updates"], record["reached"]), record
        seconds += last["train_seconds"]
        measured = goal.in_record(last)  # the task's test data are the validation part
        best = better(goal, measured, best)
        if with_noise and key_fields["table"] == "tuned" and not last["diverged"]:
            noise = measure_noise(task, last["state"].params, seed, last["updates"], QUICK_NOISE_EXAMPLES if config.quick else NOISE_EXAMPLES)
            yield {"kind": "noise", **key_fields, "updates": last["updates"], validated: measured} | noise
    yield {
        "kind": "run",
        **key_fields,
        "reached": last["reached"],
        "updates": last["updates"],
        "more_than": more_than,
        "epochs": last["epoch"],
        "examples": last["examples"],
        "compute_seconds": seconds,
        validated: measured,
        f"best_{validated}": best,
        f"test_{name}": None if last["diverged"] else test(last["state"]),
        "diverged": last["diverged"],
    }


def has_noise(task: Task, count: int = NOISE_EXAMPLES) -> bool:
    """Whether every example has a gradient of its own: not where the loss of one depends on the others in its batch."""
    batch = batch_shapes(task.train_data, count, task.prepare)
    try:
        jax.eval_shape(functools.partial(jb.gradient_statistics, task.loss_fn), start_shapes(task), batch)
    except ValueError:
        return False
    return True


def measure_noise(task: Task, params, seed: int, updates: int, count: int = NOISE_EXAMPLES) -> Record:
    """Signal and trace of the gradient at ``params``, per example, on examples drawn with replacement."""
    key = jax.random.fold_in(jax.random.key(seed), updates)
    index = jax.random.randint(key, (count,), 0, task.num_examples)
    batch = jax.tree.map(lambda leaf: leaf[index], task.train_data)
    if task.prepare is not None:
        batch = task.prepare(jax.random.split(key, count), batch)
    statistics = _statistics(task.loss_fn, params, batch)
    return {"signal": float(statistics.signal), "trace": float(statistics.trace)}


_statistics = jax.jit(jb.gradient_statistics, static_argnums=0)  # compiled once for each loss function


def note_rate(run: RunFolder, table: str, batch_size: int, rate: float) -> None:
    """Records the rate that a size has now, if it has changed: the report leaves out runs at other rates."""
    if rate_of(run.records, table, batch_size) != rate:
        run.append({"kind": "rate", "table": table, "batch_size": batch_size, "learning_rate": rate})


def measure_speed(config: Config, task: Task, run: RunFolder) -> None:
    """Times the iterations of all sizes side by side, for the rounds that are not in the run folder yet."""
    shared = {name: getattr(config, name) for name in ("model", "task", "batch_sizes", "optimizer", "momentum", "weight_decay", "clip_norm")}
    speed = SpeedConfig(config.dataset, learning_rate=config.learning_rate, rounds=config.speed_rounds, **shared)
    if config.quick:
        speed = dataclasses.replace(speed, examples_per_round=600)
    for record in measure_missing_speed(task, speed, run.records, parts=False):
        if record["kind"] == "speed":
            run.append(record)


def measure(config: Config, task: Task, test_data, rates: dict[str, dict[int, float]], run: RunFolder, console: Console) -> None:
    """Makes the measurements that are not in the run folder yet: the speed of an iteration, then run after run."""
    measure_speed(config, task, run)
    evaluate = make_task_evaluate(task, test_data)

    def test(state):
        return float(evaluate(metrics_argument(task, state), test_data)[jb.as_goal(config.target).metric])

    def identity(record):
        return tuple(record[name] for name in ("table", "batch_size", "seed", "learning_rate", "updates"))

    known, with_noise = {identity(record) for record in run.find(kind="noise")}, has_noise(task)
    with progress_bar(console) as progress:
        total = sum(len(sizes) for sizes in rates.values()) * config.seeds
        bar = progress.add_task("runs", total=total, rate="")
        of_task = RunPrograms(task, make_for_length(config, 1)(config.learning_rate))
        for table, by_size in rates.items():
            for batch_size, rate in sorted(by_size.items(), reverse=True):
                note_rate(run, table, batch_size, rate)
                updates = num_updates(config, task, batch_size)
                shared = of_task.with_optimizer(make_for_length(config, updates)(rate))
                for seed in range(config.seeds):
                    key_fields = {"table": table, "batch_size": batch_size, "seed": seed, "learning_rate": rate}
                    if not run.find(kind="run", **key_fields):
                        for record in measure_run(shared, config, key_fields, test, with_noise):
                            if record["kind"] == "run" or identity(record) not in known:
                                run.append(record)
                    progress.update(bar, advance=1)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, test_data = load_choosing_task(config)
    config = resolve(config, task)
    rates = {"same": dict.fromkeys(config.batch_sizes, config.learning_rate), "tuned": find_tuned_rates(config, task, console)}
    run = open_study("convergence", config, console, task)
    measure(config, task, test_data, rates, run, console)
    show_results(console, config, run, report, figure)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
