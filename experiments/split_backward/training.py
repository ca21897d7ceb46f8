"""Trains the arms: side by side at given rates, and one after another to choose each arm's own rate."""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import in_flight
from experiments.harness.goal_words import better, is_share
from experiments.harness.resuming import is_whole
from experiments.harness.task import prepared_once
from experiments.split_backward.steps import RULES, compare, is_finite, make_optimizer, make_step
from jaxbatch.batches import cut_batches, epoch_order, steps_per_epoch
from jaxbatch.machine.compiling import compile_ahead
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.sums import Losses
from jaxbatch.training.divergence import judge, skips_nonfinite
from jaxbatch.training.evaluation import make_task_evaluate, metrics_argument
from jaxbatch.training.goals import as_goal, metric_names
from jaxbatch.training.loops import make_epoch
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState, make_init_state

OTHER_SEEDS = 1000  # added to the seeds of the runs that choose a rate, so that no arm is scored on these seeds


class Segment(NamedTuple):
    """The part of training between two evaluations on the validation part."""

    epoch: int
    first: int  # its first batch within the epoch
    last: int
    examples: int  # examples seen at its end


def plan(task: Task, config) -> list[Segment]:
    """The segments of a run."""
    per_epoch = steps_per_epoch(task.num_examples, config.batch_size)
    parts = np.array_split(np.arange(per_epoch), min(config.evaluations_per_epoch, per_epoch))
    ends = [(epoch, int(part[0]), int(part[-1]) + 1) for epoch in range(config.epochs) for part in parts]
    return [Segment(epoch, first, last, (epoch * per_epoch + last) * config.batch_size) for epoch, first, last in ends]


class Trainer:
    """The study's programs, each compiled once: the rate is an argument, so all rates and seeds share them."""

    def __init__(self, task: Task, config):
        self.task, self.config, self.segments = task, config, plan(task, config)
        self._programs: dict[tuple, Any] = {}
        self._evaluate = make_task_evaluate(task, task.test_data)
        self._begin = make_init_state(task)
        self._skips = functools.cache(lambda: skips_nonfinite(make_optimizer(config, 0.0), self.start(0).params))

    def start(self, seed: int) -> TrainState:
        """The state that a run starts from, the same for all arms."""
        return self._begin(make_optimizer(self.config, 0.0), seed)

    def indices(self, seed: int, segment: Segment) -> np.ndarray:
        """Which examples go into which batch, the same for all arms."""
        order = epoch_order(seed, segment.epoch, self.task.num_examples)
        return np.asarray(cut_batches(order, self.config.batch_size).indices[segment.first : segment.last])

    def train(self, arm: str, rate: float, state: TrainState, seed: int, segment: Segment) -> tuple[TrainState, Losses, float]:
        """Runs a segment of an arm: the next state, the batches' losses, and the seconds without compilation."""
        start, indices, prepare = (jnp.float32(rate), state), self.indices(seed, segment), self.task.prepare
        rest = (self.task.train_data, indices, *(() if prepare is None else (np.array([seed, segment.epoch], np.uint32),)))
        key = (RULES[arm], indices.shape)
        if key not in self._programs:

            def step(pair, batch):
                rate, state = pair
                state, losses = make_step(self.task, self.config, arm, rate)(state, batch)
                return (rate, state), losses

            self._programs[key] = compile_ahead(make_epoch(step, prepare), start, *rest)
        began = time.perf_counter()
        (_, state), losses = jax.block_until_ready(self._programs[key](start, *rest))
        return state, jax.device_get(losses), time.perf_counter() - began

    def judge(self, state: TrainState, losses: Losses) -> tuple[float, bool]:
        """The mean loss of a segment, and whether the run has diverged, as :func:`jaxbatch.fit` judges it."""
        loss, bad = judge(losses, is_finite(state), self._skips)
        return loss, bad is not None

    def validate(self, state: TrainState) -> Record:
        """The metrics on the validation part."""
        means = self._evaluate(metrics_argument(self.task, state), self.task.test_data)
        return {f"validation_{name}": float(means[name]) for name in metric_names(self.task)}


def measure_training(trainer: Trainer, test_data, protocol: str, rates: Mapping[str, float], run: RunFolder, show) -> Iterator[Record]:
    """Trains the arms side by side, seed after seed; compares them at every evaluation; uses the test set once, at the end.

    After each evaluation the states are kept in the run folder, so that an interrupted study continues from there and gives
    the same numbers.

    Args:
        trainer: the programs; its task's test data are the validation part.
        test_data: the test set.
        protocol: ``"original"``, in which (b) is also compared with (c) and (d) in parameter space, or ``"tuned"``.
        rates: maps an arm to the rate of its updates.
        run: its records tell which seeds have finished.
        show: called after each segment with ``(segments, examples a second)``.
    """
    task, config, arms = trainer.task, trainer.config, list(rates)
    steps = {arm: make_step(task, config, arm, rate) for arm, rate in rates.items()} if protocol == "original" else None
    test = make_task_evaluate(task, test_data)
    drawn = prepared_once(task).train_data
    path = run.path / f"in_flight_{protocol}.msgpack"
    for seed in range(config.seeds):
        if is_whole(run.find(kind="end", protocol=protocol, seed=seed), arm=arms):
            show(len(trainer.segments))
            continue
        begin = {arm: trainer.start(seed) for arm in arms}
        start = trainer.start(seed).params
        done, states, seconds = _load(path, seed, begin, dict.fromkeys(arms, 0.0))
        show(done)
        for number, segment in enumerate(trainer.segments[done:], done):
            began, indices = time.perf_counter(), trainer.indices(seed, segment)
            identity = {"protocol": protocol, "seed": seed, "segment": number, "examples": segment.examples}
            for arm in arms:
                if not is_finite(states[arm]):
                    continue
                states[arm], losses, spent = trainer.train(arm, rates[arm], states[arm], seed, segment)
                seconds[arm] += spent
                loss, failed = trainer.judge(states[arm], losses)
                yield identity | {
                    "kind": "curve",
                    "arm": arm,
                    "learning_rate": rates[arm],
                    "updates": int(states[arm].step),
                    "loss": loss,
                    **trainer.validate(states[arm]),
                    "seconds": seconds[arm],
                    "diverged": failed,
                }
            if steps is not None and all(is_finite(states[arm]) for arm in ("split", "scaled", "small")):
                batch = jax.tree.map(lambda leaf: leaf[indices[0]], drawn)
                yield identity | {"kind": "distance"} | compare(steps, states, start, batch)
            run.write(path.name, in_flight.to_bytes(states, seed=seed, done=number + 1, seconds=seconds))
            show(1, len(arms) * indices.size / (time.perf_counter() - began))
        for arm in arms:
            means = test(metrics_argument(task, states[arm]), test_data) if is_finite(states[arm]) else {}
            identity = {"kind": "end", "protocol": protocol, "arm": arm, "seed": seed, "learning_rate": rates[arm]}
            yield identity | {f"test_{name}": float(means[name]) if means else None for name in metric_names(task)}
    path.unlink(missing_ok=True)


def _load(path, seed: int, states, seconds) -> tuple[int, dict[str, TrainState], dict[str, float]]:
    """The number of finished segments of this seed, their states and seconds; for a new seed, those of the start."""
    if path.exists():
        kept, rest = in_flight.from_bytes(states, path.read_bytes())
        if rest["seed"] == seed:
            return rest["done"], kept, rest["seconds"]
    return 0, states, seconds


def measure_tuning(trainer: Trainer, arms: Sequence[str], known: set[tuple], show) -> Iterator[Record]:
    """Trains every arm at every rate of the grid, with one budget and the same examples in the same order; a record per run.

    Args:
        trainer: the programs; its task's test data are the validation part. The test set is not used here.
        arms: the arms that have an update rule of their own.
        known: ``(arm, learning_rate, seed)`` of the runs that are recorded.
        show: see :func:`measure_training`.
    """
    config, segments, goal = trainer.config, trainer.segments, as_goal(trainer.config.target)
    name = f"validation_{goal.metric}"
    for seed in range(OTHER_SEEDS, OTHER_SEEDS + config.tune_seeds):
        for rate in config.learning_rates:
            for arm in arms:
                if (arm, rate, seed) in known:
                    show(len(segments))
                    continue
                state, to_target, best, failed = trainer.start(seed), None, 0.0 if is_share(goal) else None, False
                for segment in segments:
                    state, losses, spent = trainer.train(arm, rate, state, seed, segment)
                    metrics = trainer.validate(state)
                    best = better(goal, metrics[name], best)
                    if to_target is None and goal.reached(metrics[name]):
                        to_target = segment.examples
                    show(1, (segment.last - segment.first) * config.batch_size / spent)
                    failed = trainer.judge(state, losses)[1]
                    if failed:
                        show(len(segments) - segments.index(segment) - 1)
                        break
                identity = {"kind": "tune", "arm": arm, "learning_rate": rate, "seed": seed}
                yield identity | {"examples_to_target": to_target} | metrics | {f"best_{name}": best, "diverged": failed}
