"""What to do with the other hyperparameters when the batch changes, each rule with its source.

No rule wins everywhere, so these are starting points. The learning rate is not among them: it is measured.
"""

import optax.tree_utils
from jaxtyping import PyTree

BETA2 = "β₂: raised to the power κ when the batch grows κ-fold, so that its half-life in examples stays the same (arXiv 2507.07101)."
DECAY = (
    "Weight decay of AdamW: multiplied by κ times the old rate ÷ the new one when the batch grows κ-fold, so that the time scale "
    "B / (rate × decay × examples) stays the same (arXiv 2405.13698)."
)
WARMUP = "Warmup: kept in examples, so its updates are divided by κ (arXiv 1706.02677); Adam wants at least 2 / (1 − β₂) updates (arXiv 1910.04209)."
MOMENTUM = "Momentum: kept (arXiv 1706.02677)."
AVERAGE = "An average of the weights: its decay is raised to the power κ (arXiv 2307.13813)."


def rules_for(opt_state: PyTree) -> list[str]:
    """The rules that concern an optimizer, by what its state holds.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> [rule.split(":")[0] for rule in rules_for(optax.sgd(0.1, momentum=0.9).init(jnp.zeros(2)))]
        ['Momentum', 'Warmup', 'An average of the weights']
    """
    holds = lambda name: bool(optax.tree_utils.tree_get_all_with_path(opt_state, name))
    first = [BETA2, DECAY] if holds("nu") else [MOMENTUM] if holds("trace") else []
    return [*first, WARMUP, AVERAGE]
