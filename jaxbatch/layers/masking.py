"""The mask of a batch, for layers that couple examples. It is False for *fillers*: copies of examples that must not count.

A loss takes only ``(params, batch)``, so the mask is not an argument. It is set before the loss is called and read while the
loss is traced.

Axes: M slots.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator

import jax
from jaxtyping import Array, Bool

_mask: contextvars.ContextVar[Bool[Array, "M"] | None] = contextvars.ContextVar("jaxbatch_example_mask", default=None)
# A function that is jitted separately keeps its old trace, with the mask of that time. A new number as context makes it trace
# again. A JAX version without such contexts may use the old mask in such a function, which gives a leaked-tracer error.
_numbers = itertools.count(1)
_tracing = jax.make_user_context(0) if hasattr(jax, "make_user_context") else lambda number: contextlib.nullcontext()


@contextlib.contextmanager
def own_examples(mask: Bool[Array, "M"] | None) -> Iterator[None]:
    """Within this context, :func:`example_mask` returns ``mask``: True where a slot holds an example, False for fillers.

    ``None`` means that there are no fillers; then layers compute the same bits as without this context.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbatch.layers import BatchNorm
        >>> x = jnp.array([1.0, 3.0, 100.0]).reshape(3, 1, 1, 1)
        >>> norm = BatchNorm()
        >>> variables = norm.init(jax.random.key(0), x, train=True)
        >>> with own_examples(jnp.array([True, True, False])):
        ...     _, found = norm.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> found["batch_stats"]["mean"].item()
        2.0
    """
    if mask is None and _mask.get() is None:
        yield
        return
    token = _mask.set(mask)
    try:
        with _tracing(next(_numbers)):
            yield
    finally:
        _mask.reset(token)


_held: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("jaxbatch_held_moments", default=None)


@contextlib.contextmanager
def held_moments() -> Iterator[list[str]]:
    """Within this context batch normalisation takes constants in place of a batch's moments, so that what else couples examples shows.

    Yields:
        A list to which every such layer adds its kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbatch.layers import BatchNorm
        >>> x = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
        >>> variables = BatchNorm().init(jax.random.key(0), x, train=True)
        >>> with held_moments() as layers:
        ...     held, _ = BatchNorm(epsilon=0.0).apply(variables, x, train=True, mutable=["batch_stats"])
        >>> held.ravel().tolist(), layers
        ([1.0, 3.0], ['BatchNorm'])
    """
    layers: list[str] = []
    token = _held.set(layers)
    try:
        with _tracing(next(_numbers)):
            yield layers
    finally:
        _held.reset(token)


def holds_moments(kind: str) -> bool:
    """Whether a layer of this kind takes constants now, see :func:`held_moments`."""
    layers = _held.get()
    if layers is not None:
        layers.append(kind)
    return layers is not None


def example_mask() -> Bool[Array, "M"] | None:
    """The mask of the batch that is being computed, False for fillers; ``None`` if there are no fillers.

    Use it in your own layers that couple examples, for example by a mean over the batch. If the number of devices does not
    divide the batch, some slots are fillers (copies of real examples), and the mean must leave them out. The mask is that of
    the device's share, or of its microbatch if there are microbatches. A share may consist of fillers only.

    Example:
        >>> example_mask() is None
        True
    """
    return _mask.get()
