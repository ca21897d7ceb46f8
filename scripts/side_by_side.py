"""What the benchmarks share: contenders that are timed in the same rounds, their records, and the table."""

import importlib.metadata
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from torch_peer import Peer, is_installed

import jaxbatch as jb
from jaxbatch.intervals import interval
from jaxbatch.machine.timing import timed_rounds
from jaxbatch.results.records import describe_provenance
from jaxbatch.results.report import print_table
from jaxbatch.training.tasks import Task

RATE, MOMENTUM = 0.02, 0.5
IN_A_ROW = 5  # calls of one contender before the next, so that its data are in the cache as in a loop

MEMORY = {
    "kept": "data set, parameters and optimizer state",
    "peak": "largest further memory of a step",
    "plain_peak": "the same of a plain step on the microbatch",
    "predicted": "the same as memory_profile predicts",
}

Contenders = Mapping[str, Callable[[], Any]]


def random_task(model, num_examples: int, shape: tuple[int, ...] = (28, 28, 1)) -> Task:
    """A model on random images and labels."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (num_examples, *shape), dtype=np.uint8)
    labels = random.integers(0, 10, num_examples, dtype=np.int32)
    channels = shape[-1]
    dataset = jb.Dataset("random", images, labels, images[:1], labels[:1], 10, (0.0,) * channels, (1.0,) * channels)
    return jb.classification_task(model, dataset)


def start_peer(task: Task, params, model: str, batch_size: int, num_groups: int = 1, **settings) -> Peer | None:
    """A PyTorch process with the same weights and data; None if PyTorch is missing."""
    if not is_installed():
        return None
    data = task.train_data if isinstance(task.train_data, tuple) else (task.train_data[:, :-1], task.train_data[:, 1:])  # or a text's tokens
    images, labels = (np.asarray(leaf) for leaf in data)
    settings = {"rate": RATE, "momentum": MOMENTUM, "weight_decay": 0.0, "bfloat16": False} | settings
    weights = jax.tree.map(np.asarray, params["params"])
    peer = Peer()
    theirs = peer.set_up(model, weights, images, labels, batch_size=batch_size, num_groups=num_groups, **settings)
    result = jax.jit(task.loss_fn)(params, jax.tree.map(lambda leaf: leaf[:batch_size], task.train_data))
    losses = result if task.update_model_state is None else result[0]
    # Times count only if the losses agree. On other devices than a CPU both sides round the factors of a product.
    exact = task.update_model_state is None and jax.default_backend() == "cpu"
    np.testing.assert_allclose(losses[:8], theirs, rtol=0.1 if settings["bfloat16"] else 1e-4 if exact else 1e-2)
    return peer


def in_a_row(contenders: Contenders) -> Contenders:
    """Contenders that call each given one several times in a row and wait for each result."""

    def repeat(function):
        for _ in range(IN_A_ROW):
            jax.block_until_ready(function())

    return {name: lambda function=function: repeat(function) for name, function in contenders.items()}


def time_contenders(contenders: Contenders, rounds: int, peer: Peer | None = None) -> list[dict[str, float]]:
    """Times the contenders and ends the peer's process."""
    try:
        return list(timed_rounds(contenders, rounds, rest=0.03))
    finally:
        if peer:
            peer.close()


def median(values):
    """The median with its interval."""
    return interval(values, np.median, scale="log")


def make_rows(bench: str, model: str, batch_size: int, num_groups: int, rounds: list[dict[str, float]], per: int = 1) -> list[dict]:
    """One record for each peer; ratios are taken within a round."""

    def ratio(above, below):
        return median([times[above] / times[below] for times in rounds])

    peers = [name for name in rounds[0] if name != "ours"]
    common = {
        "bench": bench,
        "model": model,
        "batch_size": batch_size,
        "num_groups": num_groups,
        "ours_ms": median([times["ours"] / per for times in rounds]).value,
        "over_plain": None,
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
    peers = ", ".join(f"{name} {importlib.metadata.version(name) if is_installed(name) else 'missing'}" for name in ("torch", "opacus"))
    pages = "huge pages" if "hugetlb" in os.environ.get("GLIBC_TUNABLES", "") else "the system's pages"
    console.print(
        f"{machine['device']}, {machine['num_cores']} cores for each contender, {pages}; jax {machine['jax']}, {peers}; {rows[0]['rounds']} rounds",
        soft_wrap=True,
    )

    def spread(row, name):
        if row.get(name) is None:
            return ""
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        return f"{row[name]:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")

    def number(value):
        return "" if value is None else f"{value:.3g}"

    columns = ["bench", "model", "B", "K", "ours, ms", "peer", "peer, ms", "peer ÷ ours", "ours ÷ plain"]
    cells = [
        [
            row["bench"],
            row["model"],
            str(row["batch_size"]),
            str(row["num_groups"]),
            number(row["ours_ms"]),
            row["peer"] or "none",
            number(row["peer_ms"]),
            spread(row, "ratio"),
            spread(row, "over_plain"),
        ]
        for row in rows
    ]
    if any("gflops" in row for row in rows):
        columns += ["GFLOP/s", "of the matmul rate"]
        for row, line in zip(rows, cells, strict=True):
            rated = "gflops" in row
            line += [f"{row['gflops']:,.0f}", f"{row['matmul_share']:.0%}"] if rated else ["", ""]
    print_table(console, "medians of the rounds, ratios with 95% intervals", columns, cells)
    for row in rows:
        if "peak_bytes" in row:
            memory_text = ", ".join(f"{name} {row[f'{key}_bytes'] / 2**20:,.1f}" for key, name in MEMORY.items())
            console.print(f"MiB, {row['model']}, B = {row['batch_size']:,}, microbatch {row['microbatch_size']:,}: {memory_text}.", soft_wrap=True)
        if "budget_bytes" in row:
            used = (row["kept_bytes"] + row["peak_bytes"]) / 2**20
            console.print(f"In total {used:,.1f} MiB of a budget of {row['budget_bytes'] / 2**20:,.1f} MiB.")
        if "ours_temporary_bytes" in row:
            ours, plain = (row[f"{who}_temporary_bytes"] / 1e6 for who in ("ours", "plain"))
            console.print(f"Temporary memory of {row['model']}: ours {ours:.1f} MB, plain step {plain:.1f} MB.")
    if "ours_bytes" in rows[0]:
        ours, plain, params = (rows[0][key] / 1e6 for key in ("ours_bytes", "plain_bytes", "param_bytes"))
        console.print(f"Compiled memory: split step {ours:.2f} MB, plain step {plain:.2f} MB, parameters {params:.2f} MB.")
