"""The optimizers of the studies, by name or from a file of the user's own, with weight decay and clipping: :func:`make_optimizer`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import optax
import optax.contrib

from experiments.harness.user_task import load_user_optimizer, title_of
from jaxbatch.gradients.run_lengths import for_length, takes_num_steps

Config = TypeVar("Config", bound="OptimizerFlags")
HALF_DECADES = tuple(float(f"{10 ** (power / 2):.3g}") for power in range(-10, 1))  # from 0.00001 to 1, two in each power of ten


class Kind(NamedTuple):
    """What is known of an optimizer."""

    make: Callable[..., Any]  # of the learning rate
    title: str
    code: str
    rates: tuple[float, ...]  # that studies try
    rate: float  # that studies take where all batch sizes have the same one
    momentum: float | None = None  # its usual one; None: it has no such argument
    decays: bool = False  # whether weight decay is its own affair; otherwise it is an L2 term of the gradient
    rule: Literal["linear", "sqrt"] = "linear"  # by which its rate grows with the batch


_ADAM: dict[str, Any] = {"rates": HALF_DECADES[2:9], "rate": 0.001, "rule": "sqrt"}
_SGD: dict[str, Any] = {"rates": HALF_DECADES[4:], "rate": 0.02}
_NESTEROV = functools.partial(optax.sgd, nesterov=True)
# Updates as long as the rate times the parameters, array by array, so that it takes SGD's rates; the paper multiplies by 0.001 besides.
_LARS = functools.partial(optax.lars, trust_coefficient=1.0)
KINDS = {
    "sgd": Kind(optax.sgd, "SGD", "optax.sgd", momentum=0.0, **_SGD),
    "momentum": Kind(optax.sgd, "SGD", "optax.sgd", momentum=0.9, **_SGD),
    "nesterov": Kind(_NESTEROV, "Nesterov's SGD", "optax.sgd", momentum=0.9, **_SGD),
    "rmsprop": Kind(optax.rmsprop, "RMSProp", "optax.rmsprop", **_ADAM),
    "adam": Kind(optax.adam, "Adam", "optax.adam", **_ADAM),
    "adamw": Kind(optax.adamw, "AdamW", "optax.adamw", decays=True, **_ADAM),
    "lion": Kind(optax.lion, "Lion", "optax.lion", HALF_DECADES[1:8], 0.0001, decays=True, rule="sqrt"),
    "lars": Kind(_LARS, "LARS", "optax.lars", HALF_DECADES[4:], 0.02, momentum=0.9, decays=True),
    "lamb": Kind(optax.lamb, "LAMB", "optax.lamb", HALF_DECADES[4:], 0.01, decays=True, rule="sqrt"),
    "muon": Kind(optax.contrib.muon, "Muon", "optax.contrib.muon", HALF_DECADES[3:10], 0.01, decays=True, rule="sqrt"),
}
_WITH_MOMENTUM = tuple(name for name, kind in KINDS.items() if kind.momentum is not None)


@dataclasses.dataclass(frozen=True)
class OptimizerFlags:
    """The flags of studies that train."""

    optimizer: str = "sgd"
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, as my_optimizer.py:make_optimizer."""
    momentum: float | None = None
    """Momentum of sgd, momentum, nesterov and lars, at least 0 and below 1. Default: 0.9; of sgd that of the study, 0.5 or 0."""
    weight_decay: float | None = None
    """Factor of the weight decay. It is an L2 term of the gradient where the optimizer has no weight decay of its own. Default: the optimizer's."""
    clip_norm: float | None = None
    """Largest norm of a gradient; a longer one is scaled down to it. Default: none."""

    sgd_momentum: ClassVar[float] = 0.0  # the study's own


def is_named(config: Any) -> bool:
    """Whether the optimizer has a name, and is none of the user's own.

    Example:
        >>> is_named(OptimizerFlags("adam")), is_named(OptimizerFlags("some/folder/mine.py:make"))
        (True, False)
    """
    return _name(config) in KINDS


def _name(config: Any) -> str:
    return getattr(config, "optimizer", None) or "sgd"


def kind_of(config: Any) -> Kind:
    """What is known of a configuration's optimizer. Of the user's own nothing is, so its grid of rates is wide.

    Example:
        >>> kind_of(OptimizerFlags("adam")).rates
        (0.0001, 0.000316, 0.001, 0.00316, 0.01, 0.0316, 0.1)
    """
    name = _name(config)
    if name not in KINDS and ":" not in name:
        raise ValueError(f"--optimizer {name} must be one of {', '.join(KINDS)}, or a function of your own, as my_optimizer.py:make_optimizer.")
    return KINDS.get(name) or Kind(load_user_optimizer(name), title_of(name), name.rpartition(":")[2], HALF_DECADES[2:], 0.01)


def quick_rates(config: Any) -> tuple[float, ...]:
    """Every second rate of the optimizer's grid, without its ends, for --quick.

    Example:
        >>> quick_rates(OptimizerFlags("adam"))
        (0.000316, 0.00316, 0.0316)
    """
    return kind_of(config).rates[1:-1:2]


def fill_optimizer(config: Config) -> Config:
    """Fills in the momentum, and checks the flags.

    Raises:
        ValueError: an optimizer that is not known, or whose file or function is wrong; a momentum outside [0, 1), or of an
            optimizer that has none; a negative weight decay; a norm that is not above 0.

    Example:
        >>> fill_optimizer(OptimizerFlags("lars")).momentum
        0.9
        >>> fill_optimizer(OptimizerFlags("adma"))
        Traceback (most recent call last):
        ValueError: --optimizer adma must be one of sgd, momentum, ..., muon, or a function of your own, as my_optimizer.py:make_optimizer.
    """
    kind = kind_of(config)
    if takes_num_steps(kind.make) and not getattr(config, "own_lengths", False):
        raise ValueError(f"--optimizer {config.optimizer} takes num_steps, which this study does not give: write a function of the rate alone.")
    if config.momentum is not None:
        if not 0 <= config.momentum < 1:
            raise ValueError(f"--momentum {config.momentum} must be at least 0 and below 1.")
        if kind.momentum is None:
            raise ValueError(f"--momentum {config.momentum} is for {', '.join(_WITH_MOMENTUM)}; --optimizer {config.optimizer} does not take it.")
    if config.weight_decay is not None and not (config.weight_decay >= 0 and math.isfinite(config.weight_decay)):
        raise ValueError(f"--weight-decay {config.weight_decay} must be at least 0 and finite.")
    if config.clip_norm is not None and not (config.clip_norm > 0 and math.isfinite(config.clip_norm)):
        raise ValueError(f"--clip-norm {config.clip_norm} must be above 0 and finite.")
    return dataclasses.replace(config, momentum=momentum_of(config))


def momentum_of(config: Any, name: str | None = None) -> float | None:
    """The momentum: the flag's, else the usual one; None for an optimizer that has none. ``name``: of this one in the study's place.

    Example:
        >>> momentum_of(OptimizerFlags("momentum")), momentum_of(OptimizerFlags("adam"))
        (0.9, None)
    """
    name = name or _name(config)
    usual = KINDS[name].momentum if name in KINDS else None
    if usual is None:
        return None
    given = getattr(config, "momentum", None)
    return given if given is not None else getattr(config, "sgd_momentum", 0.0) if name == "sgd" else usual


def heavy_ball(config: Any) -> float | None:
    """The momentum of SGD without or with heavy-ball momentum, whose steps keep to the gradient's scale; None for other optimizers.

    Example:
        >>> heavy_ball(OptimizerFlags("momentum")), heavy_ball(OptimizerFlags("nesterov"))
        (0.9, None)
    """
    return momentum_of(config) if _name(config) in ("sgd", "momentum") else None


def make_optimizer(config: Any, name: str | None = None, num_steps: Any = 1) -> Callable[[Any], Any]:
    """``rate -> optimizer``. The rate may be traced; for an optimizer by name also a schedule.

    Args:
        config: with the flags of :class:`OptimizerFlags`, of which all but ``optimizer`` may be missing.
        name: an optimizer in place of the configuration's, with its other flags.
        num_steps: updates of the run, for a function of the user's own that takes them.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = make_optimizer(OptimizerFlags("sgd", clip_norm=1.0, weight_decay=0.5))(0.1)
        >>> optimizer.update(jnp.array(3.0), optimizer.init(jnp.array(2.0)), jnp.array(2.0))[0].item()  # 1 + 0.5 * 2
        -0.2...
    """
    kind = KINDS[name] if name else kind_of(config)
    settings, decay, clip = _settings(config, kind, name), getattr(config, "weight_decay", None), getattr(config, "clip_norm", None)
    before = [] if clip is None else [optax.clip_by_global_norm(clip)]
    before += [optax.add_decayed_weights(decay)] if decay and not kind.decays else []

    def make(rate):
        optimizer = for_length(kind.make, num_steps)(rate, **settings)
        return optax.chain(*before, optimizer) if before else optimizer

    return make


def _settings(config: Any, kind: Kind, name: str | None = None) -> dict[str, float]:
    """The arguments of an optimizer besides the rate."""
    momentum, decay = momentum_of(config, name), getattr(config, "weight_decay", None)
    settings = {"momentum": momentum} if momentum or (momentum is not None and kind.momentum) else {}
    if decay is not None and kind.decays:
        settings["weight_decay"] = decay
        settings |= {"adam_weight_decay": decay} if kind.make is optax.contrib.muon else {}  # of the arrays that are no matrices
    return settings


def follow(config: Any, schedule: Callable[[Any], Any], start: Any, name: str | None = None) -> Any:
    """The optimizer whose rate follows a schedule.

    A function of the user's own gets a number, ``start``, and its updates are multiplied by schedule / ``start``.

    Args:
        config: see :func:`make_optimizer`.
        schedule: ``update -> rate``.
        start: a rate, which may be traced.
        name: see :func:`make_optimizer`.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = follow(OptimizerFlags(), lambda count: 0.5 / (1 + count), 0.5)
        >>> optimizer.update(jnp.array(1.0), optimizer.init(jnp.array(2.0)))[0].item()
        -0.5
    """
    make = make_optimizer(config, name)
    return make(schedule) if name or is_named(config) else optax.chain(make(start), optax.scale_by_schedule(lambda count: schedule(count) / start))


def optimizer_words(config: Any) -> str:
    """The optimizer as tables and figures name it.

    Example:
        >>> optimizer_words(OptimizerFlags("momentum")), optimizer_words(OptimizerFlags("adam", clip_norm=1.0, weight_decay=0.1))
        ('SGD with momentum 0.9', 'Adam, weight decay 0.1, gradients clipped to a norm of 1')
    """
    kind, momentum = KINDS.get(_name(config)), momentum_of(config)
    words = title_of(_name(config)) if kind is None else kind.title if momentum is None else f"{kind.title} with momentum {momentum:g}"
    decay, clip = getattr(config, "weight_decay", None), getattr(config, "clip_norm", None)
    words += f", weight decay {decay:g}" if decay else ""
    return words + (f", gradients clipped to a norm of {clip:g}" if clip else "")


def code(config: Any) -> str:
    """The function of the rate in Python; of the user's own its name.

    Example:
        >>> code(OptimizerFlags("momentum")), code(OptimizerFlags("adamw")), code(OptimizerFlags("mine.py:make"))
        ('functools.partial(optax.sgd, momentum=0.9)', 'optax.adamw', 'make')
        >>> code(OptimizerFlags("adam", clip_norm=1.0))
        '(lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))'
    """
    kind, decay, clip = KINDS.get(_name(config)), getattr(config, "weight_decay", None), getattr(config, "clip_norm", None)
    call, settings = _name(config).rpartition(":")[2] if kind is None else kind.code, {} if kind is None else _settings(config, kind)
    settings |= dict(kind.make.keywords) if kind is not None and isinstance(kind.make, functools.partial) else {}
    before = [] if clip is None else [f"optax.clip_by_global_norm({clip})"]
    before += [f"optax.add_decayed_weights({decay})"] if decay and not (kind is not None and kind.decays) else []
    arguments = "".join(f", {name}={value}" for name, value in settings.items())
    if before:
        return f"(lambda rate: optax.chain({', '.join(before)}, {call}(rate{arguments})))"
    return f"functools.partial({call}{arguments})" if arguments else call
