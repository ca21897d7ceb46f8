"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import jaxbatch as jb
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, follow, kind_of
from experiments.harness.study import StudyConfig, check_positive, open_study, run_study, show_results
from experiments.language_model import __doc__ as question
from experiments.language_model import report
from jaxbatch.results.records import RunFolder
from jaxbatch.results.report import progress_bar
from jaxbatch.training.evaluation import make_task_evaluate

# text: (passes over it, largest rate), set after a few runs that were looked at on the validation text
USUAL = {"generated": (3, 0.004), "tiny_shakespeare": (8, 0.003)}
GENERATED_TOKENS = 4_000_000  # with the 1,000,000 of the other studies, more passes would be needed, and the network would learn them by heart


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, StudyConfig):
    """Flags of the study."""

    dataset: str = "generated"
    """Text: generated (embedded) or tiny_shakespeare. docs/data.md lists where files may be."""
    width: int = 64
    """Width of the transformer, a multiple of --num-heads."""
    num_layers: int = 2
    """Layers of the transformer."""
    num_heads: int = 4
    """Heads of attention in a layer."""
    sequence_length: int = 64
    """Tokens to predict in a sequence. Sentences of the generated language have 32."""
    batch_size: int = 32
    """Sequences in a batch."""
    epochs: int | None = None
    """Passes over the training text. Default: 3 over the 4,000,000 tokens of the generated language, 8 over tiny_shakespeare."""
    learning_rate: float | None = None
    """Largest learning rate. Default: 0.004 for generated, 0.003 for tiny_shakespeare; with another optimizer than AdamW its usual one."""
    optimizer: str = "adamw"
    """Optimizer: sgd, momentum, nesterov, rmsprop, adam, adamw, lion, lars, lamb, muon; or a function of your own, learning rate ->
    optimizer, as my_optimizer.py:make_optimizer. The decay of AdamW's second moment is 0.98."""
    weight_decay: float | None = None
    """Factor of the weight decay. AdamW's applies to all matrices, but not to the scales of the norms. Default: 0.1 with AdamW."""
    clip_norm: float | None = 1.0
    """Largest norm of a gradient; a longer one is scaled down to it."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and its own order of sequences."""


def resolve(config: Config, dataset: jb.TextDataset) -> Config:
    """Fills in what depends on the text, shrinks for --quick, and checks."""
    epochs, rate = USUAL[dataset.name]
    config = fill_optimizer(for_quick(config, epochs=2, seeds=2))
    if config.optimizer == "adamw":
        config = dataclasses.replace(config, weight_decay=0.1 if config.weight_decay is None else config.weight_decay)
    else:
        rate = kind_of(config).rate
    config = dataclasses.replace(config, epochs=config.epochs or epochs, learning_rate=config.learning_rate or rate)
    check_positive(config, "width", "num_layers", "num_heads", "sequence_length", "batch_size", "epochs", "learning_rate", "seeds")
    return config


def load(config: Config) -> tuple[jb.Task, jax.Array, jb.TextDataset]:
    """The task, judged on the validation text; the sequences of the test text; the text."""
    tokens = GENERATED_TOKENS if config.dataset == "generated" and not config.quick else None
    dataset = jb.load_text(config.dataset, data_dir=config.data_dir, train_tokens=tokens)
    if config.quick:  # the first part of each text
        parts = {part: getattr(dataset, part)[: 64 * 256 + 1] for part in ("train_tokens", "validation_tokens", "test_tokens")}
        dataset = dataset._replace(**parts)
    model = jb.TransformerLM(dataset.vocab_size, config.width, config.num_layers, config.num_heads)
    task = jb.language_task(model, dataset, sequence_length=config.sequence_length)
    return task, jnp.asarray(jb.sequences(dataset.test_tokens, config.sequence_length)), dataset


def make_optimizer(config: Any, num_updates: int) -> optax.GradientTransformation:
    """The optimizer with a rate that warms up over a twentieth of the updates and falls to a twentieth of its largest value."""
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, num_updates // 20, num_updates, config.learning_rate / 20)
    if config.optimizer != "adamw":
        return follow(config, rate, config.learning_rate)
    matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    adamw = optax.adamw(rate, b2=0.98, weight_decay=config.weight_decay, mask=matrices)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def measure_seed(config: Config, task: jb.Task, test_data: jax.Array, seed: int, run: RunFolder, show) -> None:
    """Trains one seed; writes a record for every epoch, and at the end the bits per token of the test text."""
    num_updates = config.epochs * (task.num_examples // config.batch_size)
    known, folder, before = {record["epoch"] for record in run.find(kind="epoch", seed=seed)}, run.path / "in_flight" / str(seed), 0
    fit_config = jb.FitConfig(make_optimizer(config, num_updates), config.batch_size, jb.epochs(config.epochs), seed=seed)
    for record in jb.fit_with_checkpoints(task, fit_config, folder):
        epoch, diverged = round(record["epoch"]), record["diverged"]
        bits = record["test_bits_per_token"]  # of the validation text
        if epoch not in known:
            kept = {key: record[key] for key in ("tokens", "loss", "train_seconds", "compile_seconds")}
            run.append({"kind": "epoch", "seed": seed, "epoch": epoch, "validation_bits_per_token": bits, "diverged": diverged, **kept})
        show(epoch - before, examples_per_second=task.num_examples / record["train_seconds"])
        before = epoch
        if epoch == config.epochs or diverged:  # written before the last state is kept, so that a kill does not lose it
            metrics = make_task_evaluate(task, test_data)(record["state"].params, test_data)
            run.append({"kind": "end", "seed": seed, "diverged": diverged, **{f"test_{name}": float(value) for name, value in metrics.items()}})


def measure(config: Config, task: jb.Task, test_data: jax.Array, dataset: jb.TextDataset, run: RunFolder, console: Console) -> None:
    """Trains the seeds that are not in the run folder yet."""
    if not run.find(kind="text"):
        parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.start, jax.random.key(0))))
        run.append({"kind": "text", "entropy": dataset.entropy, "vocab_size": dataset.vocab_size, "parameters": parameters})
    with progress_bar(console) as progress:
        bar = progress.add_task("epochs", total=config.epochs * config.seeds, rate="")

        def show(epochs, examples_per_second=0.0):
            progress.update(bar, advance=epochs, rate=f"{examples_per_second * config.sequence_length:,.0f} tokens/s")

        for seed in range(config.seeds):
            if run.find(kind="end", seed=seed):
                show(config.epochs)
            else:
                measure_seed(config, task, test_data, seed, run, show)
    shutil.rmtree(run.path / "in_flight", ignore_errors=True)


def study(config: Config, console: Console) -> None:
    """Measures what is missing, then shows what the files hold."""
    task, test_data, dataset = load(config)
    config = resolve(config, dataset)
    run = open_study("language_model", config, console, task)
    measure(config, task, test_data, dataset, run, console)
    show_results(console, config, run, report)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
