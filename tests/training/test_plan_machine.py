"""The plan as a state machine: every example once whatever sizes are chosen, a number as its special case, and what is refused."""

import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbatch as jb
from jaxbatch.batches import Duration
from jaxbatch.training import plan_machine
from jaxbatch.training.plan_machine import batches_by_size, make_plan, reacting_segment
from jaxbatch.training.plans import FitConfig, Progress, advance, progress_after, settled
from tests.conftest import shapes_unchecked
from tests.reference import plan_segments
from tests.schedules.test_milestones import TOKENS, schedules


def always(size, sizes=None, **more):
    return jb.BatchSizePolicy(lambda: ((), size), lambda state, measured: (state, size), sizes or (size,), **more)


@st.composite
def durations(draw):
    unit = draw(st.sampled_from(["steps", "examples", "epochs"]))
    return Duration(draw(st.integers(0, 200) if unit != "epochs" else st.floats(0, 5).map(lambda amount: round(amount, 2))), unit)


@settings(deadline=None, max_examples=100)
@given(
    num_examples=st.integers(1, 60),
    chosen=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    evaluations=st.integers(1, 5),
    duration=durations(),
)
def test_every_example_comes_once_in_an_epoch_whatever_is_chosen(num_examples, chosen, evaluations, duration):
    config, progress, seen, position, number = FitConfig(None, None, duration, evaluations_per_epoch=evaluations), Progress(), [], 0.0, 0
    size = lambda: min(chosen[number % len(chosen)], num_examples)
    while (segment := reacting_segment(config, num_examples, progress, size())) is not None:
        assert segment.batch_size == size() and segment.num_batches >= 1 and position < segment.end
        seen += [(segment.epoch, segment.first + n) for n in range(segment.num_examples)]
        left = num_examples - segment.first - segment.num_examples
        assert segment.last == (left < segment.batch_size) and left >= 0
        assert segment.end == (segment.epoch + 1 if segment.last else segment.epoch + (num_examples - left) / num_examples)
        position, progress, number = segment.end, advance(progress, segment), number + 1
    assert seen == sorted(set(seen)) and progress.examples == len(seen)
    amount, unit = duration
    enough = {"steps": progress.batches, "examples": len(seen), "epochs": position}[unit]
    skipped = num_examples - progress.offset < size()  # what is left of the last epoch fills no batch of the size that was chosen at its end
    assert enough >= amount - 1e-6 or (unit == "epochs" and skipped and progress.epoch + 1 >= amount)


@settings(deadline=None, max_examples=60)
@given(num_examples=st.integers(1, 60), size=st.integers(1, 60), evaluations=st.integers(1, 5), duration=durations())
def test_a_policy_that_never_changes_is_a_number(num_examples, size, evaluations, duration):
    size = min(size, num_examples)
    num_examples = num_examples // size * size if duration.unit == "epochs" else num_examples  # a part of an epoch is one of all its examples
    number = FitConfig(None, size, duration, evaluations_per_epoch=evaluations)
    wanted = plan_segments(number, num_examples)
    plan, progress, segments = make_plan(number._replace(batch_size=always(size)), num_examples), Progress(), []
    choice, total = plan.begin(()), sum(one.num_batches for one in wanted)
    while (segment := plan.next(progress, choice)) is not None:
        assert plan.batches_left(progress, choice) == total - progress.batches
        segments.append(segment)
        progress = advance(progress, segment)
    assert plan.batches_left(progress, choice) == 0
    assert [one[:4] + one[5:] for one in segments] == [one[:4] + one[5:] for one in wanted]
    if num_examples % size == 0:
        assert [one.end for one in segments] == [one.end for one in wanted]


@settings(deadline=None, max_examples=40)
@given(schedule=schedules(), duration=durations(), cut=st.integers(0, 120))
def test_epochs_that_are_alike_are_counted_as_one_by_one(schedule, duration, cut):
    unit, num_examples, milestones = schedule
    sizes = jb.milestone_schedule({Duration(amount, unit): size for amount, size in milestones})
    for one in (sizes, milestones[0][1], lambda epoch: 1 + epoch // 2 % 3):
        config = settled(FitConfig(None, one, duration), TOKENS)
        whole = plan_segments(config, num_examples)
        progress = [Progress()]
        for segment in whole:
            parts = [segment._replace(num_batches=1, first=segment.first + n * segment.batch_size) for n in range(segment.num_batches)]
            for part in parts:
                progress.append(advance(progress[-1], part._replace(last=segment.last and part is parts[-1])))
        for start in {0, min(cut, len(progress) - 1)}:
            rows = batches_by_size(config, num_examples, progress[start])
            rest = plan_segments(config, num_examples, start=progress[start])
            assert [size for size, count in rows for _ in range(count)] == [
                segment.batch_size for segment in rest for _ in range(segment.num_batches)
            ]
            assert all(size != other for (size, _), (other, _) in zip(rows, rows[1:]))
            assert progress_after(config, num_examples, start) == progress[start]


@pytest.mark.parametrize(
    "sizes",
    [
        4,
        jb.milestone_schedule({0: 4, jb.steps(10**6): 8}),
        jb.adabatch_schedule(batch_size=4, every=jb.tokens(10**9), max_batch_size=64),
    ],
)
def test_a_plan_of_a_million_epochs_looks_at_few(sizes, monkeypatch):
    looks, plain = [], plan_machine.next_stretch

    def counted(*arguments):
        looks.append(arguments)
        return plain(*arguments)

    for module in (plan_machine, jb.training.plans):
        monkeypatch.setattr(module, "next_stretch", counted)
    config = settled(FitConfig(None, sizes, jb.epochs(10**6)), TOKENS)
    plan = make_plan(config, 4096)
    after = plan.progress((), 10**6 + 1)
    total = after.batches + plan.batches_left(after, ())
    assert total == sum(count for _, count in batches_by_size(config, 4096, Progress())) and after.batches == 10**6 + 1
    assert plan.next(after, ()).epoch == after.epoch and len(looks) < 500  # each change of the stage is looked at


LOSS = lambda w, x: 0.5 * (x - w) ** 2
TASK = jb.Task(lambda key: jnp.array(0.0), LOSS, lambda w, x: {"loss": LOSS(w, x)}, jnp.arange(16.0), jnp.arange(4.0))


def follow(state, size=4):
    return lambda old, measured: (state, size)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (always(32), r"batch_size.sizes=\(32,\): batch_size=32 is larger than the data set \(num_examples=16\)"),
        (always(4, (4, 0)), r"batch_size.sizes=\(4, 0\): batch_size=0 must be at least 1"),
        (always(4, ())._replace(sizes=()), r"batch_size.sizes=\(\) must hold every batch size"),
        (always(4, (4, 2.5)), "batch_size.sizes=.* must be a list of whole numbers"),
        (always(4)._replace(next=None), "batch_size.next=None must be a function"),
        (always(4, (2, 8)), r"batch_size.init names batch size 4, which is not in sizes=\(2, 8\)"),
        (always(4)._replace(next=follow((), 6)), r"batch_size.next names batch size 6, which is not in sizes=\(4,\)"),
        (always(4)._replace(next=follow((), True)), "batch_size.next names batch size True"),
        (always(4)._replace(next=lambda state, measured: 4), r"batch_size.next must return a pair \(state, batch size\), and returned a int"),
        (
            always(4)._replace(init=lambda: ({"name": "a"}, 4)),
            r"batch_size.init must return a state of arrays and numbers, and state\['name'\] is a str",
        ),
        (always(4)._replace(next=follow(3)), "batch_size.next must return a state of the form that it got: its state is an array"),
        (always(4)._replace(init=lambda: (0, 4), next=follow(0.5)), "its state is float32 in place of int32"),
        (
            always(4)._replace(next=lambda state, measured: (state, measured["noise_scale"])),
            r"batch_size.next asks for 'noise_scale', and what is measured are batches, .*NoiseMonitor\(\)",
        ),
        (always(4, learning_rate=lambda state, size: 0.1), r"batch_size.learning_rate needs .*inject_hyperparams.* keeps no learning rate"),
    ],
)
def test_a_wrong_policy_is_one_line(policy, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(jb.fit(TASK, jb.FitConfig(optax.sgd(0.1), policy, jb.epochs(2))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: next(jb.sweep(TASK, optax.sgd, jnp.ones(1), [0], batch_size=always(4), duration=jb.epochs(1))),
            "batch_size=.*for jaxbatch.fit alone",
        ),
        (lambda: jb.advise(TASK, "loss<1", optimizer=optax.sgd, batch_sizes=[always(4)]), "batch_sizes=.* must be"),
        (
            lambda: jb.branch(
                TASK, optax.sgd, jb.init_state(TASK, optax.sgd(0.1), 0), learning_rate=0.1, batch_size=always(4), examples=8, rule="sqrt"
            ),
            "batch_size=.*for jaxbatch.fit alone",
        ),
        (lambda: jb.coupled_learning_rate(always(4), init=0.1, num_examples=16, num_epochs=1), "schedule=.*its learning_rate says the rate of each"),
    ],
)
def test_elsewhere_a_policy_is_refused(call, message):
    with shapes_unchecked(), pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_every_size_must_be_divisible_into_groups():
    with pytest.raises(ValueError, match="num_groups=3 does not divide"):
        next(jb.fit(TASK, jb.FitConfig(optax.sgd(0.1), always(3, (3, 4)), num_groups=3)))


def test_a_rate_needs_an_optimizer_that_holds_one_and_a_number():
    rates = [(lambda state, size: -1.0, r"gives -1.0 for batch_size=4"), (lambda state, size: float("nan"), "gives nan")]
    injected = optax.inject_hyperparams(optax.sgd)
    for rate, message in rates:
        with pytest.raises(ValueError, match=message):
            next(jb.fit(TASK, jb.FitConfig(injected(learning_rate=0.1), always(4, learning_rate=rate))))
    with pytest.raises(ValueError, match="computes its learning rate by a schedule"):
        cosine = injected(learning_rate=optax.cosine_decay_schedule(0.1, 10))
        next(jb.fit(TASK, jb.FitConfig(cosine, always(4, learning_rate=lambda state, size: 0.1))))


def test_a_state_goes_on_with_its_own_policy_or_begins_with_another():
    config = jb.FitConfig(optax.sgd(0.1), always(4, (2, 4)), jb.epochs(2))
    state = next(jb.fit(TASK, config))["state"]
    with pytest.raises(ValueError, match=r"state.policy is that of another policy .has batch_size=4, which is not in sizes=\(2,\).*_replace\(policy"):
        next(jb.fit(TASK, config._replace(batch_size=always(2)), state=state))
    with pytest.raises(ValueError, match="state.policy is that of another policy"):
        next(jb.fit(TASK, config._replace(batch_size=always(4)._replace(init=lambda: (0, 4))), state=state))
    for sizes in (always(2), 2):  # in the next epoch, whatever the size
        record = next(jb.fit(TASK, config._replace(batch_size=sizes), state=state._replace(policy=()) if sizes != 2 else state))
        assert (record["batch_size"], record["batches"], record["epoch"]) == (2, 4 + 8, 2.0)
    with pytest.raises(ValueError, match="state.step=3 is not of state.progress, and with a policy no plan says"):
        next(jb.fit(TASK, config, state=state._replace(step=jnp.array(3))))
    again = next(jb.fit(TASK, config, state=state._replace(step=jnp.array(0))))
    assert again["batches"] == 4 and again["epoch"] == 1.0
    with pytest.raises(ValueError, match=r"state.step=4 is at or past the end of duration=epochs\(1\)"):
        next(jb.fit(TASK, config._replace(duration=jb.epochs(1)), state=state))
