"""Every optimizer of optax and optax.contrib in fit, checkpoints and advise: the table of docs/optimizers.md.

    python scripts/optimizer_table.py            runs them all and writes the table (some minutes)
    python scripts/optimizer_table.py adam sam   prints the rows of these

The factories are found in optax. One that is neither made by a rule nor listed here is an error, so that none of a new version is left out.
"""

import inspect
import pathlib
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbatch as jb
from jaxbatch.gradients.updates import Optimizer
from jaxbatch.states import pack

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "optimizers.md"
BLOCK = re.compile(r"<!-- optimizers -->\n.*<!-- end of optimizers -->", re.DOTALL)
RATE = 0.01
RULES = {True: "{name}(rate)", False: "optax.chain({name}(), optax.scale_by_learning_rate(rate))"}  # with a learning rate, or without arguments
BEFORE_SGD = "optax.chain({name}({arguments}), optax.sgd(rate))"
ARGUMENTS = {  # of those that go before an optimizer
    "adaptive_grad_clip": "0.1",
    "add_noise": "0.01, 0.55, key=0",
    "apply_every": "2",
    "clip": "1.0",
    "clip_by_block_rms": "1.0",
    "clip_by_global_norm": "1.0",
    "conditionally_transform": "optax.clip(1.0), lambda step: step < 2",
    "contrib.differentially_private_aggregate": "1.0, 0.1, key=0",
    "contrib.hutchinson_estimator_diag_hessian": "",
    "ema": "0.9",
    "monitor": "{'norm': optax.tree.norm}",
    "snapshot": "'norm', optax.tree.norm",
    "stateless": "lambda gradient, params: gradient",
    "stateless_with_tree_map": "lambda gradient, params: gradient",
    "trace": "0.9",
}
SPECIAL = {  # the other ones that no rule makes
    "MultiSteps": ["optax.MultiSteps(optax.sgd(rate), 2)"],
    "apply_if_finite": ["optax.apply_if_finite(optax.adam(rate), 3)"],
    "chain": ["optax.chain(optax.clip(1.0), optax.sgd(rate))"],
    "conditionally_mask": ["optax.conditionally_mask(optax.sgd(rate), lambda step: step % 2 == 0)"],
    "contrib.dpsgd": ["optax.contrib.dpsgd(rate, 1.0, 0.1, seed=0)"],
    "contrib.galore": ["optax.contrib.galore(rate, rank=2)"],
    "contrib.mechanize": ["optax.contrib.mechanize(optax.sgd(rate))"],
    "contrib.reduce_on_plateau": ["optax.chain(optax.sgd(rate), optax.contrib.reduce_on_plateau(patience=1))"],
    "contrib.sam": [
        "optax.contrib.sam(optax.sgd(rate), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))",
        "optax.contrib.sam(optax.sgd(rate), optax.sgd(0.05), opaque_mode=True)",
    ],
    "contrib.scale_by_galore": ["optax.chain(optax.contrib.scale_by_galore(rank=2), optax.scale_by_learning_rate(rate))"],
    "contrib.schedule_free": ["optax.contrib.schedule_free(optax.sgd(rate), rate)"],
    "contrib.split_real_and_imaginary": ["optax.contrib.split_real_and_imaginary(optax.adam(rate))"],
    "flatten": ["optax.flatten(optax.adam(rate))"],
    "freeze": ["optax.chain(optax.sgd(rate), optax.freeze({'w': True, 'b': False}))"],
    "inject_hyperparams": ["optax.inject_hyperparams(optax.adam)(learning_rate=rate)"],
    "inject_stateful_hyperparams": ["optax.inject_stateful_hyperparams(optax.adam)(learning_rate=rate)"],
    "keep_params_nonnegative": ["optax.chain(optax.sgd(rate), optax.keep_params_nonnegative())"],
    "lbfgs": ["optax.lbfgs(rate)", "optax.lbfgs(rate, linesearch=None)"],
    "lookahead": ["optax.lookahead(optax.sgd(rate), 2, 0.5)"],
    "masked": ["optax.masked(optax.sgd(rate), {'w': True, 'b': True})"],
    "measure_with_ema": ["optax.chain(optax.monitor({'norm': optax.measure_with_ema(optax.tree.norm, 0.9)}), optax.sgd(rate))"],
    "multi_transform": ["optax.multi_transform({'one': optax.sgd(rate), 'other': optax.adam(rate)}, {'w': 'one', 'b': 'other'})"],
    "named_chain": ["optax.named_chain(('clip', optax.clip(1.0)), ('sgd', optax.sgd(rate)))"],
    "partition": ["optax.partition({'one': optax.sgd(rate), 'other': optax.adam(rate)}, {'w': 'one', 'b': 'other'})"],
    "polyak_sgd": ["optax.polyak_sgd(rate)"],
    "scale": ["optax.scale(-rate)"],
    "scale_by_backtracking_linesearch": ["optax.chain(optax.sgd(rate), optax.scale_by_backtracking_linesearch(5))"],
    "scale_by_polyak": ["optax.chain(optax.sgd(rate), optax.scale_by_polyak())"],
    "scale_by_rprop": ["optax.chain(optax.scale_by_rprop(rate), optax.scale(-1.0))"],
    "scale_by_schedule": ["optax.scale_by_schedule(lambda step: -rate)"],
    "scale_by_zoom_linesearch": ["optax.chain(optax.sgd(rate), optax.scale_by_zoom_linesearch(5))"],
    "with_extra_args_support": ["optax.with_extra_args_support(optax.sgd(rate))"],
    "selective_transform": ["optax.selective_transform(optax.sgd(rate), freeze_mask={'w': True, 'b': False})"],
}
NO_OPTIMIZERS = {  # a schedule with a state; functions without a type of their result that make something else
    *("WrappedSchedule", "bias_correction", "contrib.schedule_free_eval_params", "matrix_inverse_pth_root", "sigmoid_binary_cross_entropy"),
    *("update_infinity_moment", "update_moment", "update_moment_per_elem_norm"),
}
NOTES = {
    "MultiSteps": "changes the parameters at every second call only; `microbatch_size` accumulates within an update",
    "apply_if_finite": "goes on over batches that are not finite, while the state is finite",
    "contrib.sam": "two calls make a step, at the first of which the parameters are moved away: the recipe has `eval_params`",
    "contrib.schedule_free": "`eval_params=optax.contrib.schedule_free_eval_params`",
    "contrib.schedule_free_adamw": "`eval_params=optax.contrib.schedule_free_eval_params`",
    "contrib.schedule_free_sgd": "`eval_params=optax.contrib.schedule_free_eval_params`",
}


class Row(NamedTuple):
    """What came of an optimizer."""

    name: str
    made_by: str  # Python, of a rate
    fit: str  # yes or no, as the next two
    checkpoints: str
    advise: str
    remark: str


def factories() -> list[str]:
    """The public functions and classes of optax and optax.contrib that make an optimizer or a part of one, by name."""
    names = []
    for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
        for name, value in vars(module).items():
            if not name.startswith("_") and f"{prefix}{name}" not in NO_OPTIMIZERS and _makes_optimizer(value):
                names.append(f"{prefix}{name}")
    return sorted(names)


def _makes_optimizer(value: Any) -> bool:
    if isinstance(value, type):
        return hasattr(value, "init") and hasattr(value, "update") and not issubclass(value, tuple)
    if not callable(value) or not hasattr(value, "__module__") or not (value.__module__ or "").startswith(("optax", "functools")):
        return False
    returns = inspect.signature(value).return_annotation
    return returns is inspect.Signature.empty or "GradientTransformation" in str(returns)


def made_by(name: str) -> list[str]:
    """The Python that makes it for a rate; in several forms where they differ.

    Raises:
        ValueError: it needs arguments, and none are given here.
    """
    if name in SPECIAL:
        return SPECIAL[name]
    if name in ARGUMENTS:
        return [BEFORE_SGD.format(name=f"optax.{name}", arguments=ARGUMENTS[name])]
    parameters = inspect.signature(eval(f"optax.{name}", {"optax": optax})).parameters
    needed = {key for key, value in parameters.items() if value.default is value.empty} - {"learning_rate"}
    if needed:
        raise ValueError(f"optax.{name} needs {', '.join(sorted(needed))}: say here how it is made, or that it is no optimizer.")
    return [RULES["learning_rate" in parameters].format(name=f"optax.{name}")]


def _task() -> jb.Task:
    """Linear regression on 16 examples, with a matrix and a vector as parameters."""
    x, y = jax.random.normal(jax.random.key(0), (16, 4)), jax.random.normal(jax.random.key(1), (16, 3))
    loss_fn = lambda params, batch: ((batch[0] @ params["w"] + params["b"][None] - batch[1]) ** 2).sum(-1)
    init = lambda key: {"w": 0.5 * jax.random.normal(key, (4, 3)), "b": jnp.full(3, 0.1)}
    return jb.Task(init, loss_fn, lambda params, batch: {"loss": loss_fn(params, batch)}, (x, y), (x, y))


TASK = _task()
TRAINING = TASK._replace(test_data=None)
BATCH_SIZE = 4


def by_hand(optimizer: Any) -> Any:
    """The parameters after an epoch, by the loop that optax documents."""
    params = TASK.init(jax.random.fold_in(jax.random.key(0), 0x696E6974))
    state, order = optimizer.init(params), np.asarray(jb.epoch_order(0, 0, 16)).reshape(-1, BATCH_SIZE)

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(lambda p: TASK.loss_fn(p, batch).mean())(params)
        try:
            updates, state = optimizer.update(gradient, state, params, value=loss)
        except TypeError:
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for index in order:
        params, state = step(params, state, jax.tree.map(lambda leaf: leaf[index], TASK.train_data))
    return params


def measure(name: str) -> list[Row]:
    """The rows of an optimizer, one for each form in which it is made."""
    return [_measure(name, text) for text in made_by(name)]


def _measure(name: str, text: str) -> Row:
    make: Callable[[Any], Optimizer] = eval(f"lambda rate: {text}", {"optax": optax})
    config = jb.FitConfig(make(RATE), BATCH_SIZE, evaluations_per_epoch=2)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            *_, last = jb.fit_with_checkpoints(TRAINING, config, folder)
        except ValueError as error:
            return Row(name, text, "no", "no", _refused_by_advise(make), str(error).removeprefix("optimizer: ").partition(". ")[0].rstrip("."))
        for one, other in zip(jax.tree.leaves(last["state"].params), jax.tree.leaves(by_hand(config.optimizer)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=name)
        shutil.rmtree(f"{folder}/step_4")  # as if the run had been killed before
        (again,) = jb.fit_with_checkpoints(TRAINING, config, folder)
        assert again["batches"] == 4, name
        same = all(a.tobytes() == b.tobytes() for a, b in zip(pack(last["state"]).values(), pack(again["state"]).values(), strict=True))
    advice = _advised(make)
    (probe,) = advice.probes
    assert probe.learning_rate == RATE, probe
    np.testing.assert_allclose(probe.value, TASK.loss_fn(last["state"].params, TASK.test_data).mean(), rtol=1e-4, err_msg=name)
    assert not last["diverged"] and not probe.diverged, name
    return Row(name, text, "yes", "yes" if same else "other bits", "yes", NOTES.get(name, ""))


def _advised(make: Callable[[Any], Optimizer]) -> jb.Advice:
    """Advice from one run of an epoch, which is the one that fit makes."""
    rates, throughput = (RATE, RATE * 3, RATE * 10), jb.fit_throughput({4: [0.01] * 3, 8: [0.02] * 3})
    settings = {"batch_sizes": [BATCH_SIZE], "learning_rates": rates, "max_probes": 1, "evaluations_per_epoch": 1, "measure_noise": False}
    return jb.advise(TASK, "loss<1e-9", optimizer=make, longest=jb.epochs(1), throughput=throughput, on_progress=None, **settings)


def _refused_by_advise(make: Callable[[Any], Optimizer]) -> str:
    try:
        _advised(make)
    except ValueError as error:
        return "no" if str(error).startswith("optimizer") and "\n" not in str(error) else f"no: {error}"
    return "yes"


def write(rows: list[Row]) -> str:
    """The table in Markdown, with what made it."""
    lines = [f"optax {optax.__version__}, {len({row.name for row in rows})} of its functions.", ""]
    lines += ["| of optax | made by | `fit` | checkpoints | `advise` | |", "|---|---|---|---|---|---|"]
    lines += [f"| `{row.name}` | `{row.made_by}` | {row.fit} | {row.checkpoints} | {row.advise} | {row.remark} |" for row in rows]
    return "<!-- optimizers -->\n" + "\n".join(lines) + "\n<!-- end of optimizers -->"


def read() -> tuple[str, list[Row]]:
    """The version and the rows of the page."""
    text = BLOCK.search(PAGE.read_text(encoding="utf-8"))[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| `")]
    version = text.split("optax ", 2)[1].split(",")[0]
    return version, [Row(cells[0].strip("| `"), cells[1].strip("`"), *cells[2:5], cells[5].removesuffix("|").strip()) for cells in rows]


if __name__ == "__main__":
    wanted = sys.argv[1:]
    if wanted:
        print("\n".join(str(tuple(row)) for name in wanted for row in measure(name)))
    else:
        table = write([row for name in factories() for row in measure(name)])
        PAGE.write_text(BLOCK.sub(lambda _: table, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
