"""Tables, figure and answer of the memory study, from its records alone."""

import pathlib
from collections.abc import Sequence

from rich.console import Console

from experiments.harness.optimizers import optimizer_words
from experiments.harness.study import describe_setting
from jaxbatch.machine.targets import format_bytes
from jaxbatch.results import plots
from jaxbatch.results.records import Record
from jaxbatch.results.report import print_table


def _of(records: Sequence[Record], kind: str) -> list[Record]:
    """The records of a kind, one a target (the newest), in the order of the answer's size."""
    newest = {(record["target"], record["batch_size"] if kind == "size" else None): record for record in records if record["kind"] == kind}
    return sorted(newest.values(), key=lambda record: record["batch_size"])


def _sizes(records: Sequence[Record], target: str) -> list[Record]:
    return [record for record in _of(records, "size") if record["target"] == target]


def print_tables(console: Console, config, records: Sequence[Record], provenance: Record) -> None:
    """The largest batch by target, the parts of its memory, and how to fit a batch that was asked for."""
    extra = [f"{config.num_devices} devices"] if config.num_devices > 1 else []
    extra += [f"split in {config.split}"] if config.split else []
    describe_setting(console, config, provenance, *([] if config.task else [config.dtype]), optimizer_words(config), *extra)
    rows, parts = [], []
    for answer in _of(records, "largest"):
        mine = {record["batch_size"]: record for record in _sizes(records, answer["target"])}
        memory = mine[answer["batch_size"]]
        searched = sum(record["compiled_in_search"] for record in mine.values())
        at_least = "" if answer["verified"] else "≥ "
        bound = f"{memory['bound_ms']:.3g}" if "bound_ms" in memory else "–"
        taken = "–" if answer["compute_from"] is None else f"{max(1, answer['compute_from']):,.0f}"
        rows.append(
            [
                answer["title"],
                f"{at_least}{answer['batch_size']:,}",
                format_bytes(answer["limit"]),
                format_bytes(answer["bytes_per_example"]),
                format_bytes(answer["fixed_bytes"]),
                bound,
                taken,
                str(searched),
                f"{answer['compile_seconds']:.0f}",
            ]
        )
        parts.append([answer["title"], f"{answer['batch_size']:,}", *map(format_bytes, _parts(memory))])
    columns = ["target", "largest batch", "limit", "per example", "fixed", "least ms", "compute-bound from", "sizes compiled", "compile s"]
    share = f", over {config.num_devices} devices; memory is that of each" if config.num_devices > 1 else ""
    print_table(console, f"Largest batch that fits{share}", columns, rows)
    print_table(
        console,
        "Memory of that batch, each device",
        ["target", "batch", "parameters", "optimizer", "model state", "last record", "data", "activations etc.", "a step", "in evaluation"],
        parts,
    )
    for plan in _of(records, "plan"):
        rows = [
            [
                option["keep"],
                f"{option['microbatch_size']:,}" if option["microbatch_size"] else "does not fit",
                f"{option['accumulation_steps']:,}" if option["microbatch_size"] else "–",
                f"{option['operations']:.2f} ×",
                format_bytes(option["memory"]),
            ]
            for option in plan["options"]
        ]
        title = f"A batch of {plan['batch_size']:,} on {plan['title']}: activations that are kept, and the largest microbatch"
        print_table(console, title, ["kept", "microbatch", "parts", "operations", "memory"], rows)


def _parts(memory: Record) -> list[int]:
    """The bytes of the parts of a step, of all of them, and of an evaluation; records of earlier versions hold fewer."""
    more = {name: memory.get(name, 0) for name in ("last_state", "test_data", "evaluation")}
    parts = [memory["parameters"], memory["optimizer_state"], memory["model_state"], more["last_state"]]
    parts += [memory["data"] + more["test_data"], memory["temporaries"] + memory["results"]]
    return [*parts, sum(parts), more["evaluation"]]


def draw_figure(config, records: Sequence[Record], folder: pathlib.Path) -> pathlib.Path:
    """Bytes by batch size, a line a target; ceilings are dashed, answers are rings."""
    figure, axes = plots.subplots(figsize=(7, 4.5))
    for number, answer in enumerate(_of(records, "largest")):
        color = plots.COLORS[number % len(plots.COLORS)]
        mine = [record for record in _sizes(records, answer["target"]) if not record["refused"]]
        sizes, totals = [record["batch_size"] for record in mine], [record["total"] / 2**30 for record in mine]
        axes.plot(sizes, totals, "o-", ms=3, color=color, label=f"{answer['title']}: {answer['batch_size']:,}")
        axes.axhline(answer["limit"] / 2**30, color=color, ls="--", lw=1)
        axes.plot(answer["batch_size"], answer["limit"] / 2**30, "o", ms=10, mfc="none", color=color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plots.log_values(axes.xaxis)
    plots.log_values(axes.yaxis)
    axes.set_xlabel("batch size")
    axes.set_ylabel("memory of training on each device, GiB" if config.num_devices > 1 else "memory of training, GiB")
    axes.legend(title="target: largest batch (ring), limit dashed", fontsize=9)
    return plots.save(figure, folder)


def verdict(config, records: Sequence[Record]) -> list[str]:
    """The answer in sentences."""
    sentences = []
    for answer in _of(records, "largest"):
        share = f" over {config.num_devices} devices" if config.num_devices > 1 else ""
        limit = "the largest batch that fits is" if answer["verified"] else "everything fits up to where the search ends,"
        sentences.append(f"{answer['title']}{share}: {limit} {answer['batch_size']:,}.")
    caveats = [part for answer in _of(records, "largest") for part in answer["caveats"]]
    sentences += dict.fromkeys(caveats)  # each once
    if any(record.get("bound_ms") for record in records):
        sentences.append("Times are lower bounds from the data sheets' peaks, not measurements.")
    return sentences + [plan["sentence"] for plan in _of(records, "plan")]
