"""The runs of the sharpness study: a small and a huge batch from the same weights, and the parameters that are kept of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbatch as jb
from experiments.harness import in_flight
from experiments.harness.optimizers import make_optimizer
from experiments.harness.task import prepared_once
from jaxbatch.gradients.curvature import Curvature
from jaxbatch.gradients.loss_line import LossLine
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.training.cut import choose_evaluation_size
from jaxbatch.training.evaluation import make_task_evaluate
from jaxbatch.training.fitting import fit_with
from jaxbatch.training.goals import as_goal, metric_names
from jaxbatch.training.run_programs import Once, RunPrograms
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import compile_start, start_shapes

WAY = (0.125, 0.25, 0.5)  # of --epochs, where curvature is measured on the way
QUICK_WAY = WAY[-1:]  # with --quick
COMPARISONS = ("epochs", "loss")


class Setup:
    """What all runs and measurements share: the task, the data on which its loss is taken, the rates."""

    def __init__(self, config, task: Task, test_data, rates: dict[int, float]):
        self.config, self.task, self.rates = config, task, rates
        self.way_parts = QUICK_WAY if config.quick else WAY
        self.train_data = prepared_once(task).train_data
        self.microbatch_size = task.examples_at_a_time
        goal, names = as_goal(config.target), metric_names(task)
        self.metric = "loss" if "loss" in names else goal.metric  # on data that are not trained on
        self.names = list(dict.fromkeys([self.metric, goal.metric]))
        self._held_out = {"validation": task.test_data, "test": test_data}
        self._evaluate = {kind: make_task_evaluate(task, data) for kind, data in self._held_out.items()}
        losses = lambda params, batch: {"loss": task.loss_fn(params, batch)}
        self._train_loss = jb.make_evaluate(losses, task.num_examples, self.microbatch_size or choose_evaluation_size(task))
        of_loss = (task.loss_fn, start_shapes(task), self.train_data, self.microbatch_size)
        self.curvature, self._line = Curvature(*of_loss), LossLine(*of_loss)
        self.start = compile_start(task)
        untested, of_task = task._replace(test_data=None), Once()  # the study judges its runs itself
        self.programs = {size: RunPrograms(untested, make_optimizer(config)(rate), of_task) for size, rate in rates.items()}

    def loss(self, params) -> float:
        """The mean training loss."""
        return float(self._train_loss(params, self.train_data)["loss"])

    def losses(self, params, other, points) -> list[float]:
        """The mean training loss along a line."""
        return [float(value) for value in self._line(params, other, points)]

    def metrics(self, kind: str, params) -> dict[str, float]:
        """The metrics on the validation part, or the test set."""
        means = self._evaluate[kind](params, self._held_out[kind])
        return {f"{kind}_{name}": float(means[name]) for name in self.names}


def choose_rate(config, task: Task, size: int, seeds: Sequence[int]) -> list[Record]:
    """Trains all rates at one size until none can reach the target in fewer updates, on average over seeds, than the best has."""
    settings = {"batch_size": size, "seeds": seeds, "duration": jb.epochs(config.max_epochs), "goal": config.target}
    per_epoch = max(1, min(4, task.num_examples // size))
    for record in jb.tune_learning_rate(task, make_optimizer(config), config.learning_rates, **settings, evaluations_per_epoch=per_epoch):
        result = record["result"]
        if is_settled(result.updates_to_goal, result.diverged, record["batches"]):
            break
    updates_to_goal = result.updates_to_goal
    return [
        {"kind": "sweep", "batch_size": size, "learning_rate": rate, "seed": seed, "updates": None if np.isnan(updates) else int(updates)}
        for rate, row in zip(result.learning_rates, updates_to_goal, strict=True)
        for seed, updates in zip(seeds, row, strict=True)
    ]


def is_settled(updates_to_goal: np.ndarray, diverged: np.ndarray, batches: int) -> bool:
    """Whether no rate that is still training can beat the best rate whose seeds have all reached the goal.

    Example:
        >>> reached = np.array([[10.0, np.nan], [14.0, 18.0]])
        >>> [is_settled(reached, np.zeros((2, 2), bool), batches) for batches in (20, 22)]
        [False, True]
    """
    missing = np.isnan(updates_to_goal)
    best = np.where(missing.any(1), np.inf, updates_to_goal.mean(1)).min()
    soonest = np.where(missing, np.where(diverged, np.inf, batches), updates_to_goal).mean(1)
    return bool((soonest[missing.any(1)] >= best).all())


def train(setup: Setup, size: int, seed: int, run: RunFolder) -> list[Record]:
    """Trains until the epochs are over and the loss is reached; keeps parameters in the run folder, and returns the records."""
    config, task = setup.config, setup.task
    per_epoch = max(1, min(4, task.num_examples // size))
    settings = jb.FitConfig(None, size, jb.epochs(config.max_epochs), seed=seed, evaluations_per_epoch=per_epoch)
    identity = {"batch_size": size, "seed": seed}
    milestones, wanted, rows, next_row = [part * config.epochs for part in setup.way_parts], dict.fromkeys(COMPARISONS), [], 0.0
    for record in fit_with(setup.programs[size], settings, None):
        params, epoch = record["state"].params, record["epoch"]
        loss = math.nan if record["diverged"] else setup.loss(params)
        at = {"epoch": epoch, "updates": record["updates"], "loss": loss}
        if epoch >= next_row - 1e-9:
            rows.append({"kind": "curve", **identity, **at})
            next_row = max(1.1 * epoch, epoch + 0.25)
        while milestones and epoch >= milestones[0] - 1e-9:
            keep(run, f"way_{setup.way_parts[-len(milestones)]}", size, seed, params, at)
            milestones.pop(0)
        for name, reached in (("epochs", epoch >= config.epochs - 1e-9), ("loss", loss <= config.train_loss)):
            if wanted[name] is None and reached and not record["diverged"]:
                wanted[name] = record["updates"]
                keep(run, name, size, seed, params, at)
        if record["diverged"] or None not in wanted.values():
            break
    start = setup.programs[size].begin(seed, None).params
    keep(run, "way_0", size, seed, start, {"epoch": 0.0, "updates": 0, "loss": setup.loss(start)})
    updates_to = {f"updates_to_{name}": updates for name, updates in wanted.items()}
    done = {"learning_rate": setup.rates[size], "updates": record["updates"], "diverged": record["diverged"]}
    return [*rows, {"kind": "trained", **identity, **done, **updates_to}]


def _file(run: RunFolder, name: str, size: int, seed: int):
    return run.path / f"{name}_{size}_{seed}.msgpack"


def keep(run: RunFolder, name: str, size: int, seed: int, params, at: Record) -> None:
    """Writes parameters, with where in the run they were."""
    run.write(_file(run, name, size, seed).name, in_flight.to_bytes(params, **at))


def find_states(run: RunFolder, setup: Setup, what: str) -> list[tuple[Record, Callable[[], Any]]]:
    """What one kind of measurement is made of: how its records are found, and a function that reads the parameters."""
    template = jax.eval_shape(setup.task.start, jax.random.key(0))
    sizes, seeds = (setup.config.small_batch_size, setup.config.large_batch_size), range(setup.config.seeds)
    there = lambda name, size, seed: _file(run, name, size, seed).exists()

    def read(name, size, seed):
        params, at = in_flight.from_bytes(template, _file(run, name, size, seed).read_bytes())
        return jax.tree.map(jnp.asarray, params), {key: np.asarray(value).item() for key, value in at.items()}

    pairs = [(size, seed) for seed in seeds for size in sizes]
    if what == "curvature on the way":
        stages = [
            (part, size, seed) for size, seed in pairs for part in (0, *setup.way_parts) if part or size == sizes[0]
        ]  # both start from the same
        candidates = [({"kind": "way", "stage": part, "batch_size": size, "seed": seed}, f"way_{part}", size, seed) for part, size, seed in stages]
    elif what == "lines":
        return [
            ({"kind": "line", "comparison": name, "seed": seed}, lambda name=name, seed=seed: [read(name, size, seed) for size in sizes])
            for name in COMPARISONS
            for seed in seeds
            if all(there(name, size, seed) for size in sizes)
        ]
    else:
        kind = {"solutions": "solution", "going on": "continued"}[what]
        more = [{}] if kind == "solution" else [{"with_batch_size": size} for size in sizes]
        candidates = [
            ({"kind": kind, "comparison": name, "batch_size": size, "seed": seed} | fields, name, size, seed)
            for name in COMPARISONS
            for size, seed in pairs
            for fields in more
            if fields.get("with_batch_size", 0) <= size  # with the large batch only from its own solutions
        ]
    return [(identity, lambda of=of: read(*of)) for identity, *of in candidates if there(*of)]
