r"""What a monitored run tells of its noise: statistics of each record, and running averages that go on from state to state.

All of it is computed on the host in float64 from the signal and trace of each batch, which the programs return as they return
the losses. So running averages cost the device nothing, and the number of records changes none of their bits.

Axes: S batches, V values: of the whole gradient, then of each layer.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree, UInt32

from jaxbatch.augment import example_keys
from jaxbatch.data.stream_parts import checked_parts
from jaxbatch.data.streams import is_stream
from jaxbatch.gradients.cut import Cut
from jaxbatch.gradients.independence import cut_matters
from jaxbatch.gradients.noise import GradientStatistics, gradient_noise_scale
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.spreads import layers_of
from jaxbatch.intervals import Interval, fieller
from jaxbatch.machine.constants import call_compiled
from jaxbatch.sums import Losses
from jaxbatch.training.cut import choose_cut
from jaxbatch.training.cut_check import asked_of, passes_once
from jaxbatch.training.devices import alone
from jaxbatch.training.layouts import shapes_of
from jaxbatch.training.plans import FitConfig
from jaxbatch.training.tasks import Task, smallest

_LOSS = "the loss of an example"
_WEIGHTS, _MOMENTS = 2, 5  # sums of weights and of their squares; then for each value two means and three sums of products


class NoiseTrack:
    r"""The running averages of a run, and what its records say of the noise.

    With n batches since a measurement it has the weight :math:`w = 2^{-n / \text{halflife}}`. Averages are divided by the sum
    of the weights, so that their start has no bias. Their interval is Fieller's, from the weighted variances, with the effective
    number of measurements :math:`(\sum w)^2 / \sum w^2`.

    Args:
        monitor: None for a run that measures nothing.
        params: only their names are used.
        written: what :meth:`written` returned at the end of an earlier run; anything of another form starts anew.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbatch.gradients.part_norms import BatchNoise, WithNoise
        >>> track = NoiseTrack(NoiseMonitor(), jnp.zeros(2))
        >>> noise = BatchNoise(np.array([[0.5], [1.5]]), np.array([[12.0], [20.0]]), np.array([True, True]))
        >>> losses, record = track.read(WithNoise(np.array([3.0, 2.0]), noise))
        >>> record["noise_scale"], round(record["noise_scale_average"], 2), record["noise_scale_high"]
        (16.0, 15.99, inf)
    """

    def __init__(self, monitor: NoiseMonitor | None, params: PyTree, written: PyTree = ()):
        self._monitor = monitor
        if monitor is None:
            return
        self._decay = 0.5 ** (1 / monitor.halflife)
        self._layers = list(dict.fromkeys(layers_of(params))) if monitor.per_layer else []
        self._sums = np.zeros(_WEIGHTS + _MOMENTS * (1 + len(self._layers)))
        if np.shape(written) == (2 * len(self._sums),):
            self._sums = np.array(written, np.uint32).view(np.float64)

    def written(self) -> UInt32[np.ndarray, "bits"] | tuple[()]:
        """The running averages for a state, which has no 64-bit numbers: each as two words. ``()`` without a monitor."""
        return () if self._monitor is None else self._sums.copy().view(np.uint32)

    def read(self, losses: Any) -> tuple[Losses | Float[np.ndarray, "S"], dict[str, Any]]:
        """The losses of S batches, and the fields of their record; the averages go on by S batches."""
        if self._monitor is None:
            return losses, {}
        losses, noise = jax.device_get(losses)
        signal, trace = np.asarray(noise.signal, np.float64), np.asarray(noise.trace, np.float64)
        good = noise.measured & np.isfinite(signal).all(1) & np.isfinite(trace).all(1)
        for pair, counts in zip(np.stack([signal, trace], 1), good, strict=True):
            self._age()
            if counts:
                self._add(*pair)
        fields: dict[str, Any] = {"noise_measurements": int(good.sum()), **_fields(signal[good, 0], trace[good, 0]), **self._averages(0)}
        if noise.left_out is not None:
            fields["noise_left_out"] = float(np.mean(noise.left_out[good], dtype=np.float64)) if good.any() else None
        if self._layers:
            of_layer = lambda v: {**_fields(signal[good, v], trace[good, v]), **self._averages(v)}
            fields["noise_by_layer"] = {name: _unprefixed(of_layer(v)) for v, name in enumerate(self._layers, 1)}
        return losses, fields

    def _age(self) -> None:
        self._sums[0] *= self._decay
        self._sums[1] *= self._decay**2
        self._moments()[:, 2:] *= self._decay

    def _add(self, signal: Float[np.ndarray, "V"], trace: Float[np.ndarray, "V"]) -> None:
        """Adds a measurement of weight 1; the sums of products are kept about the means, so that they lose no digits."""
        before, moments = self._sums[0], self._moments()
        self._sums[:2] += 1
        from_signal, from_trace = signal - moments[:, 0], trace - moments[:, 1]
        moments[:, 0] += from_signal / self._sums[0]
        moments[:, 1] += from_trace / self._sums[0]
        products = from_signal**2, from_trace**2, from_signal * from_trace
        moments[:, 2:] += before / self._sums[0] * np.stack(products, 1)

    def _moments(self) -> Float[np.ndarray, "V 5"]:
        return self._sums[_WEIGHTS:].reshape(-1, _MOMENTS)  # a view

    def _averages(self, value: int) -> dict[str, float | None]:
        weight, squares = self._sums[:_WEIGHTS].tolist()
        signal, trace, *products = self._moments()[value].tolist()
        effective = weight**2 / squares if squares else 0.0
        if effective - 1 > 1e-6:
            # The variance of a weighted mean, from the weighted sums of products, without bias.
            unbiased = weight - squares / weight
            of_signal, of_trace, covariance = (product / unbiased * squares / weight**2 for product in products)
            scale = fieller(trace, signal, of_trace, covariance, of_signal, effective, nonnegative=True)
        else:
            scale = Interval(math.nan if not weight else _ratio(trace, signal), math.nan, math.nan, round(effective))
        known = {"noise_signal_average": signal, "noise_trace_average": trace} if weight else {}
        return {"noise_signal_average": None, "noise_trace_average": None} | known | _interval_fields("noise_scale_average", scale)


def track_noise(monitor: Any, state: Any, batch_sizes: Sequence[int]) -> NoiseTrack:
    """The averages of a run that starts from ``state`` and has batches of these sizes.

    Raises:
        ValueError: no batch can be measured.
    """
    if monitor is not None and batch_sizes and max(batch_sizes) < 2:  # a schedule may have single examples among others: they are not measured
        raise ValueError("batch_size=1 with a monitor: one example cannot be cut into parts. Take batch_size=2 or more, or monitor=None.")
    return NoiseTrack(monitor, state.params, state.noise)


class ChangesTraining(ValueError):
    """A monitor would train another model than a run without it."""


def cuts_of(task: Task, config: FitConfig, params: PyTree) -> Callable[[int], Cut]:
    """``batch_size -> cut`` of a run, each decided once, when it is asked for; only the shapes of ``params`` are used."""
    names = ("num_groups", "microbatch_size", "num_devices", "monitor")
    asked: dict[str, Any] = {name: getattr(config, name) for name in names}
    shapes = shapes_of(params)
    return functools.cache(lambda batch_size: choose_cut(task, shapes, batch_size, **asked))


def check_unchanged(task: Task, config: FitConfig, params: PyTree, batch_sizes: Sequence[int], cut_of: Callable[[int], Cut] | None = None) -> None:
    """Checks that a run with its monitor trains what it trains without: batches that are cut only to be measured must not notice it.

    The losses of the first examples are computed whole and in parts (:func:`jaxbatch.gradients.independence.cut_matters`), for every
    size of batch that the monitor cuts further than training does.

    Raises:
        ChangesTraining: the loss, ``prepare`` or the model's state depends on how a batch is cut.

    Example:
        >>> import optax
        >>> task = Task(lambda key: jax.numpy.zeros(()), lambda w, x: w * x - (w * x).mean(), None, jax.numpy.arange(8.0), None)
        >>> check_unchanged(task, FitConfig(optax.sgd(0.1), 4, monitor=NoiseMonitor()), jax.numpy.zeros(()), [4])
        Traceback (most recent call last):
        jaxbatch.training.monitor.ChangesTraining: monitor: to be measured, a batch of 4 is cut into parts of 2, and the loss of an
        example changes with the cut, so that another model would be trained. Take monitor=None; or microbatch_size=2 and
        task._replace(coupled=True), which trains in such parts with a monitor and without.
    """
    if config.monitor is None:
        return
    cut_of = cut_of or cuts_of(task, config, params)
    for batch_size in sorted(set(batch_sizes)):
        cut = cut_of(batch_size)
        whole, part = (smallest(cut.share, *bounds) or 1 for bounds in ((cut.unmeasured,), (cut.to_measure, cut.microbatch_size)))
        cause = _noticed(task, cut, params, whole, part) if part < whole else None
        if cause:
            meant = "" if task.coupled or cause != _LOSS else " and task._replace(coupled=True)"
            raise ChangesTraining(
                f"monitor: to be measured, a batch of {batch_size} is cut into parts of {part}, and {cause} changes with the cut, so that "
                f"another model would be trained. Take monitor=None; or microbatch_size={part}{meant}, which trains in such parts with a "
                "monitor and without."
            )


def _noticed(task: Task, cut: Cut, params: PyTree, whole: int, part: int) -> str | None:
    """What depends on whether ``whole`` examples are worked on at once or in parts; None: nothing."""
    if task.update_model_state is not None:
        return "the model's state, as the moments of batch normalisation,"
    data = task.train_data
    if is_stream(data):
        (examples,) = checked_parts(data, lambda: [np.arange(whole, dtype=np.int32)])
    else:
        examples = jax.tree.map(lambda leaf: leaf[:whole], data)
    prepare, asked = task.prepare, asked_of(task, params, examples, "monitor", whole, part)
    if prepare is not None:
        examples = example_keys(0, 0, jax.numpy.arange(whole)), examples
        if (cut.by_part or cut.splits_prepare) and cut_matters(lambda _, pair: prepare(*pair), (), examples, part):
            return "what prepare makes of an example"
        examples = call_compiled(prepare, *examples)
    losses = alone(lambda *args: task.loss(*args)[0])
    return None if passes_once(task, asked, lambda: not cut_matters(losses, params, examples, part)) else _LOSS


def _fields(signal: Float[np.ndarray, "n"], trace: Float[np.ndarray, "n"]) -> dict[str, float | None]:
    """The statistics of n measured batches, means first."""
    if len(signal) == 0:
        return {"noise_signal": None, "noise_trace": None} | _interval_fields("noise_scale", Interval(math.nan, math.nan, math.nan, 0))
    scale = gradient_noise_scale(GradientStatistics(signal, trace))  # type: ignore[arg-type]  # on the host, in float64
    return {"noise_signal": float(signal.mean()), "noise_trace": float(trace.mean())} | _interval_fields("noise_scale", scale)


def _interval_fields(name: str, scale: Interval) -> dict[str, float | None]:
    """None where nothing was measured. One measurement has no interval: it may be anything, and never looks sure."""
    if math.isnan(scale.value):
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low = min(0.0, scale.value) if math.isnan(scale.low) else scale.low
    return {name: scale.value, f"{name}_low": low, f"{name}_high": math.inf if math.isnan(scale.high) else scale.high}


def _unprefixed(fields: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("noise_"): value for name, value in fields.items()}


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.copysign(math.inf, above)
