"""Every public function × every argument × wrong kinds: a ValueError of one line that names the argument."""

import inspect
import time
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.kinds import check_kind
from jaxbatch.ranges import RANGES
from tests.conftest import shapes_unchecked

LOSS = lambda w, x: 0.5 * (x - w) ** 2
X = jnp.arange(8.0)
TASK = jb.Task(lambda key: jnp.array(0.0), LOSS, lambda w, x: {"loss": LOSS(w, x)}, X, X)
SGD = optax.sgd(0.1)
THINGS = {
    "None": None,
    "text": "much",
    "fraction": 2.5,
    "whole": 3,
    "bool": True,
    "list": [None],
    "numbers": [1.0, 2.0],
    "thing": object(),
    "dict": {},
    "function": lambda: 3,
}
FUNCTIONS = {name: getattr(jb, name) for name in jb.__all__ if inspect.isfunction(getattr(jb, name))}
ELSEWHERE = {  # other tests go through their arguments
    "advise": "test_advise_request.py",
    **dict.fromkeys(("find_largest_batch", "max_batch_size", "memory_plan", "memory_profile"), "test_memory_arguments.py"),
}
NO_CHECK = {"program_memory", "skip_absent_accelerators", "track"}  # of a compiled program, the machine's own folder, any records
ANY = {  # any tree of arrays, or any value
    *("settings", "state", "vector", "other", "gradient", "reference", "a", "b", "statistic", "put", "step", "data"),
}
WHOLE, NUMBER, TEXT, FUNCTION = {"whole"}, {"whole", "fraction"}, {"text"}, {"function"}
BY_KIND = """
    whole: batch_size base_batch_size length microbatch_size num_groups num_examples num_epochs num_steps num_samples every keep depth count examples
    whole: max_batch_size chunk_size num_classes tokens_per_example sequence_length vocab_size image_size num_workers ahead num_devices rounds
    whole: max_probes jobs resamples seed epoch cut_to_measure evaluations_per_epoch train_tokens
    whole fraction: amount learning_rate momentum max_norm tolerance growth decay init base_lr low end period margin temperature label_smoothing
    whole fraction: seconds_per_timing budget warmup_init start scale num_parameters num_tokens compute loss full_runs
    function: loss_fn function metrics_fn make_optimizer prepare prepare_test update_model_state eval_params apply augment shape on_progress encode
    bool: coupled has_aux by_part above loading nonnegative
    text: name metric data_dir checkpoint_dir folder method rule partial parallel loop runs same_label axis goal
    fraction whole bool numbers: logits labels first second features kernel bias tokens vectors order numerators denominators values points
    numbers: learning_rates mean std
    nothing: seeds batch_sizes factors devices
    nothing: key batch task config dataset model optimizer duration warmup monitor statistics train validation target
    nothing: within horizon longest throughput known
    function: on_ending on_run run
    text whole fraction: memory
    list numbers dict text: batches
    None dict list fraction numbers: params
    whole function: schedule
    dict: sizes results updates after
    list numbers: texts
"""
MAY_BE = {}  # what of the things is no mistake, by argument
for kinds, _, arguments in (line.strip().partition(": ") for line in BY_KIND.strip().splitlines()):
    MAY_BE.update(dict.fromkeys(arguments.split(), frozenset(kinds.split()) - {"nothing"}))
OWN = {  # where a name means another thing
    ("fit_throughput", "rounds"): {"dict"},
    ("unit_length", "axis"): WHOLE,
    **{(name, "on_progress"): {"function", "None"} for name in ("advise_within", "advise_runs", "advise_runs_within")},
    ("advise_runs", "known"): {"dict"},
    ("advise_runs", "objective"): TEXT,
    **dict.fromkeys((("scheduled", "warmup"), ("stretched_schedule", "warmup")), NUMBER),
    ("adabatch_schedule", "every"): NUMBER,
    ("constant_schedule", "every"): NUMBER,
    ("increase_instead_of_decay", "every"): NUMBER,
    ("step_decay", "every"): NUMBER,
    ("cosine", "num_epochs"): NUMBER,
    ("sigmoid_contrastive", "bias"): NUMBER,
    ("coupled_gradient", "microbatch_size"): {"whole"},
    ("recompute", "keep"): TEXT,
    ("chunked_cross_entropy", "margin"): FUNCTION,
    ("interval", "values"): {"numbers", "list"},
    ("sequences", "length"): WHOLE,
    ("find_target", "name"): TEXT,
    ("interval", "scale"): TEXT,
    ("ratio_of_means", "scale"): TEXT,
    ("streamed_task", "model"): set(THINGS),  # needs a folder of images
}
TOKENS = np.zeros(99, np.int32)
PACKED = jb.pack_texts([np.arange(9)], 8)
VALID = dict(  # noqa: C408 (by argument, for those that have no default)
    task=TASK, config=jb.FitConfig(SGD, 4), optimizer=SGD, make_optimizer=optax.sgd, loss_fn=LOSS, params=jnp.array(0.0), batch=X, num_groups=2,
    microbatch_size=2, duration=jb.epochs(1), learning_rates=[0.1, 0.2, 0.3], learning_rate=0.1, batch_sizes=[2, 4], batch_size=4, seeds=[0],
    settings=jnp.array([0.1]), goal="loss<0.1", key=jax.random.key(0), max_norm=1.0, function=lambda gradient: gradient, checkpoint_dir="folder",
    metrics_fn=TASK.metrics_fn, num_examples=8, step=lambda state, batch: (state, batch), data=X, num_steps=2, state=jb.init_state(TASK, SGD, 0),
    encode=lambda w, x: x * w, vector=jnp.array(1.0), other=jnp.array(1.0), points=[0.0, 1.0], momentum=0.5, statistics=jb.GradientStatistics(X, X),
    a=X, b=X, gradient=X, reference=X, keep="products", examples=8, dataset=None, model=None, train=PACKED, validation=PACKED, vocab_size=9,
    texts=[TOKENS], length=8, tokens=TOKENS, name="digits", order=X, seed=0, epoch=0, first=X, second=X, features=X, kernel=X, labels=X, logits=X,
    chunk_size=2, temperature=1.0, bias=1.0, margin=0.1, vectors=X, rule="sqrt", base_lr=0.1, base_batch_size=4, schedule=4, init=0.1, num_epochs=3,
    decay=0.5, every=2, period=2.0, sizes={0: 4}, values=[1.0, 2.0], numerators=[1.0, 2.0], denominators=[1.0, 2.0], updates={8: [3.0]},
    rounds={8: [1.0]}, results={}, num_parameters=1e6, num_tokens=1e8, sequence_length=64, batches=[], apply=lambda w, x: x, amount=3, target="cpu",
)  # fmt: skip


def test_numbers_are_taken_by_their_type():
    """A check of each element took seconds for millions."""
    many, started = np.random.default_rng(0).random(3_000_000), time.process_time()
    check_kind("values", many, Sequence[float])
    assert time.process_time() - started < 0.1
    check_kind("values", [True, False], Sequence[float])  # a share of successes
    check_kind("values", np.ones(2, bool), Sequence[float])
    check_kind("sizes", np.arange(3, dtype=np.uint8), Sequence[int])
    check_kind("texts", np.zeros((2, 3), np.int32), Sequence[np.ndarray])
    for wrong_one in (np.ones(2), np.ones(2, bool), [True], [2.5]):
        with pytest.raises(ValueError, match="must be a list of whole numbers"):
            check_kind("sizes", wrong_one, Sequence[int])


ALSO = {"find_target": "target=", "seeds": "seed="}  # as they are called elsewhere
DATASETS = {
    "classification_task": jb.load_dataset("digits"),
    "hold_out": jb.load_dataset("digits"),
    "language_task": jb.load_text("generated"),
    "streamed_task": jb.ImageDataset(*[None] * len(jb.ImageDataset._fields)),
}
NO_RUN = lambda batch_size, learning_rate, seed, num_steps=0: iter(())
VALID_THERE = {  # in place of VALID
    "advise_within": {"optimizer": optax.sgd, "goal": "loss<", "within": jb.steps(8)},
    "advise_runs": {"run": NO_RUN, "goal": "loss<0.1"},
    "advise_runs_within": {"run": NO_RUN, "goal": "loss<", "within": jb.steps(64)},
    **{function: {"name": "linear"} for function in ("scheduled", "stretched_schedule")},
}


def wrong(function, name, parameter):
    """What of the things is a mistake."""
    fine = OWN.get((function, name), MAY_BE.get(name))
    assert fine is not None, f"{function}: what may {name} be?"
    return [thing for kind, thing in THINGS.items() if kind not in fine and not (thing is None and parameter.default is None)]


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - set(ELSEWHERE) - NO_CHECK))
def test_every_wrong_kind_is_one_line_that_names_the_argument(function):
    call, silent = FUNCTIONS[function], []
    parameters = inspect.signature(call).parameters
    needed = {name: VALID.get(name) for name, parameter in parameters.items() if parameter.default is parameter.empty}
    needed |= {"dataset": DATASETS[function]} if function in DATASETS else VALID_THERE.get(function, {})
    for name, parameter in parameters.items():
        for thing in [*wrong(function, name, parameter), *([RANGES[name].outside] if name in RANGES else [])] if name not in ANY else []:
            given = needed | {name: thing}
            try:
                with shapes_unchecked():
                    result = call(**given)
                    if inspect.isgenerator(result):
                        next(result)
                silent.append((name, thing, "no error"))
            except ValueError as error:
                if not any(word in str(error) for word in (name, f"{function}=", ALSO.get(function, ALSO.get(name, name)))) or "\n" in str(error):
                    silent.append((name, thing, str(error)))
            except Exception as error:
                silent.append((name, thing, repr(error)[:200]))
    assert not silent, "\n".join(map(str, silent))


def refused(call, name):
    with shapes_unchecked(), pytest.raises(ValueError) as caught:
        next(call())
    assert name in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


CONFIG = jb.FitConfig(SGD, 4)
FIELDS = {"batch_size": {"whole", "function"}, "compile_first": {"bool"}, "evaluation_batch_size": WHOLE}


@pytest.mark.parametrize("name", jb.FitConfig._fields)
def test_every_field_of_a_configuration(name):
    for kind, thing in THINGS.items():
        if kind not in FIELDS.get(name, MAY_BE.get(name, ())) and not (thing is None and jb.FitConfig._field_defaults.get(name, 0) is None):
            refused(lambda thing=thing: jb.fit(TASK, CONFIG._replace(**{name: thing})), name)
    if name in RANGES:
        refused(lambda: jb.fit(TASK, CONFIG._replace(**{name: RANGES[name].outside})), f"{name}=0 must be a whole number of at least 1")


@pytest.mark.parametrize("name", jb.NoiseMonitor._fields)
def test_every_field_of_a_monitor(name):
    right = {bool: {"bool"}, int: WHOLE, float: NUMBER}[type(getattr(jb.NoiseMonitor(), name))]
    for kind, thing in THINGS.items():
        if kind not in right:
            refused(lambda thing=thing: jb.fit(TASK, CONFIG._replace(monitor=jb.NoiseMonitor(**{name: thing}))), f"monitor.{name}")
    if (known := RANGES.get(f"monitor.{name}")) is not None:
        config = CONFIG._replace(monitor=jb.NoiseMonitor(**{name: known.outside}))
        refused(lambda: jb.fit(TASK, config), f"monitor.{name}={known.outside} must be {known.words}")


@pytest.mark.parametrize("name", jb.Task._fields)
def test_every_field_of_a_task(name):
    right = {"init": set(), "train_data": set(), "test_data": set(), "cpu_microbatch_size": WHOLE}.get(name, MAY_BE.get(name))
    for kind, thing in THINGS.items():
        optional = thing is None and jb.Task._field_defaults.get(name, 0 if name != "test_data" else None) is None
        if not optional and kind not in right | (FUNCTION if name != "coupled" else set()):
            refused(lambda thing=thing: jb.fit(TASK._replace(**{name: thing}), CONFIG), name)


def test_a_fraction_is_a_number():
    half, now = Fraction(1, 2), jnp.float32(0.3)
    with shapes_unchecked():
        assert jb.epochs(half) == jb.epochs(0.5) and jb.steps(Fraction(4)) == jb.steps(4)
        for make in (jb.cosine, jb.cyclic, lambda rate: jb.step_decay(rate, half), lambda end: jb.cosine(half, end=end)):
            assert jax.jit(make(half))(now) == jax.jit(make(0.5))(now)
        assert jb.scale_learning_rate("sqrt", half, 4, 16) == 1.0
        assert jb.adabatch_schedule(batch_size=8, growth=Fraction(3, 2), every=Fraction(5, 2))(3) == 12
        with pytest.raises(ValueError, match=r"^batch_size=Fraction\(4, 1\) must be a whole number"):
            jb.constant_schedule(Fraction(4))
        with pytest.raises(ValueError, match=r"^epochs=.*1j.* must be a number"):
            jb.epochs(np.complex64(1 + 1j))
