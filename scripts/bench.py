"""How fast: training steps, split steps and per-example gradients, side by side with what one would use instead.

    python scripts/bench.py train        compiled epochs of SimpleCNN, B = 1, 6, 60, 600, 6000
    python scripts/bench.py split        K updates from one batch: against a plain step and the naive way
    python scripts/bench.py gradients    per-example gradients

PyTorch takes part when it is installed (pip install 'jaxbatch[bench]'), in a process of its own. Every contender runs once a round, in
shuffled order, on all cores; figures are medians over rounds and the ratios' 95% bootstrap intervals. Data are
random images of MNIST's shape, resident in memory; loading is no part of any time. With --json FILE one
flat record a row is written.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from torch_peer import Peer, is_installed

import jaxbatch as jb
from experiments.split_backward import make_masked_step
from experiments.study import one_line_errors
from jaxbatch.batches import cut_batches
from jaxbatch.gradients import check_num_groups
from jaxbatch.records import describe_provenance
from jaxbatch.report import interval, print_table
from jaxbatch.timing import timed_rounds
from jaxbatch.train import Task, init_state, make_epoch, make_train_step

RATE, MOMENTUM = 0.02, 0.5
IN_A_ROW = 5  # calls of one contender before the next: a step in a loop, its data still in the cache


@dataclasses.dataclass(frozen=True)
class Bench:
    """Flags of all benchmarks."""

    rounds: int = 20
    """Rounds; each runs every contender once."""
    json: str | None = None
    """File for one flat JSON record a row."""


@dataclasses.dataclass(frozen=True)
class Train(Bench):
    """A training step, as compiled epochs."""

    batch_sizes: tuple[int, ...] = (1, 6, 60, 600, 6000)
    """Batch sizes."""


@dataclasses.dataclass(frozen=True)
class Split(Bench):
    """K optimizer updates from one batch."""

    batch_size: int = 640
    """B."""
    num_groups: int = 10
    """K, a divisor of B."""


@dataclasses.dataclass(frozen=True)
class Gradients(Bench):
    """Per-example gradients."""

    batch_size: int = 640
    """B."""


def make_task(num_examples: int) -> Task:
    """SimpleCNN on random images."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (num_examples, 28, 28, 1), dtype=np.uint8)
    labels = random.integers(0, 10, num_examples, dtype=np.int32)
    dataset = jb.Dataset("random", images, labels, images[:1], labels[:1], 10, (0.0,), (1.0,))
    return jb.classification_task(jb.SimpleCNN(), dataset)


def start_peer(task: Task, params, batch_size: int, num_groups: int = 1) -> Peer | None:
    """A PyTorch process with the same weights and data; None where PyTorch is missing."""
    if not is_installed():
        return None
    layers = [(f"convs.{i}", f"ConvMaxPool_{i}") for i in range(3)] + [("dense", "Dense_0")]
    weights = {}
    for theirs, ours in layers:
        kernel = np.asarray(params["params"][ours]["kernel"])
        weights[f"{theirs}.weight"] = kernel.transpose(0, 3, 1, 2) if kernel.ndim == 4 else kernel.T
        weights[f"{theirs}.bias"] = np.asarray(params["params"][ours]["bias"])
    images, labels = (np.asarray(leaf) for leaf in task.train_data)
    settings = {"batch_size": batch_size, "num_groups": num_groups, "rate": RATE, "momentum": MOMENTUM}
    peer = Peer(weights, images, labels, **settings)
    losses = task.loss_fn(params, jax.tree.map(lambda leaf: leaf[:8], task.train_data))
    np.testing.assert_allclose(losses, peer.losses, rtol=1e-4)  # a faster wrong answer is no answer
    return peer


def train(config: Train) -> list[dict]:
    """Compiled epochs against PyTorch eager, milliseconds a step."""
    optimizer = optax.sgd(RATE, MOMENTUM)
    rows = []
    for batch_size in config.batch_sizes:
        num_steps = max(2, min(300, 6000 // batch_size))
        task = make_task(num_steps * batch_size)
        indices = cut_batches(jnp.arange(task.num_examples), batch_size).indices
        step = make_train_step(task.loss_fn, optimizer, batch_size, microbatch_size=task.microbatch_size)
        run, state = make_epoch(step), init_state(task, optimizer, 0)

        def ours(run=run, state=state, task=task, indices=indices):
            return run(jax.tree.map(jnp.copy, state), task.train_data, indices)

        contenders = {"ours": ours}
        peer = start_peer(task, state.params, batch_size)
        if peer:
            contenders["torch eager"] = lambda peer=peer: peer.run("train")
        rounds = finish(contenders, config.rounds, peer)
        rows += make_rows("train", batch_size, 1, rounds, per=num_steps)
    return rows


def split(config: Split) -> list[dict]:
    """A split step against a plain step, the naive way in JAX, and PyTorch's ways."""
    size, groups = config.batch_size, config.num_groups
    check_num_groups(groups, size)
    task, optimizer = make_task(size), optax.sgd(RATE, MOMENTUM)
    params = init_state(task, optimizer, 0).params
    arguments = (params, optimizer.init(params), task.train_data)
    plain = jb.split_backward(task.loss_fn, optimizer, 1, microbatch_size=task.microbatch_size)
    ours = jb.split_backward(task.loss_fn, optimizer, groups, microbatch_size=task.microbatch_size)
    naive = make_masked_step(task.loss_fn, optimizer, groups)
    contenders = {
        "ours": lambda: ours(*arguments),
        "plain step": lambda: plain(*arguments),
        "naive: masked cotangents": lambda: naive(*arguments),
    }
    peer = start_peer(task, params, size, groups)
    if peer:
        contenders["torch retain_graph"] = lambda: peer.run("retain_graph")
        contenders["torch.func vmap"] = lambda: peer.run("func")
    memory = {"ours_bytes": step_bytes(ours, arguments), "plain_bytes": step_bytes(plain, arguments)}
    memory["param_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rows = make_rows("split", size, groups, finish(in_a_row(contenders), config.rounds, peer), per=IN_A_ROW)
    return [row | memory for row in rows] + gradients(Gradients(config.rounds, batch_size=size))


def gradients(config: Gradients) -> list[dict]:
    """Per-example gradients against a plain step and ``torch.func``."""
    task, optimizer = make_task(config.batch_size), optax.sgd(RATE, MOMENTUM)
    params = init_state(task, optimizer, 0).params
    opt_state = optimizer.init(params)
    plain = jb.split_backward(task.loss_fn, optimizer, 1, microbatch_size=task.microbatch_size)
    ours = jax.jit(lambda params, batch: jb.per_example_gradients(task.loss_fn, params, batch))
    contenders = {
        "ours": lambda: ours(params, task.train_data),
        "plain step": lambda: plain(params, opt_state, task.train_data),
    }
    peer = start_peer(task, params, config.batch_size, config.batch_size)
    if peer:
        contenders["torch.func vmap"] = lambda: peer.run("func")
    rounds = finish(in_a_row(contenders), config.rounds, peer)
    return make_rows("gradients", config.batch_size, config.batch_size, rounds, per=IN_A_ROW)


def in_a_row(contenders):
    """Each contender called several times in a row, each result waited for."""

    def repeat(function):
        for _ in range(IN_A_ROW):
            jax.block_until_ready(function())

    return {name: lambda function=function: repeat(function) for name, function in contenders.items()}


def finish(contenders, rounds: int, peer: Peer | None) -> list[dict[str, float]]:
    """Times the contenders and ends the peer's process."""
    try:
        return list(timed_rounds(contenders, rounds, rest=0.03))
    finally:
        if peer:
            peer.close()


def step_bytes(step, arguments) -> int:
    """Memory of a compiled step: temporaries, arguments and results."""
    memory = step.lower(*arguments).compile().memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def make_rows(bench: str, batch_size: int, num_groups: int, rounds: list[dict[str, float]], per: int = 1) -> list[dict]:
    """One record for each peer; ratios are taken within a round."""

    def median(values):
        return interval(values, np.median)

    def ratio(above, below):
        return median([times[above] / times[below] for times in rounds])

    peers = [name for name in rounds[0] if name != "ours"]
    common = {
        "bench": bench,
        "model": "simple_cnn",
        "batch_size": batch_size,
        "num_groups": num_groups,
        "ours_ms": median([times["ours"] / per for times in rounds]).value,
    }
    if "plain step" in peers:
        over = ratio("ours", "plain step")
        common |= {"over_plain": over.value, "over_plain_low": over.low, "over_plain_high": over.high}
    rows = []
    for peer in peers or [None]:
        row = common | {"peer": peer, "peer_ms": None, "ratio": None, "ratio_low": None, "ratio_high": None}
        if peer is not None:
            measured = ratio(peer, "ours")
            row |= {"peer_ms": median([times[peer] / per for times in rounds]).value, "ratio": measured.value}
            row |= {"ratio_low": measured.low, "ratio_high": measured.high}
        rows.append(row | {"rounds": len(rounds)})
    return rows


def report(rows: list[dict], console: Console) -> None:
    """Prints the rows as a table, with the machine and versions above it."""
    machine = describe_provenance()
    torch = f", torch {importlib.metadata.version('torch')}" if is_installed() else ", torch missing"
    console.print(
        f"{machine['device']}, {machine['num_cores']} cores, jax {machine['jax']}{torch}, {rows[0]['rounds']} rounds",
        soft_wrap=True,
    )

    def spread(row, name):
        if row.get(name) is None:
            return ""
        return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"

    print_table(
        console,
        "SimpleCNN, milliseconds a step; ratio = peer ÷ ours",
        ["bench", "B", "K", "ours", "peer", "peer ms", "ratio", "ours ÷ plain"],
        [
            [
                row["bench"],
                str(row["batch_size"]),
                str(row["num_groups"]),
                f"{row['ours_ms']:.3g}",
                row["peer"] or "none",
                "" if row["peer_ms"] is None else f"{row['peer_ms']:.3g}",
                spread(row, "ratio"),
                spread(row, "over_plain"),
            ]
            for row in rows
        ],
    )
    if "ours_bytes" in rows[0]:
        ours, plain, params = (rows[0][key] / 1e6 for key in ("ours_bytes", "plain_bytes", "param_bytes"))
        console.print(f"Compiled memory: split step {ours:.2f} MB, plain step {plain:.2f} MB, parameters {params:.2f} MB.")


def main() -> None:
    """The command line."""
    config = tyro.cli(Train | Split | Gradients, description=__doc__)
    with one_line_errors():
        rows = {Train: train, Split: split, Gradients: gradients}[type(config)](config)
        report(rows, Console(highlight=False, width=120))
        if config.json:
            pathlib.Path(config.json).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
