"""Advice from real runs, resumed ones, and everything that it must refuse or confess."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.advice import cost_of_update
from jaxbatch.advice.choices import cost_from_seconds
from jaxbatch.advice.probes import ProbePrograms, Prober, with_rate_in_state
from jaxbatch.advice.timed_updates import find_throughput


def quadratic_task(num_examples=400, noise=1.0, start=0.0):
    """The gradient of an example is w - x, with x around 3."""
    x = 3 + noise * jax.random.normal(jax.random.key(0), (num_examples, 4))
    loss_fn = lambda w, x: 0.5 * ((x - w[None]) ** 2).sum(-1)
    metrics_fn = lambda w, x: {"distance": jnp.full(len(x), 0.5) * ((w - 3) ** 2).sum()}
    return jb.Task(lambda key: jnp.full(4, start), loss_fn, metrics_fn, x, x[:20])


FLAT = jb.fit_throughput({size: [1e-3 + 1e-5 * size] * 3 for size in (2, 32, 200)})
QUICK = {"optimizer": optax.sgd, "throughput": FLAT, "longest": jb.epochs(40), "max_probes": 16, "batch_sizes": (2, 8, 32, 128), "on_progress": None}


def advise_quadratic(**settings):
    return jb.advise(quadratic_task(), "distance<0.1", **{**QUICK, **settings})


@functools.cache
def advised(**settings):
    """The advice and its probes, worked out once for all tests that look at it."""
    seen = []
    return advise_quadratic(**settings, on_probe=lambda probe, number: seen.append(probe)), seen


# The runs


def test_a_rate_in_the_state_changes_no_number():
    task = quadratic_task()
    plain = list(jb.fit(task, jb.FitConfig(optax.adam(0.3), 8, jb.steps(5))))[-1]["state"]
    optimizer = with_rate_in_state(optax.adam)
    state = jb.init_state(task, optimizer, 0)
    state = state._replace(opt_state=state.opt_state._replace(learning_rate=jnp.asarray(0.3)))
    adjustable = list(jb.fit(task, jb.FitConfig(optimizer, 8, jb.steps(5)), state=state))[-1]["state"]
    np.testing.assert_array_equal(plain.params, adjustable.params)


def test_a_probe_counts_updates_to_the_goal():
    task, optimizer = quadratic_task(), with_rate_in_state(optax.sgd)
    prober = Prober(ProbePrograms(task, optimizer, 0.1), jb.as_goal("distance<0.1"), jb.epochs(10), 50)
    *_, last = prober.run(8, 0.1, 0)
    *_, record = jb.fit_to_target(prober.task, jb.FitConfig(optax.sgd(0.1), 8, jb.epochs(10), evaluations_per_epoch=50), "distance<0.1")
    assert (last.updates, last.reached) == (record["updates"], True)
    assert last.more_than == last.updates - 1  # 50 looks at 50 updates


# Advice


def test_advice_on_a_quadratic_is_near_the_best_of_a_sweep():
    advice, _ = advised()
    assert {advice.batch_size} <= set(advice.candidates)
    assert advice.choice.updates.low <= advice.choice.updates.value <= advice.choice.updates.high
    goal, task, unit = jb.as_goal("distance<0.1"), quadratic_task(), cost_of_update("time", FLAT, (2, 8, 32, 128))

    def cost(size, rate):
        config = jb.FitConfig(optax.sgd(rate), size, jb.epochs(40), seed=77, evaluations_per_epoch=50)
        *_, last = jb.fit_to_target(task, config, goal)
        return last["updates"] * unit[size] if last["reached"] else math.inf

    best = min(cost(size, rate) for size in unit for rate in (0.01, 0.0316, 0.1, 0.316, 1.0))
    assert cost(advice.batch_size, advice.learning_rate) <= 1.6 * best  # one seed each
    assert advice.cost_examples == sum(probe.updates * probe.batch_size for probe in advice.probes)


@pytest.mark.slow
def test_objectives_differ_where_they_must():
    few = advise_quadratic(objective="examples")
    fast = advise_quadratic(throughput=jb.fit_throughput({size: [1e-3] * 3 for size in (2, 200)}))
    assert few.batch_size < fast.batch_size  # if examples cost no time, a larger batch is faster


@pytest.mark.slow
def test_what_would_change_the_answer():
    advice, _ = advised()
    (less, small), (more, large) = advice.elsewhere
    assert (less, more) == (0.1, 10.0)
    assert small <= advice.batch_size <= large  # where an update costs more, larger batches pay
    said = f"B = {large} if the fixed time of an update is 10 times" in " ".join(advice.sentences())
    assert said == (large != advice.batch_size)
    assert advise_quadratic(objective="examples", max_probes=10).elsewhere == ()


@pytest.mark.parametrize("kept", [3, 12])  # in the midst of the race, and after it
def test_advice_continues_from_known_runs_and_gives_the_same(kept):
    (whole, seen), again = advised(), []
    resumed = advise_quadratic(known=seen[:kept], on_probe=lambda probe, number: again.append((probe, number)))
    assert [number for _, number in again] == list(range(kept, len(seen)))
    assert resumed == whole


def test_the_answer_in_words_and_code():
    advice, _ = advised()
    text = "\n".join(advice.sentences())
    told = "do not show that it is better" if len(advice.candidates) > 1 else "no other size"
    for part in (f"batch size {advice.batch_size}", "updates", "The device is busy from", told):
        assert part in text
    names = {"jb": jb, "optax": optax}
    exec(advice.snippet("optax.sgd"), names)
    assert names["config"].batch_size == advice.batch_size


def test_one_size_is_answered_with_its_rate():
    advice = advise_quadratic(batch_sizes=(8,))
    assert advice.batch_size == 8 and len(advice.choices) == 1
    assert 0.01 < advice.learning_rate < 1 and advice.choice.reached >= 3
    assert {probe.batch_size for probe in advice.probes} == {8}
    assert advice.critical_batch_size.n == 0
    text = " ".join(advice.sentences())
    assert "batch size 8, the only one considered, and learning rate" in text
    assert "sizes" not in " ".join(advice.doubts)


@pytest.mark.parametrize("size", [1, 8])
def test_one_size_is_timed(size):
    assert find_throughput(quadratic_task(num_examples=40), optax.sgd(0.1), (size,), "here").seconds[size].value > 0


def test_rules_name_what_the_optimizer_has():
    advice = advise_quadratic(optimizer=optax.adamw, max_probes=10)
    assert [rule.partition(":")[0] for rule in advice.rules] == ["β₂", "Weight decay of AdamW", "Warmup", "An average of the weights"]


# What it must refuse or confess


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rates": (0.1, 0.2)}, "learning_rates"),
        ({"learning_rates": (0.1, 0.2, -1.0)}, "learning_rates"),
        ({"batch_sizes": ()}, "batch_sizes=\\[\\]"),
        ({"batch_sizes": (8, 10_000)}, "400 examples"),
        ({"memory": "1B", "batch_sizes": (2, 8)}, "budget|memory"),
        ({"target": "h1000"}, "h1000"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        advise_quadratic(**settings)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective='money'"):
        cost_from_seconds.__wrapped__("money", (2, 8), np.ones(2))  # past the run-time check of types


def test_a_goal_that_is_no_metric_or_already_reached_is_refused():
    with pytest.raises(ValueError, match="metrics are distance"):
        jb.advise(quadratic_task(), "accuracy>0.9", **QUICK)
    with pytest.raises(ValueError, match="reached before training"):
        jb.advise(quadratic_task(start=3.0), "distance<0.1", **QUICK)


def test_data_that_are_not_finite_are_refused():
    task = quadratic_task()
    with pytest.raises(ValueError, match="train_data holds NaN or infinite numbers in 1 of 400"):
        jb.advise(task._replace(train_data=task.train_data.at[3].set(jnp.nan)), "distance<0.1", **QUICK)


def refused(task, goal="distance<0.1", **settings):
    advice = jb.advise(task, goal, **{**QUICK, "longest": jb.epochs(2), **settings})
    assert advice.batch_size is None
    assert advice.snippet().startswith("# no advice")
    return " ".join(advice.sentences())


def test_divergence_at_every_rate_is_confessed():
    assert "diverged at every learning rate from 100 to 1e+04" in refused(quadratic_task(), learning_rates=(1e2, 1e3, 1e4), longest=jb.epochs(10))


def test_a_metric_that_never_moves_is_confessed():
    task = quadratic_task()._replace(metrics_fn=lambda w, x: {"distance": jnp.ones(len(x))})
    assert "distance never moved from 1" in refused(task)


def test_a_goal_that_is_too_far_is_confessed():
    assert "No run reached distance<1e-08: the best came to" in refused(quadratic_task(), "distance<1e-8")


@pytest.mark.slow
def test_one_class_is_refused_or_confessed():
    """With one class every answer is right from the start, or after the first look."""
    images = jb.load_dataset("digits")
    dataset = images._replace(train_labels=0 * images.train_labels, test_labels=0 * images.test_labels)
    task = jb.classification_task(jb.MLP((8,), num_classes=10), dataset)
    advice = jb.advise(task, "accuracy>0.99", **{**QUICK, "batch_sizes": (32, 64, 128), "max_probes": 11})
    assert any("reached within" in doubt for doubt in advice.doubts)


@pytest.mark.slow
def test_updates_that_do_not_fall_with_the_batch_are_confessed():
    rates = {"learning_rates": (0.003, 0.01, 0.03)}  # at a rate of 1 a single update reaches the goal, and looks cannot tell more
    advice = jb.advise(quadratic_task(noise=0.0), "distance<0.1", **{**QUICK, **rates, "max_probes": 24, "evaluations_per_epoch": 400})
    assert any("hardly fall" in doubt or "Fewer than three" in doubt for doubt in advice.doubts)
    assert advice.critical_batch_size.low < 8


def test_a_small_data_set_is_confessed():
    advice = jb.advise(quadratic_task(num_examples=8), "distance<0.3", **{**QUICK, "batch_sizes": None, "longest": jb.epochs(200)})
    assert any("allows only 2 batch sizes" in doubt for doubt in advice.doubts)


def test_few_probes_leave_a_wide_interval():
    advice, _ = advised(max_probes=10)
    assert len(advice.probes) == 10
    assert advice.critical_batch_size.high > 5 * advice.critical_batch_size.low
    assert len(advice.candidates) > 1


def test_memory_is_checked_before_it_is_said_to_hold():
    advice, _ = advised(max_probes=10)
    assert "Every size considered fits in memory." in " ".join(advice.sentences())
    assert "memory the device has is not known" in " ".join(advice._replace(largest_batch_size=0).sentences())
    with pytest.raises(ValueError, match="already needs"):  # on this machine, too
        advise_quadratic(memory="1KiB", max_probes=10)


@pytest.mark.slow
def test_a_large_model_is_told_what_memory_holds():
    task = jb.classification_task(jb.MLP((64,)), jb.load_dataset("digits"), microbatch_size=10**6)
    momentum = functools.partial(optax.sgd, momentum=0.9)
    memory = jb.memory_profile(task, [256], optimizer=momentum(0.1))[256].total / 0.94  # a margin of 5% is left free
    settings = {"optimizer": momentum, "throughput": FLAT, "max_probes": 10, "longest": jb.epochs(3)}
    advice = jb.advise(task, "accuracy>0.5", memory=memory, **settings)
    assert max(choice.batch_size for choice in advice.choices) == 256 <= advice.largest_batch_size < 512
    assert f"Memory holds a batch of at most {advice.largest_batch_size:,}" in " ".join(advice.sentences())
