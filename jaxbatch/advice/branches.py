r"""The critical batch size by branching: short trainings from one state, each with a larger batch and a larger learning rate.

Up to the critical batch size, k times the batch with a rate that is scaled by the right rule gets as far with the same examples.
Branches try that out, so they need no assumption about gradients, and they measure what the rule can do as well as what the batch
can: with a rate that is far from the best one they find a size that only holds for that rate.

What the answer means can be computed for SGD with the linear rule on the quadratic loss :math:`\tfrac h2 |w - w_*|^2`, whose
gradient has the noise :math:`\Sigma`. Let :math:`\delta = |w_0 - w_*|^2` at the branch, let :math:`B` and :math:`\eta` be its batch size
and rate. After E examples a branch with factor k has the expected loss above the minimum

.. math:: \tfrac h2 \Big(a_k^{2E/kB}\,\delta + \eta^2 \tfrac kB\,\mathrm{tr}\,\Sigma\,\frac{1 - a_k^{2E/kB}}{1 - a_k^2}\Big),
   \qquad a_k = 1 - k \eta h.

It hardly depends on k while :math:`k \eta h \ll 1`. With the best rate of one update,
:math:`\eta = h^{-1} / (1 + B_\text{noise} / B)`, the product :math:`k \eta h` reaches 1 where :math:`kB = B + B_\text{noise}`: the critical size
is of the order of the noise scale :math:`B_\text{noise} = \mathrm{tr}\,\Sigma / |G|^2`. With a rate c times smaller it is found c times
larger.

Axes: B examples in a batch of the state's run, E examples in a branch, R seeds.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxbatch.batches import check_seed, epoch_order
from jaxbatch.gradients.updates import Optimizer, check_make_optimizer, check_optimizer
from jaxbatch.intervals import Interval, around
from jaxbatch.kinds import checked
from jaxbatch.schedules.rates import Rule, scale_learning_rate
from jaxbatch.states import as_arrays
from jaxbatch.training.cut import choose_cut, choose_evaluation_size
from jaxbatch.training.cut_check import check_parts
from jaxbatch.training.divergence import judge, make_is_finite, skips_nonfinite
from jaxbatch.training.epochs import compile_task_epoch
from jaxbatch.training.evaluation import make_test
from jaxbatch.training.goals import metric_names
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState, for_steps

_BRANCH = 0x6272616E  # "bran": makes the order of a branch differ from that of a run with the same seed


class Branches(NamedTuple):
    """What came of the branches, and the critical batch size that follows."""

    critical_batch_size: Interval  # the largest size that lost nothing (held); low: 0 if only the smallest held; high: inf if all held
    metrics: dict[int, tuple[float, ...]]  # by batch size, one for each seed; infinitely bad where the branch diverged
    learning_rates: dict[int, float]  # by batch size
    tolerance: float
    examples: int  # how many all branches together trained on: the cost


@checked
def branch(
    task: Task,
    make_optimizer: Callable[[float], Optimizer],
    state: TrainState,
    *,
    learning_rate: float,
    batch_size: int,
    examples: int,
    factors: Sequence[int] = (1, 2, 4, 8),
    rule: Rule = "sqrt",
    metric: str = "loss",
    above: bool = False,
    tolerance: float = 0.01,
    seeds: Sequence[int] = (0, 1, 2),
    microbatch_size: int | None = None,
    eval_params: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Branches:
    r"""Trains short branches from a state, with k times its batch size, and finds the largest that loses nothing.

    A branch with factor k trains on ``k * batch_size`` examples at a time, with the rate that the rule gives, from the state's
    parameters and optimizer state. For a seed, all branches read the same examples in the same order. It differs from the order of
    the run that made the state: with that run's own next examples, all losses would jump at the branch.

    Then all branches are compared by a metric on the task's ``test_data``: at their ends, on the same examples. The mean training
    loss would cost nothing, but it is that of the parameters on the way, and branches with fewer steps have fewer of them. The
    metric at the end carries the noise of the last updates; several seeds average it out.

    Args:
        task: its ``test_data`` should be held out from training (:func:`jaxbatch.hold_out`), not the test set.
        make_optimizer: ``learning_rate -> optimizer``, as ``optax.adamw``; the same kind that made the state.
        state: the ``state`` of a record of :func:`jaxbatch.fit`. It is kept.
        learning_rate: the rate of the run that made the state, at that point.
        batch_size: B, the batch size of that run.
        examples: E, how many every branch trains on, at most the data set. It is rounded down to whole batches of every branch. Take at least ten
            batches of the largest branch: shorter ones are compared before the old rate is forgotten.
        factors: k, whole numbers; 1 is added.
        rule: ``"linear"`` for SGD, ``"sqrt"`` for Adam and its relatives, see :func:`jaxbatch.scale_learning_rate`.
        metric: the name of a metric of the task.
        above: whether larger values of the metric are better, as for an accuracy.
        tolerance: how much worse than the branch with k = 1 the mean over seeds may be, in the units of the metric.
        seeds: R whole numbers; each gives another order of examples.
        microbatch_size, eval_params: see :class:`jaxbatch.FitConfig`.

    Returns:
        The critical batch size: the last size before the first that does not hold. Its interval reaches from the last size that
        surely holds to the first that surely does not (97.5% each, by Student's t of the differences, seed by seed), because nothing
        in between was tried. The lower end is 0 where k = 2 does not surely hold, and the upper end is infinite where the largest does not
        surely fail. A branch that diverged makes its size fail. With one seed there are no ends, and all is NaN if a branch with
        k = 1 diverged.

    Raises:
        ValueError: a wrong number, an unknown metric or rule, ``examples`` above the data set or below a batch of the largest branch,
            or an optimizer whose state is of another form than ``state`` or holds the learning rate.

    Example:
        >>> import optax
        >>> from jaxbatch import FitConfig, fit, steps
        >>> loss_fn = lambda w, x: 0.5 * (x - w) ** 2
        >>> data = jax.random.normal(jax.random.key(0), (4096,))
        >>> task = Task(lambda key: jnp.array(3.0), loss_fn, lambda w, x: {"loss": loss_fn(w, x)}, data, data)
        >>> *_, record = fit(task, FitConfig(optax.sgd(0.02), batch_size=4, duration=steps(10)))
        >>> settings = {"learning_rate": 0.02, "batch_size": 4, "factors": (1, 8, 128)}
        >>> found = branch(task, optax.sgd, record["state"], examples=2048, rule="linear", **settings)
        >>> found.critical_batch_size[:3], found.examples
        ((32.0, 32.0, 512.0), 18432)

    References:
        Merrill et al., `Critical Batch Size Revisited <https://arxiv.org/abs/2505.23971>`_, 2025. The closed form is that of this
        module's first lines.
    """
    check_make_optimizer(make_optimizer, float(learning_rate))
    sizes, count = _plan(task, batch_size, factors, examples, seeds, metric, tolerance)
    rates = {size: float(scale_learning_rate(rule, learning_rate, batch_size, size)) for size in sizes}
    state = for_steps(as_arrays(state))
    _check_state(make_optimizer, rates, state)
    check_parts(task, state.params, choose_cut(task, state.params, max(sizes), microbatch_size=microbatch_size))
    test, is_finite = make_test(task, choose_evaluation_size(task, microbatch_size), eval_params), make_is_finite(state)
    ends_by_size = {}
    for size in sizes:
        optimizer = make_optimizer(rates[size])
        run = compile_task_epoch(task, optimizer, state, count // size, size, microbatch_size=microbatch_size)
        skips, ends = functools.cache(functools.partial(skips_nonfinite, optimizer, state.params)), []
        for seed in seeds:
            order_seed = (int(seed) + _BRANCH) % 2**32
            indices = np.asarray(epoch_order(order_seed, 0, task.num_examples))[:count].reshape(-1, size)
            end, losses = run(jax.tree.map(jnp.copy, state), task.train_data, indices, (order_seed, 0))
            value = float(test(task.test_data, end)[metric])
            _, bad = judge(jax.device_get(losses), bool(is_finite(end)), skips)
            ends.append(value if bad is None and math.isfinite(value) else -math.inf if above else math.inf)
        ends_by_size[size] = tuple(ends)
    return Branches(critical_of_branches(ends_by_size, tolerance, above=above), ends_by_size, rates, tolerance, count * len(sizes) * len(seeds))


def critical_of_branches(metrics: dict[int, tuple[float, ...]], tolerance: float, *, above: bool = False) -> Interval:
    """The critical batch size from the metrics of branches that have been trained, for another tolerance for example.

    Args:
        metrics: by batch size, one value for each seed, in the same order of seeds; see :class:`Branches`.
        tolerance, above: see :func:`branch`.

    Example:
        >>> critical_of_branches({8: (1.0, 1.1, 1.2), 16: (1.0, 1.1, 1.2), 32: (1.3, 1.4, 1.5)}, 0.05)
        Interval(value=16.0, low=16.0, high=32.0, n=3, left_out=0)
    """
    from scipy import stats

    sizes = sorted(metrics)
    table = np.array([metrics[size] for size in sizes]) * (-1 if above else 1)  # (sizes, R)
    seeds = table.shape[1]
    if not np.isfinite(table[0]).all():
        return Interval(math.nan, math.nan, math.nan, seeds)
    worse = table - table[0]  # the branches of a seed share their examples
    held = _held(worse.mean(1) <= tolerance)
    if seeds == 1:
        return Interval(float(sizes[held - 1]), math.nan, math.nan, 1)
    with np.errstate(invalid="ignore"):
        reach = np.nan_to_num(stats.t.ppf(0.975, seeds - 1) * worse.std(1, ddof=1) / math.sqrt(seeds))  # 0 where a branch diverged
    # Each end goes on from size to size until one is not sure, so no size is looked at in vain, and each end errs in 2.5% of cases.
    surely_held = _held(worse.mean(1) + reach <= tolerance)
    surely_failed = _held((worse.mean(1) - reach > tolerance)[:0:-1])
    low = float(sizes[surely_held - 1]) if surely_held > 1 else 0.0
    high = float(sizes[-surely_failed]) if surely_failed else math.inf
    return around(float(sizes[held - 1]), low, high, seeds)


def _held(holds: np.ndarray) -> int:
    """How many hold before the first that does not."""
    return len(holds) if holds.all() else int(np.argmin(holds))


def _plan(
    task: Task, batch_size: int, factors: Sequence[int], examples: int, seeds: Sequence[int], metric: str, tolerance: float
) -> tuple[list[int], int]:
    """The batch sizes in ascending order, and the examples of a branch in whole batches of each."""
    if batch_size < 1 or tolerance < 0 or not math.isfinite(tolerance):
        raise ValueError(f"batch_size={batch_size} must be at least 1, and tolerance={tolerance} at least 0 and finite.")
    if not all(isinstance(factor, int | np.integer) and factor >= 1 for factor in factors) or max(factors, default=1) < 2:
        raise ValueError(f"factors={tuple(factors)} must be whole numbers from 1 on, and one of them above 1.")
    if not len(seeds):
        raise ValueError("seeds is empty: at least 1 is needed.")
    for seed in seeds:
        check_seed(seed)
    names = metric_names(task)
    if metric not in names:
        there = f"the task's metrics are {', '.join(names)}" if names else "metrics_fn computes it on test_data, and the task lacks one of the two"
        raise ValueError(f"metric={metric!r}: {there}.")
    sizes = sorted({batch_size * int(factor) for factor in (1, *factors)})
    whole = math.lcm(*sizes)
    if examples > task.num_examples:
        raise ValueError(f"examples={examples} is above num_examples={task.num_examples}, and a branch reads no example twice. Take fewer.")
    if examples < whole:
        raise ValueError(f"examples={examples} does not hold a whole batch of every size {sizes}: take at least {whole}, better 10 times as many.")
    return sizes, examples // whole * whole


def _check_state(make_optimizer: Callable[[float], Optimizer], rates: dict[int, float], state: Any) -> None:
    """Refuses an optimizer that could not go on from the state, or would go on with the state's rate instead of its own."""
    low, high = (make_optimizer(rate) for rate in (min(rates.values()), 2 * max(rates.values())))
    check_optimizer(low, state.params)
    start, other = low.init(state.params), high.init(state.params)
    form = lambda tree: jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)
    if form(start) != form(state.opt_state):
        raise ValueError("make_optimizer makes an optimizer whose state has another form than state.opt_state: give the kind that made the state.")
    pairs = zip(jax.tree.leaves(start), jax.tree.leaves(other), strict=True)
    if any(jnp.issubdtype(jnp.result_type(a), jnp.floating) and not bool(jnp.array_equal(a, b, equal_nan=True)) for a, b in pairs):
        raise ValueError(
            "make_optimizer keeps the learning rate in the optimizer's state (as optax.inject_hyperparams does), so every branch would "
            "use the rate of the state. Give a function whose optimizers hold the rate as a constant, and a state that such an optimizer made."
        )
