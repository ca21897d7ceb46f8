"""The cases on which jaxbatch.advise_within is built, and those on which it is only scored. No setting of it saw the latter.

A case is small: the runs of its whole sweep cost a few minutes of one core. The lengths of its runs are multiples of an eighth of its
length, and every batch size divides an eighth or is too large for a run so short, so that all its runs of a size share one program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import advice_cases
import optax

import jaxbatch as jb
from jaxbatch.advice.request import LEARNING_RATES
from jaxbatch.schedules.named_rates import RateName

SHORT = 1 / 8  # of the length: the longest run that may be made where the answer is for a horizon
_FEWEST = 8  # updates of a short run, below which a batch size has none


class Case(NamedTuple):
    """A task, an optimizer whose rate follows a schedule, a metric, a length, and the sweep that finds the best setting."""

    task: Callable[[], jb.Task]
    optimizer: Callable[[Any], Any]  # learning rate or schedule -> optimizer
    schedule: RateName
    metric: str  # with its direction
    epochs: float  # the length of a run
    learning_rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    warmup: float = 0.0
    building: bool = False  # whether advise_within was built with it; the others are only scored

    @property
    def make_optimizer(self) -> Callable[..., Any]:
        """Of a learning rate and the updates of a run."""
        return jb.scheduled(self.optimizer, self.schedule, warmup=self.warmup)

    @property
    def sign(self) -> float:
        """By which values of the metric are multiplied, so that less is better."""
        return -1.0 if self.metric.endswith(">") else 1.0

    def length(self, part: float = 1.0) -> jb.Duration:
        """A part or a multiple of the length."""
        return jb.epochs(self.epochs * part)

    def num_steps(self, num_examples: int, batch_size: int, part: float = 1.0) -> int:
        """The updates of a run of a part or a multiple of the length."""
        return jb.num_steps(self.length(part), num_examples=num_examples, batch_size=batch_size)

    def short_sizes(self, num_examples: int) -> tuple[int, ...]:
        """The sizes whose short runs have updates enough."""
        return tuple(size for size in self.batch_sizes if self.num_steps(num_examples, size, SHORT) >= _FEWEST)


def rates(first: float, last: float) -> tuple[float, ...]:
    """The learning rates from one to another, four to a power of ten, which advice chooses from, too."""
    return tuple(rate for rate in LEARNING_RATES if first <= rate <= last)


def sizes(first: int, last: int) -> tuple[int, ...]:
    """The powers of two from one to another."""
    return tuple(2**power for power in range(20) if first <= 2**power <= last)


def image_task(name: str, num_examples: int, num_held: int, width: int = 64) -> jb.Task:
    """One hidden layer on so many training examples of a data set, judged on others of them."""
    dataset, count = jb.load_dataset(name), num_examples + num_held
    dataset = dataset._replace(train_images=dataset.train_images[:count], train_labels=dataset.train_labels[:count])
    return jb.classification_task(jb.MLP((width,), num_classes=dataset.num_classes), jb.hold_out(dataset, num_held))


def text_task(name: str, num_sequences: int = 6144, num_held: int = 128, length: int = 16) -> jb.Task:
    """A transformer of one layer on sequences of which a run of three times the length sees none twice."""
    dataset = jb.load_text(name)
    dataset = dataset._replace(
        train_tokens=dataset.train_tokens[: num_sequences * length + 1], validation_tokens=dataset.validation_tokens[: num_held * length + 1]
    )
    model = jb.TransformerLM(dataset.vocab_size, width=16, num_layers=1, num_heads=1)
    return jb.language_task(model, dataset, sequence_length=length)


DIGITS = functools.partial(image_task, "digits", 1024, 416)
MNIST = functools.partial(image_task, "mnist", 2048, 1024)
CIFAR10 = functools.partial(image_task, "cifar10", 2048, 1024, 24)
GENERATED = functools.partial(text_task, "generated")
SHAKESPEARE = functools.partial(text_task, "tiny_shakespeare")
REGRESSION = functools.partial(advice_cases.regression_task, 4096)
MOMENTUM = advice_cases.MOMENTUM
ADAM_RATES = rates(0.000316, 0.0562)
MOMENTUM_RATES = rates(0.001, 0.178)
TEXT_RATES = rates(0.001, 0.0562)

# In the order of what they cost.
CASES = {
    "regression_sgd_cosine": Case(REGRESSION, optax.sgd, "cosine", "excess<", 2, rates(0.01, 1.78), sizes(2, 512)),
    "regression_momentum_wsd": Case(REGRESSION, MOMENTUM, "wsd", "excess<", 2, rates(0.00178, 0.316), sizes(2, 512)),
    "digits_mlp_momentum_cosine": Case(DIGITS, MOMENTUM, "cosine", "accuracy>", 4, MOMENTUM_RATES, sizes(4, 256)),
    "digits_mlp_adamw_linear": Case(DIGITS, optax.adamw, "linear", "loss<", 8, ADAM_RATES, sizes(4, 512), warmup=0.05),
    "mnist_mlp_momentum_cosine": Case(MNIST, MOMENTUM, "cosine", "loss<", 4, MOMENTUM_RATES, sizes(4, 512)),
    "mnist_mlp_adamw_wsd": Case(MNIST, optax.adamw, "wsd", "accuracy>", 4, ADAM_RATES, sizes(4, 512)),
    "digits_equinox_adamw_wsd": Case(
        advice_cases.equinox_task, optax.adamw, "wsd", "accuracy>", 8, ADAM_RATES, sizes(4, 256), warmup=0.05
    ),
    "mnist_mlp_adamw_cosine": Case(MNIST, optax.adamw, "cosine", "loss<", 4, ADAM_RATES, sizes(4, 512), warmup=0.1),
    "digits_mlp_adamw_cosine": Case(
        advice_cases.CASES["digits_mlp_adamw"].task, optax.adamw, "cosine", "loss<", 8, ADAM_RATES, sizes(4, 256), building=True
    ),
    "cifar10_mlp_momentum_linear": Case(CIFAR10, MOMENTUM, "linear", "loss<", 4, rates(0.000562, 0.0316), sizes(8, 512)),
    "cifar10_mlp_adamw_cosine": Case(CIFAR10, optax.adamw, "cosine", "accuracy>", 4, rates(0.000178, 0.01), sizes(8, 512)),
    "generated_adamw_cosine": Case(GENERATED, optax.adamw, "cosine", "loss<", 1 / 3, TEXT_RATES, sizes(8, 128), warmup=0.05),
    "shakespeare_adamw_linear": Case(SHAKESPEARE, optax.adamw, "linear", "loss<", 1 / 3, TEXT_RATES, sizes(8, 128)),
    "shakespeare_adamw_wsd": Case(SHAKESPEARE, optax.adamw, "wsd", "loss<", 1 / 3, TEXT_RATES, sizes(8, 128), warmup=0.05),
    "mnist_mlp_momentum_step": Case(MNIST, MOMENTUM, "step", "accuracy>", 4, rates(0.00316, 0.178), sizes(8, 512)),
    "digits_cnn_momentum_cosine": Case(
        advice_cases.CASES["digits_cnn_sgd"].task, MOMENTUM, "cosine", "loss<", 8, rates(0.00178, 0.1), sizes(8, 256), building=True
    ),
}  # fmt: skip
