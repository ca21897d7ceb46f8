"""Hints in errors: what a task's functions get, and how parameters are handed in from each neural network library.

No library is imported here: an object is recognised by the modules in which its classes are defined.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

_LIBRARIES = ("flax.nnx", "flax.linen", "haiku", "equinox", "torch", "tensorflow", "keras")
_REMEDIES = {
    "flax.nnx": "let init return nnx.split(model, nnx.Param, ...)[1], and loss_fn call nnx.merge(graphdef, params, rest)",
    "flax.linen": "let init return model.init(key, example)['params'], and loss_fn call model.apply({'params': params}, ...)",
    "haiku": "let init return transformed.init(key, example), and loss_fn call transformed.apply(params, ...)",
    "equinox": "let init return equinox.partition(model, equinox.is_inexact_array)[0], and loss_fn call equinox.combine(params, static)",
    "torch": "jaxbatch differentiates JAX functions, so write the model in JAX (Flax, Haiku, Equinox); a tensor's numbers come over by .numpy()",
    "tensorflow": "jaxbatch differentiates JAX functions, so write the model in JAX; a tensor's numbers come over by .numpy()",
    "keras": "jaxbatch differentiates JAX functions: let init return model.trainable_variables' arrays, and loss_fn call model.stateless_call",
}
_NO_LIBRARY = "keep it out of params, as a constant that loss_fn closes over"
_PAGE = "docs/recipes.md shows it"
_WITH_RECIPES = _LIBRARIES[:4]


def library_of(value: Any) -> str | None:
    """The neural network library of an object's class, or of one that it inherits from.

    Example:
        >>> from flax import linen
        >>> library_of(linen.Dense(3)), library_of(jax.numpy.ones(3))
        ('flax.linen', None)
    """
    for module in (kind.__module__ for kind in type(value).__mro__):
        for library in _LIBRARIES:
            if module == library or module.startswith(f"{library}."):
                return library
    return None


def how_to_hand_in(value: Any, params: PyTree = None) -> str:
    """How the parameters of the library that ``value`` is from are handed in; if it is from none, that of a node of ``params``.

    Example:
        >>> how_to_hand_in(3, {"w": 3})
        'keep it out of params, as a constant that loss_fn closes over.'
    """
    nodes = [value, *jax.tree.leaves(params, is_leaf=lambda node: library_of(node) is not None)]
    library = next((name for name in map(library_of, nodes) if name), None)
    if library is not None:
        return f"{_REMEDIES[library]}{f'; {_PAGE}' if library in _WITH_RECIPES else ''}."
    pair = isinstance(params, tuple) and len(params) == 2 and all(isinstance(part, Mapping) for part in params)
    return _NO_LIBRARY + (f". If init returned (params, model_state), the task needs update_model_state; {_PAGE}." if pair else ".")


def no_linen_module(model: Any) -> str:
    """The error for a model that should be a Flax Linen module.

    Example:
        >>> no_linen_module(3)
        'model=int is not a flax.linen module. Make a jaxbatch.Task of it: docs/own_model.md shows how.'
    """
    hint = how_to_hand_in(model) if library_of(model) else "docs/own_model.md shows how."
    return f"model={type(model).__name__} is not a flax.linen module. Make a jaxbatch.Task of it: {hint}"


def check_nothing_untrained(params: PyTree) -> None:
    """Refuses floating-point leaves that a library keeps beside the parameters; an optimizer would change them without a word.

    Raises:
        ValueError: an NNX variable that is no ``nnx.Param``, or the collection ``batch_stats`` of Flax Linen.

    Example:
        >>> check_nothing_untrained({"params": {"w": 1.0}, "batch_stats": {"mean": 0.0}})
        Traceback (most recent call last):
        ValueError: params['batch_stats'] are running moments and not learned: let init return (variables['params'],
        variables['batch_stats']), and give the task update_model_state; docs/recipes.md shows it.
    """
    if isinstance(params, Mapping) and {"params", "batch_stats"} <= set(params):
        raise ValueError(
            "params['batch_stats'] are running moments and not learned: let init return (variables['params'], "
            f"variables['batch_stats']), and give the task update_model_state; {_PAGE}."
        )
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: "flax.nnx.variablelib" in _modules(node))
    for path, node in nodes:
        kinds = [kind.__name__ for kind in type(node).__mro__] if "flax.nnx.variablelib" in _modules(node) else ["Param"]
        if "Param" not in kinds:
            raise ValueError(f"params{jax.tree_util.keystr(path)} is an nnx.{kinds[0]} and not learned: {how_to_hand_in(node)}")


def _modules(value: Any) -> set[str]:
    return {kind.__module__ for kind in type(value).__mro__}


def call_function(name: str, function: Any, *arguments: Any, gets: str) -> Any:
    """Calls a function of the user's. One that expects other arguments raises an error that says what it gets.

    Raises:
        ValueError: ``function`` cannot be called, takes another number of arguments, or unpacks one into the wrong number of values.

    Example:
        >>> call_function("loss_fn", lambda params, state, batch: 0, {"w": 1.0}, (2, 3), gets="params alone and a batch")
        Traceback (most recent call last):
        ValueError: loss_fn takes (params, state, batch). It gets params alone and a batch: a dict of 'w', and a tuple of 2;
        docs/own_model.md lists what each function gets.
    """
    if not callable(function) or _is_model(function):
        kind = type(function).__name__
        hint = f": {how_to_hand_in(function)}" if library_of(function) else "."
        raise ValueError(f"{name}={kind} is not a function{hint}")
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        reason = _misunderstanding(function, arguments, error)
        if reason is None:
            raise
        given = ", and ".join(describe(argument) for argument in arguments)
        raise ValueError(f"{name}{reason}. It gets {gets}: {given}; docs/own_model.md lists what each function gets.") from error


def _is_model(value: Any) -> bool:
    """Whether a value is a neural network, which can be called, too. Equinox wraps functions as its modules, so none of them counts."""
    names = {kind.__name__ for kind in type(value).__mro__}
    return "Module" in names and library_of(value) not in (None, "equinox")


def _misunderstanding(function: Callable, arguments: tuple, error: Exception) -> str | None:
    """What a function expects that is not so, if that is why it raised an error."""
    if isinstance(error, ValueError):
        return f": {error}" if "values to unpack" in str(error) and "\n" not in str(error) else None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return None
    try:
        signature.bind(*arguments)
    except TypeError:
        return f" takes ({', '.join(signature.parameters)})"
    return None


def describe(tree: Any) -> str:
    """A pytree in a few words, by its outermost container.

    Example:
        >>> describe({"b": 0, "a": 1}), describe((1, 2)), describe(jax.numpy.ones((3, 2)))
        ("a dict of 'b', 'a'", 'a tuple of 2', 'an array of shape (3, 2)')
    """
    kind = type(tree).__name__
    if isinstance(tree, Mapping):
        keys = [repr(key) for key in tree]
        return f"a {kind} of {', '.join(keys[:6])}{', …' if len(keys) > 6 else ''}"
    if isinstance(tree, tuple | list):
        return f"a {kind} of {', '.join(tree._fields) if hasattr(tree, '_fields') else len(tree)}"
    return f"an array of shape {tree.shape}" if hasattr(tree, "shape") else f"a {kind}"
