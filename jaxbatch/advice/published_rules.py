"""Published rules for the batch size and learning rate of language models, side by side: what they say without any run.

N parameters without embeddings, D training tokens, C training FLOPs, L loss in nats per token, B tokens in a batch.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxbatch.kinds import checked

Kind = Literal["best", "critical"]


class PublishedRule(NamedTuple):
    """What one published rule says.

    ``kind`` is what its batch size is: ``"best"`` ends with the lowest loss for the tokens, ``"critical"`` is about the largest one that does
    not waste many of them. ``learning_rate`` is the peak of the schedule, or ``None`` where the rule gives none. ``fitted`` has the ranges in which
    the rule was fitted, NaN where they were not read; ``outside`` those that the asked point leaves: asked ÷ nearest end, below 1 where it lies under
    the range. ``verified`` says where formula and units were read: in the paper, in its authors' code, or only in what others write of it.
    """

    name: str
    kind: Kind
    batch_tokens: float
    batch_sequences: float
    learning_rate: float | None
    optimizer: str
    fitted: dict[str, tuple[float, float]]
    outside: dict[str, float]
    formula: str
    source: str
    verified: str


class PublishedRules(NamedTuple):
    """The rules, and how far they disagree: the largest value ÷ the smallest of ``"best"`` and ``"critical"`` batches and of ``"learning_rate"``."""

    rules: tuple[PublishedRule, ...]
    disagreement: dict[str, float]


class _Asked(NamedTuple):
    """The point at which the rules are asked."""

    num_parameters: float
    num_tokens: float
    compute: float
    loss: float | None

    @property
    def quantities(self) -> dict[str, float | None]:
        """Everything that a rule may have a range of."""
        return {**self._asdict(), "tokens_per_parameter": self.num_tokens / self.num_parameters}


class _Law(NamedTuple):
    """One published rule as functions of the point; ``batch`` in tokens, None where the rule says nothing."""

    name: str
    kind: Kind
    batch: Callable[[_Asked], float | None]
    rate: Callable[[_Asked], float | None]
    optimizer: str
    fitted: dict[str, tuple[float, float]]
    formula: str
    source: str
    verified: str


def _no_rate(asked: _Asked) -> None:
    """The rule gives no learning rate."""


def _kaplan_loss(asked: _Asked) -> float:
    """The loss that Kaplan et al. expect, eq. 1.5 with the parameters of table 2."""
    return ((6.4e13 / asked.num_parameters) ** (0.076 / 0.103) + 1.8e13 / asked.num_tokens) ** 0.103


def _kaplan_batch(asked: _Asked) -> float:
    return 2e8 * (asked.loss or _kaplan_loss(asked)) ** (-1 / 0.21)


def _kaplan_rate(asked: _Asked) -> float | None:
    """The paper says that it breaks down above 10^10 parameters; soon after it is negative."""
    return None if asked.num_parameters > 1e10 else 0.003239 - 0.0001395 * math.log(asked.num_parameters)


_NOT_READ = (math.nan, math.nan)
_POWER_LINES = {"num_tokens": _NOT_READ, "tokens_per_parameter": (20.0, 1280.0)}
_LAWS = (
    _Law(
        "Step Law", "best",
        lambda asked: 0.58 * asked.num_tokens**0.571,
        lambda asked: 1.79 * asked.num_parameters**-0.713 * asked.num_tokens**0.307,
        "AdamW, cosine to a fixed last rate", {"num_parameters": (60e6, 1.07e9), "num_tokens": (2e9, 1e11)},
        "B = 0.58 D^0.571 tokens; rate = 1.79 N^-0.713 D^0.307", "arXiv 2503.04715, eq. 1",
        "paper as quoted by others; units in the authors' fit_tool.py",
    ),
    _Law(
        "DeepSeek LLM", "best",
        lambda asked: 0.2920 * asked.compute**0.3271,
        lambda asked: 0.3118 * asked.compute**-0.1250,
        "AdamW, rate in three steps", {"compute": (1e17, 2e19)},
        "B = 0.2920 C^0.3271 tokens; rate = 0.3118 C^-0.1250; C without embeddings, with attention", "arXiv 2401.02954, eq. 1",
        "paper",
    ),
    _Law(
        "Moonlight", "best",
        lambda asked: 0.0065202 * asked.compute**0.4137915,
        lambda asked: 0.0127339 * asked.compute**-0.0574752,
        "AdamW; Muon with updates of AdamW's size", {"num_parameters": (399e6, 1.5e9), "num_tokens": (8.92e9, 38.91e9)},
        "B = 0.0065202 C^0.4137915 tokens; rate = 0.0127339 C^-0.0574752; C = 6 N D", "arXiv 2502.16982, table 9",
        "paper; unit of B from its table 2",
    ),
    _Law(
        "Power Lines", "best",
        lambda asked: 2048 * 0.0306 * asked.num_tokens**0.383,
        _no_rate, "AdamW with μP, linear to 0", _POWER_LINES,
        "B = 0.0306 D^0.383 sequences of 2,048 tokens", "arXiv 2505.13738, fig. 1",
        "restated by others; the paper's runs at 610M parameters, as quoted, agree",
    ),
    _Law(
        "MiniCPM", "best",
        lambda asked: None if asked.loss is None else 1.21e9 * asked.loss**-6.24,
        _no_rate, "μP, cosine, rate 0.01", {"num_parameters": (9e6, 170e6), "loss": _NOT_READ},
        "B = 1.21e9 / L^6.24 tokens, L on C4", "arXiv 2404.06395, section 3.2", "paper; it does not print the unit of B",
    ),
    _Law(
        "Power Lines, critical", "critical",
        lambda asked: 2048 * 0.0471 * asked.num_tokens**0.462,
        _no_rate, "AdamW with μP, linear to 0", _POWER_LINES,
        "B = 0.0471 D^0.462 sequences of 2,048 tokens, D what the smallest batches need", "arXiv 2505.13738, fig. 1", "restated by others",
    ),
    _Law(
        "Zhang et al.", "critical",
        lambda asked: 512 * 22.91 * (asked.num_tokens / 1e6) ** 0.47,
        _no_rate, "Adam, constant rate, averaged weights", {"num_parameters": (85e6, 1.2e9), "num_tokens": (1.74e9, 24.6e9)},
        "B = 22.91 (D / 10^6)^0.47 sequences of 512 tokens: 20% more updates than a small batch's share", "arXiv 2410.21676",
        "restated by others; units in the authors' chinchilla.ipynb",
    ),
    _Law(
        "Kaplan et al.", "critical", _kaplan_batch, _kaplan_rate,
        "Adam, cosine to 0; the rate is that of 2^19 tokens", {"num_parameters": (768, 1.5e9), "num_tokens": (22e6, 23e9)},
        "B = 2e8 / L^(1 / 0.21) tokens, L from N and D by eq. 1.5 unless given; rate = 0.003239 - 0.0001395 ln N", "arXiv 2001.08361, eq. 1.4, D.1",
        "paper",
    ),
)  # fmt: skip


@checked
def published_rules(
    *, num_parameters: float, num_tokens: float, sequence_length: int, compute: float | None = None, loss: float | None = None
) -> PublishedRules:
    r"""What published rules say about the batch size and learning rate of a language model, side by side. Nothing is trained.

    Every rule is an extrapolation from its authors' model, data, tokenizer and schedule. A rule that counts sequences counts those of its authors'
    length; their tokens are kept. How far the rules disagree is how little is known without a run.

    Args:
        num_parameters: of the model without embeddings, as the rules count them.
        num_tokens: that training sees.
        sequence_length: tokens in a sequence, for the batch in sequences.
        compute: training FLOPs without embeddings. Default: :math:`6 N D`. DeepSeek's also has attention, :math:`12\,n_\text{layer} d_\text{model}
            l_\text{seq}` a token.
        loss: that training is expected to end with, in nats per token, for the rules by loss. Without it MiniCPM's is left out, and Kaplan's
            follows from its own law of the loss.

    Returns:
        The rules, those for the best batch first, and their disagreement.

    Raises:
        ValueError: a number is not above 0, or larger than any training run has.

    Example:
        >>> published = published_rules(num_parameters=124e6, num_tokens=2.5e9, sequence_length=1024)
        >>> step_law = published.rules[0]
        >>> step_law.name, round(step_law.batch_tokens), round(step_law.batch_sequences), round(step_law.learning_rate, 5)
        ('Step Law', 134788, 132, 0.00233)
        >>> [rule.name for rule in published.rules if not rule.outside], round(published.disagreement["best"], 1)
        (['Step Law', 'DeepSeek LLM', 'Power Lines', 'Power Lines, critical', 'Zhang et al.', 'Kaplan et al.'], 2.0)

    References:
        Each rule names its own in ``source``, and in ``verified`` where its formula and units were read.
    """
    given = {"num_parameters": num_parameters, "num_tokens": num_tokens, "sequence_length": sequence_length, "compute": compute, "loss": loss}
    for name, value in given.items():
        if value is not None and not 1e-9 < value < 1e40:
            raise ValueError(f"{name}={value} must be above 0, and no more than a training run can have.")
    flops = 6.0 * num_parameters * num_tokens if compute is None else float(compute)
    asked = _Asked(float(num_parameters), float(num_tokens), flops, None if loss is None else float(loss))
    rules = tuple(_answer(law, asked, sequence_length, batch) for law in _LAWS if (batch := law.batch(asked)) is not None)
    values = {kind: [rule.batch_tokens for rule in rules if rule.kind == kind] for kind in ("best", "critical")}
    values["learning_rate"] = [rule.learning_rate for rule in rules if rule.learning_rate is not None]
    return PublishedRules(rules, {name: max(numbers) / min(numbers) for name, numbers in values.items()})


def _answer(law: _Law, asked: _Asked, sequence_length: int, batch: float) -> PublishedRule:
    """What a law says at a point, and whether it was fitted there."""
    outside = {name: ratio for name, ends in law.fitted.items() if (ratio := _beyond(asked.quantities[name], ends)) is not None}
    return PublishedRule(
        law.name, law.kind, batch, batch / sequence_length, law.rate(asked), law.optimizer, law.fitted, outside, law.formula, law.source, law.verified
    )


def _beyond(value: float | None, ends: tuple[float, float]) -> float | None:
    """A value ÷ the nearest end of a range, if it lies beyond it.

    Example:
        >>> _beyond(1.0, (2.0, 8.0)), _beyond(12.0, (2.0, 8.0)), _beyond(2.0, (2.0, 8.0)), _beyond(2.0, _NOT_READ)
        (0.5, 1.5, None, None)
    """
    if value is None or math.isnan(ends[0]) or ends[0] <= value <= ends[1]:
        return None
    return value / ends[0] if value < ends[0] else value / ends[1]
