"""Arrays that a function closes over: as constants of its program they would be compiled, so they become arguments.

A pretrained model is then not part of the program, and functions that differ in such arrays alone share one. Python's numbers, and
what jitted functions inside close over, stay in the program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal


def call_compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """``jax.jit(function)(*arguments)``, but arrays that ``function`` closes over become arguments of the program.

    Otherwise such arrays, for example the parameters of a pretrained model, would be constants in the program and be compiled.

    Example:
        >>> pretrained = jax.numpy.ones(3)
        >>> call_compiled(lambda scale: scale * pretrained, 2.0)
        Array([2., 2., 2.], dtype=float32)
    """
    run, constants = take_out_constants(function, *arguments)
    return jax.jit(run)(constants, *arguments)


def take_out_constants(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], list[Any]]:
    """``run(constants, *arguments)`` and the arrays ``constants`` that ``function`` closes over.

    Arrays of NumPy are copied to the default device once: who changes them later changes no program, and no call moves them again. Those
    that a jitted function inside closes over are not found; they stay in the program.

    Example:
        >>> pretrained = jax.numpy.ones(3)
        >>> run, constants = take_out_constants(lambda scale: scale * pretrained, 2.0)
        >>> run(constants, 3.0), len(constants)
        (Array([3., 3., 3.], dtype=float32), 1)
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)

    def run(constants, *arguments):
        leaves = jax.core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    with jax.ensure_compile_time_eval():
        return run, [constant if isinstance(constant, jax.Array) else _of_jax(constant) for constant in closed.consts]


def _of_jax(constant: Any) -> Any:
    """A copy of an array of NumPy; anything else, such as a reference to an array that programs change, as it is."""
    return jnp.array(np.asarray(constant), copy=True) if hasattr(constant, "__array__") else constant


def copies_on(device: jax.Device, constants: list[Any]) -> list[Any]:
    """Copies of arrays on a device: a program of this device takes them, and the memory of its other arguments may be reused.

    Example:
        >>> table = jax.numpy.ones(2)
        >>> (copy,) = copies_on(jax.devices()[0], [table])
        >>> copy.unsafe_buffer_pointer() == table.unsafe_buffer_pointer(), copy.tolist()
        (False, [1.0, 1.0])
    """
    with jax.ensure_compile_time_eval():
        return [jax.device_put(jnp.copy(one), device) if isinstance(one, jax.Array) else one for one in constants]


def open_jitted(closed: Any) -> tuple[Any, list[Any]]:
    """The operations inside and their constants, where all of a traced function is one call of a jitted function.

    Example:
        >>> closed = jax.make_jaxpr(jax.jit(lambda x: 2 * x + 1))(1.0)
        >>> [len(jaxpr.eqns) for jaxpr in (closed.jaxpr, open_jitted(closed)[0])]
        [1, 2]
    """
    jaxpr, constants = closed.jaxpr, closed.consts
    while len(jaxpr.eqns) == 1 and "jaxpr" in jaxpr.eqns[0].params and jaxpr.eqns[0].primitive.name in ("jit", "pjit"):
        (call,) = jaxpr.eqns
        inner, same = call.params["jaxpr"], list(jaxpr.outvars) == list(call.outvars)
        if not same or any(isinstance(one, Literal) for one in call.invars):
            break
        order = [(*jaxpr.constvars, *jaxpr.invars).index(one) for one in call.invars]
        if order != list(range(len(jaxpr.constvars) + len(jaxpr.invars))):
            break
        names = inner.jaxpr.invars
        first = len(jaxpr.constvars)
        constants = [*inner.consts, *constants]
        jaxpr = inner.jaxpr.replace(constvars=[*inner.jaxpr.constvars, *names[:first]], invars=list(names[first:]))
    return jaxpr, constants


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without the jit around it, traced no more often; what it closes over is a constant of the program around it.

    So :func:`take_out_constants` finds these constants inside a loop, too, where it sees into no jitted function.

    Example:
        >>> table = jax.numpy.arange(3.0)
        >>> add = jax.jit(lambda x: x + table)
        >>> many = lambda one: jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 2, lambda _, x: one(x), x))(table)
        >>> [len(many(one).consts) for one in (add, inlined(add))]
        [0, 1]
    """

    def call(*arguments):
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return function(*arguments)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        jaxpr, constants = open_jitted(closed)
        leaves = jax.core.eval_jaxpr(jaxpr, constants, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return call
