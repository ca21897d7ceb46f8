"""Which slots of a batch hold an example of its own, told to layers that couple examples.

A loss takes ``(params, batch)`` and nothing else, so the mask comes beside: it is set around the call of the loss and
read while the loss is traced.

Axes: M slots.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator

import jax
from jaxtyping import Array, Bool

_mask: contextvars.ContextVar[Bool[Array, "M"] | None] = contextvars.ContextVar("jaxbatch_example_mask", default=None)
# A function that is jitted by itself keeps what it once traced, the mask of that time included. A number that it has not
# seen makes it trace anew. A JAX that lacks this may hand such a function the mask of before, which ends in a leaked-tracer error.
_numbers = itertools.count(1)
_tracing = jax.make_user_context(0) if hasattr(jax, "make_user_context") else lambda number: contextlib.nullcontext()


@contextlib.contextmanager
def own_examples(mask: Bool[Array, "M"] | None) -> Iterator[None]:
    """Within it, :func:`example_mask` gives ``mask``: True where a slot holds an example of its own.

    ``None``: every slot does, and layers compute what they compute without a mask, bit for bit.

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


def example_mask() -> Bool[Array, "M"] | None:
    """The mask of the batch that is being computed, ``None`` where every slot holds an example of its own.

    For a layer of one's own that couples examples, as by a mean over the batch: on several devices that do not divide the
    batch some slots are fillers, real examples a second time, and such a mean must leave them out. On N devices the mask is
    that of the device's share (of its microbatch, where there are some), and a share may hold no example of its own at all.

    Example:
        >>> example_mask() is None
        True
    """
    return _mask.get()
