"""Batch sizes that follow what training shows: stopped and continued at any record, on every way through training, in the same bits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.machine.compiling import Programs
from jaxbatch.states import pack
from jaxbatch.training.monitor import NoiseTrack
from jaxbatch.training.tasks import fingerprint
from tests.conftest import on_four_devices
from tests.data.test_streams import streamed


def doubled_on_noise(records=3, sizes=(2, 4), learning_rate=None):
    """Doubles the batch when the noise scale has been above it for so many records."""

    def follow(above, measured):
        size, scale = measured["batch_size"], measured["noise_scale"]
        above = above + 1 if scale is not None and scale > size else 0
        grows = above >= records and 2 * size in sizes
        return (0 if grows else above), (2 * size if grows else size)

    return jb.BatchSizePolicy(lambda: (0, sizes[0]), follow, sizes, learning_rate)


def make_task(num_examples=26):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(num_examples, 3)), jnp.float32)
    loss_fn = lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2
    data = (x, x[:, 0] + 2 * x[:, 1] ** 2)
    return jb.Task(lambda key: jnp.zeros(3), loss_fn, lambda w, batch: {"loss": loss_fn(w, batch)}, data, data)


TASK = make_task()
CONFIG = jb.FitConfig(optax.sgd(0.01, 0.9), doubled_on_noise(), jb.epochs(3), seed=1, evaluations_per_epoch=2, monitor=jb.NoiseMonitor())
RATE = {
    "optimizer": optax.inject_hyperparams(optax.sgd)(learning_rate=0.5, momentum=0.9),
    "batch_size": doubled_on_noise(learning_rate=lambda above, size: 0.002 * size),
}


def bits(record):
    """What a record says, without times; and the bytes of its state."""
    numbers = {name: repr(value) for name, value in record.items() if name != "state" and not name.endswith("seconds")}
    return numbers, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(record["state"])]


@functools.cache
def whole_run():
    return list(jb.fit(TASK, CONFIG))


def test_the_batch_doubles_when_the_noise_was_above_it_for_three_records():
    records, sizes, above, size = whole_run(), [], 0, 2
    for record in records:  # by hand
        sizes.append(size)
        above = above + 1 if record["noise_scale"] is not None and record["noise_scale"] > size else 0
        if above == 3 and size < 4:
            above, size = 0, 2 * size
    assert [record["batch_size"] for record in records] == sizes and sizes[-1] == 4
    assert any(one["batch_size"] != other["batch_size"] and one["epoch"] % 1 for one, other in zip(records, records[1:]))  # within an epoch
    counts = np.diff([0, *(record["batches"] for record in records)])
    assert [record["examples"] for record in records] == np.cumsum(counts * sizes).tolist()
    assert records[-1]["total_batches"] == records[-1]["batches"] and records[-1]["epoch"] == 3.0


@pytest.mark.parametrize(
    "settings",
    [{}, {"monitor": jb.NoiseMonitor(every=2)}, {"stream": True}, {"num_groups": 2}, {"microbatch_size": 3, "compile_first": True}, RATE],
    ids=["plain", "every second batch", "stream", "groups", "microbatches", "rate"],
)
def test_a_run_goes_on_from_any_record_in_the_same_bits(settings):
    task = streamed(TASK) if "stream" in settings else TASK
    config = CONFIG._replace(**{name: value for name, value in settings.items() if name != "stream"})
    whole = list(jb.fit(task, config)) if settings else whole_run()
    changes = [number for number in range(1, len(whole)) if whole[number]["batch_size"] != whole[number - 1]["batch_size"]]
    assert changes and whole[changes[0] - 1]["epoch"] % 1  # within an epoch
    for number in range(1, len(whole)) if not settings else (changes[0], changes[0] + 1):
        run = jb.fit(task, config, state=whole[number - 1]["state"])
        assert bits(next(run)) == bits(whole[number])  # and so on from there: a record follows from the state before it
        run.close()


def test_a_longer_run_goes_on_after_the_last_record():
    *_, last = jb.fit(TASK, CONFIG._replace(duration=jb.epochs(2)))
    record, expected = (next(iter(records)) for records in (jb.fit(TASK, CONFIG, state=last["state"]), whole_run()[4:]))
    assert bits(record) == bits(expected) and record["batch_size"] == 4


def killed_after_every_record(task, config, folder):
    """All records of a run that is killed after each checkpoint."""
    records = []
    while True:
        run = jb.fit_with_checkpoints(task, config, folder)
        record = next(run, None)
        if record is None:
            return records
        records.append(bits(record))
        next(run, None)  # the checkpoint of a record is written when the next one is asked for
        run.close()


def test_a_run_killed_after_every_checkpoint_ends_in_the_same_bits(tmp_path):
    config = CONFIG._replace(duration=jb.epochs(2), **RATE)
    whole = [*map(bits, jb.fit(TASK, config))]
    assert killed_after_every_record(TASK, config, tmp_path) == whole and whole[-1][0]["batch_size"] == "4"
    with pytest.raises(ValueError, match="holds another run .batch_sizes: "):
        next(jb.fit_with_checkpoints(TASK, config._replace(duration=jb.epochs(4)), tmp_path))


def test_a_run_to_a_goal_goes_on_in_the_same_bits():
    goal = "loss<1.0067"
    records = list(jb.fit_to_target(TASK, CONFIG, goal, state=whole_run()[1]["state"]))
    assert [record["reached"] for record in records] == [False] * (len(records) - 1) + [True] and records[-1]["batch_size"] == 4
    assert [*map(bits, records)] == [
        bits(record | {"reached": record is whole_run()[len(records) + 1]}) for record in whole_run()[2 : len(records) + 2]
    ]


def test_two_devices_go_on_in_the_same_bits():
    script = """
import json
from tests.training.test_policies import CONFIG, TASK, bits, jb
config = CONFIG._replace(num_devices=2, duration=jb.epochs(2))
records = list(jb.fit(TASK, config))
whole = [*map(bits, records)]
same = [[*map(bits, jb.fit(TASK, config, state=record["state"]))] == whole[n:] for n, record in enumerate(records[:-1], 1)]
print(json.dumps([same, [record["batch_size"] for record in records]]))
"""
    same, sizes = on_four_devices(script)
    assert all(same) and len(same) == len(sizes) - 1 and len(set(sizes)) > 1


def test_the_sizes_that_may_come_are_compiled_ahead_and_change_nothing(monkeypatch):
    ahead, needed = set(), []
    plain_ahead, plain_get = Programs.ahead, Programs.__getitem__

    def note_ahead(self, keys):
        keys = list(keys)
        ahead.update(keys)
        plain_ahead(self, keys)

    def note_need(self, key):
        needed.append(key in ahead)
        return plain_get(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "ahead", note_ahead)
        patch.setattr(Programs, "__getitem__", note_need)
        whole = [*map(bits, jb.fit(TASK, CONFIG))]
    assert whole == [*map(bits, whole_run())]
    assert needed[1:] and all(needed[1:]) and not needed[0]
    monkeypatch.setattr(Programs, "ahead", lambda self, keys: None)
    assert [*map(bits, jb.fit(TASK, CONFIG))] == whole


def test_the_rate_is_that_of_the_size():
    loss_fn = lambda w, x: -w + 0 * x  # every update adds the rate
    task = jb.Task(lambda key: jnp.zeros(()), loss_fn, None, jnp.arange(16.0), None)
    sizes = {0: 2, 1: 8, 2: 4}
    policy = jb.BatchSizePolicy(lambda: (0, 2), lambda n, measured: (n + 1, sizes.get(int(n) + 1, 4)), (2, 4, 8), lambda n, size: size / 8 + n)
    optimizer = optax.chain(optax.identity(), optax.inject_hyperparams(optax.sgd)(learning_rate=99.0))
    params = [float(record["state"].params) for record in jb.fit(task, jb.FitConfig(optimizer, policy, jb.epochs(3)))]
    assert params == [8 * 0.25, 2 + 2 * 2.0, 6 + 4 * 2.5]


def test_what_is_measured_is_the_record_without_times(monkeypatch):
    asked = []
    policy = jb.BatchSizePolicy(lambda: ((), 6), lambda state, measured: (asked.append(dict(measured)), (state, 6))[1], (6,))
    (record,) = jb.fit(TASK, CONFIG._replace(batch_size=policy, duration=jb.steps(2)))
    names = {"batches", "batch_size", "examples", "updates", "epoch", "loss", "test_loss", *(name for name in record if name.startswith("noise"))}
    assert [set(one) for one in asked] == [names] and asked[0] == {name: record[name] for name in names}


def test_a_checkpoint_from_before_there_were_policies_is_read(tmp_path):
    config = CONFIG._replace(batch_size=jb.milestone_schedule({0: 4, jb.steps(8): 6}), duration=jb.epochs(2))
    records = list(jb.fit(TASK, config))
    state, monitor = records[2]["state"], config.monitor
    about = {"batch_sizes": [[4, 3], [4, 3], [4, 2], [6, 1], [6, 2]], "data": fingerprint(TASK.train_data), "format": 2}
    about |= {"monitor": monitor._asdict(), "num_examples": 26, "num_groups": None, "seed": 1}
    (tmp_path / "about.json").write_text(json.dumps(about, sort_keys=True))
    old = (state.params, state.opt_state, state.step, state.noise)  # the leaves that a state had, without its progress
    jb.training.checkpoints._orbax().save(tmp_path / "step_8", pack(old))
    assert NoiseTrack(monitor, state.params).written().shape == state.noise.shape
    rest = list(jb.fit_with_checkpoints(TASK, config, tmp_path))
    assert len(rest) == 2 and [*map(bits, rest)] == [*map(bits, records[3:])]
    assert json.loads((tmp_path / "about.json").read_text()) == about


def test_an_error_of_a_policy_comes_after_the_record_which_is_not_lost():
    def follow(state, measured):
        if measured["batches"] > 6:
            raise RuntimeError("no more")
        return state, 4

    config = jb.FitConfig(optax.sgd(0.1), jb.BatchSizePolicy(lambda: ((), 4), follow, (4,)), jb.epochs(3))
    records = jb.fit(TASK, config)
    first, second = next(records), next(records)
    with pytest.raises(RuntimeError, match="no more"):
        next(records)
    assert (first["batches"], second["batches"]) == (6, 12)
    assert int(second["state"].policy.batch_size) == 4 and second["state"].progress.tolist()[0] == 12
