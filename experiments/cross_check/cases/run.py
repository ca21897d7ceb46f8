"""Runs the cross-check's computations on one backend and compares each with its truth."""

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.cross_check.cases.case import FORMS, ROUNDING, Case, length_bound, relative_difference
from jaxbatch.results.records import Record

TF32 = 2.0**-11  # unit roundoff of factors, where a platform rounds float32 to TF32 before it multiplies
LONGEST_KEPT = 65_536  # most numbers that a file keeps of an output; longer outputs are sampled evenly


class Output(NamedTuple):
    """The result of one computation: its record, and its numbers for a saved file."""

    record: Record
    kept: np.ndarray


def run_cases(cases: Iterable[Case], precisions: Sequence[str], seed: int) -> Iterator[Output]:
    """Runs every case in all its precisions and forms, on the default backend.

    Inputs are a function of the seed, the case's name and its size, so that cases may be added or removed.
    """
    for case in cases:
        for precision in precisions:
            if precision in case.precisions:
                with jax.enable_x64(precision == "float64"):
                    yield from _run_case(case, precision, seed)


def _run_case(case: Case, precision: str, seed: int) -> Iterator[Output]:
    kind = "float32" if precision == "default" or (case.parameters_float32 and precision == "bfloat16") else precision
    function, rounding = case.make(precision), ROUNDING[precision]
    # Only float32 runs in all forms: other precisions change the arithmetic, not how programs are built.
    forms = case.forms if precision == "float32" or len(case.precisions) == 1 else case.forms[-1:] if "jit" not in case.forms else ("jit",)
    key = hashlib.sha256(f"{case.name} {case.size}".encode()).digest()[:8]
    draws = [case.draw(np.random.default_rng([seed, n, *key])) for n in range(2 if {"scan", "vmap"} & set(forms) else 1)]
    given = [jax.tree.map(lambda leaf: _as_given(leaf, kind), draw) for draw in draws]
    exact = [jax.tree.map(_as_exact, draw) for draw in given]
    truths = [case.truth(*inputs) for inputs in exact]
    bounds = [_bound(case, (seed, n), rounding, *pair) for n, pair in enumerate(zip(exact, truths, strict=True))]
    del draws, exact  # a large network's weights in float64
    for form in forms:
        matmul = None if precision == "default" else "highest"
        with jax.default_matmul_precision(matmul) if matmul else contextlib.nullcontext():
            try:
                outs, failure = _run(function, form, given), ""
            except Exception as error:  # the backend cannot compute it: this counts as wrong, and the other cases run
                outs, failure = None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        case_fields = {"size": case.size, "number": case.number, "form": form, "precision": precision}
        case_fields |= {"backend": jax.default_backend(), "seed": seed, "failure": failure}
        for part in case.parts or ("",):
            name = {"computation": f"{case.name}: {part}" if part else case.name}
            take = (lambda tree, part=part: tree[part]) if part else (lambda tree: tree)
            limits = [take(bound) for bound in bounds]
            if outs is None:
                nothing = {"error": None, "bound": limits[0], "passed": False, "tf32": False, "where": "", "digest": ""}
                yield Output(name | case_fields | nothing, np.empty(0))
            else:
                pairs = [(take(out), take(truth)) for out, truth in zip(outs, truths, strict=False)]
                yield _hold(name | case_fields, pairs, limits, kind, precision == "default")


def _hold(case_fields: Record, pairs: Sequence[tuple], bounds: Sequence[float], kind: str, any_product: bool) -> Output:
    """Compares outputs with truths. If ``any_product``, the platform's own multiplication is not counted as wrong."""
    errors = [_error(*pair) for pair in pairs]
    # This form of the comparison never lets NaN pass.
    passed = all(error <= bound for error, bound in zip(errors, bounds, strict=False))
    passed = passed and all(_types_hold(out, kind) for out, _ in pairs)
    loose = 1 + 4 * TF32 / ROUNDING[kind].stored
    shares = [error / bound if bound else error for error, bound in zip(errors, bounds, strict=False)]
    worst = int(np.argmax(shares))
    flat = _flat([out for out, _ in pairs])
    comparison = {
        "error": errors[worst],
        "bound": bounds[worst],
        "passed": passed,
        "tf32": any_product and not passed and all(error <= loose * bound for error, bound in zip(errors, bounds, strict=False)),
        "where": "" if passed else _first_apart(*pairs[worst], bounds[worst]),
        "digest": hashlib.sha256(flat.tobytes()).hexdigest()[:16],
    }
    return Output(case_fields | comparison, flat[:: max(1, -(-len(flat) // LONGEST_KEPT))].astype(np.float64))


def _as_given(leaf: np.ndarray, kind: str):
    """An input as the machine gets it: floats in the precision, integers unchanged."""
    return jnp.asarray(leaf, kind) if np.issubdtype(np.asarray(leaf).dtype, np.floating) else jnp.asarray(leaf)


def _as_exact(leaf) -> np.ndarray:
    """The rounded input in float64."""
    array = np.asarray(leaf)
    return (
        array if np.issubdtype(array.dtype, np.integer) else np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, np.float64)
    )


_known_bounds: dict[tuple, Any] = {}  # for networks, bounds take longer than the truth; "default" uses those of float32


def _bound(case: Case, draw: tuple, rounding, inputs, truth) -> Any:
    if case.bound is None:
        return length_bound(rounding, case.number)
    key = (case.name, case.size, draw, rounding)
    if key not in _known_bounds:
        _known_bounds[key] = case.bound(rounding, inputs, truth)
    return _known_bounds[key]


@functools.cache
def _compiled(function, form: str):
    if form == "eager":
        return function
    if form == "jit":
        return jax.jit(function)
    if form == "vmap":
        return jax.jit(jax.vmap(function))
    return jax.jit(lambda *stacked: lax.scan(lambda carry, inputs: (carry, function(*inputs)), 0, stacked)[1])


def _run(function, form: str, given: Sequence[tuple]) -> list[Any]:
    """The outputs for the first draw of inputs, or for both draws if the form takes several at once."""
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMS)}.")
    program = _compiled(function, form)
    if form in ("eager", "jit"):
        return [jax.device_get(program(*jax.tree.map(lambda leaf: leaf + 0, given[0])))]  # a copy: inputs may be reused
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
    both = jax.device_get(program(*stacked))
    return [jax.tree.map(lambda leaf, n=n: leaf[n], both) for n in range(len(given))]


def _error(out: Any, truth: Any) -> float:
    """The largest relative error of the outputs; for parameters and gradients, the error of all leaves together."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), out)
    if isinstance(truth, dict):
        return relative_difference(wide, truth)
    leaves, exact = jax.tree.leaves(wide), jax.tree.leaves(truth)
    return max((relative_difference(a, b) for a, b in zip(leaves, exact, strict=True)), key=lambda error: (error != error, error))


def _types_hold(out: Any, kind: str) -> bool:
    """Whether floating-point outputs, including networks' parameters, have the promised precision."""
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(out) if not np.issubdtype(leaf.dtype, np.integer)}
    return kinds <= ({kind, "float32"} if kind == "bfloat16" else {kind})


def _first_apart(out: Any, truth: Any, bound: float) -> str:
    """The first element whose error is above the bound, as leaf and index."""
    for (path, leaf), exact in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(truth), strict=True):
        leaf, exact = np.atleast_1d(np.asarray(leaf, np.float64)), np.atleast_1d(np.asarray(exact, np.float64))
        size = np.sqrt(np.mean(exact**2))
        bad = np.argwhere(~(np.abs(leaf - exact) <= max(bound, 1e-300) * np.maximum(np.abs(exact), size)))
        if len(bad):
            index = tuple(bad[0].tolist())
            return f"{jax.tree_util.keystr(path) or 'output'}{list(index)} is {leaf[index]:.9g} and should be {exact[index]:.9g}"
    return "none, but the error of all elements together is"


def _flat(outs: Sequence[Any]) -> np.ndarray:
    leaves = [np.asarray(leaf).ravel() for out in outs for leaf in jax.tree.leaves(out)]
    return np.concatenate([leaf.astype(np.float32) if str(leaf.dtype) == "bfloat16" else leaf for leaf in leaves])
