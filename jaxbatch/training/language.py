r"""The task of predicting the next token of a text. An example is a sequence, and its loss is the mean over its tokens.

All sequences have the same length, so that the mean over sequences is the mean over tokens.

Axes: B sequences, T tokens of a sequence.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Integer

from jaxbatch.data.text import TextDataset, sequences
from jaxbatch.losses import correct, cross_entropy
from jaxbatch.training.tasks import Task

_TOKENS_AT_A_TIME = 4096  # on CPU, where nothing else bounds the memory of a large batch


def language_task(model, dataset: TextDataset, *, sequence_length: int = 128, microbatch_size: int | None = None) -> Task:
    """The task of a Flax Linen ``model`` that predicts the next token; the data are moved to the device once.

    Args:
        model: a module whose ``apply(variables, tokens)`` maps ``(B, T)`` tokens to logits ``(B, T, vocab_size)``, such as
            :class:`jaxbatch.TransformerLM`. It has no state, and no dropout.
        dataset: from :func:`jaxbatch.load_text`, or tokens of your own. The test metrics are taken on ``validation_tokens``. To look
            at the test text, once, replace them: ``dataset._replace(validation_tokens=dataset.test_tokens)``.
        sequence_length: T, tokens to predict in an example.
        microbatch_size: the most sequences worked on at a time; ``None``: all, on CPU as many as hold 4,096 tokens.

    Returns:
        A :class:`jaxbatch.Task`. An example is an array of T + 1 tokens. Its loss is the mean over its T tokens, in nats. Its metrics
        are ``loss``, ``bits_per_token`` (the loss in bits) and ``accuracy`` (the share of tokens whose logit is the largest).

    Raises:
        ValueError: the model is no Flax module or has other variables than parameters; its logits have another shape or too few
            classes; the tokens are no whole numbers ``(N,)`` from 0 to ``vocab_size - 1``; or a text is shorter than an example.

    Example:
        >>> from jaxbatch import TransformerLM, load_text
        >>> dataset = load_text("generated")
        >>> task = language_task(TransformerLM(dataset.vocab_size, width=32, num_layers=2), dataset, sequence_length=64)
        >>> task.num_examples, task.train_data.shape, task.test_data.shape
        (15624, (15624, 65), (1562, 65))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={type(model).__name__} is no flax.linen module. Others make a jaxbatch.Task: docs/own_model.md shows how.")
    for part in ("train", "validation"):
        _check_tokens(getattr(dataset, f"{part}_tokens"), f"dataset.{part}_tokens", dataset.vocab_size)
    example = jnp.zeros((1, sequence_length), jnp.int32)
    _check_model(model, example, dataset.vocab_size)

    def token_losses(params, batch: Integer[Array, "B T_and_1"]):
        logits: Any = model.apply(params, batch[:, :-1])
        labels = batch[:, 1:].astype(jnp.int32)
        return cross_entropy(logits, labels), correct(logits, labels)

    def loss_fn(params, batch):
        return token_losses(params, batch)[0].mean(1)

    def metrics_fn(params, batch):
        losses, hits = (values.mean(1) for values in token_losses(params, batch))
        return {"loss": losses, "bits_per_token": losses / math.log(2), "accuracy": hits}

    return Task(
        init=lambda key: model.init(key, example),
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        train_data=jnp.asarray(sequences(dataset.train_tokens, sequence_length)),
        test_data=jnp.asarray(sequences(dataset.validation_tokens, sequence_length)),
        microbatch_size=microbatch_size,
        cpu_microbatch_size=None if microbatch_size else max(1, _TOKENS_AT_A_TIME // sequence_length),
    )


def _check_tokens(tokens, name: str, vocab_size: int) -> None:
    """Refuses tokens with which training would run but give wrong results."""
    if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} are {tokens.dtype} of shape {tokens.shape} and must be whole numbers of shape (tokens,).")
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} go from {low} to {high}, and vocab_size={vocab_size} allows 0 to {vocab_size - 1}.")


def _check_model(model, example: Integer[Array, "1 T"], vocab_size: int) -> None:
    """Refuses a model whose logits do not fit the text, or which has a state."""
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), example)
    name = type(model).__name__
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(f"model={name} keeps variables in {', '.join(map(repr, others))}. language_task trains 'params' only: make a jaxbatch.Task.")
    shape = (1, example.shape[1], vocab_size)
    if logits.ndim != 3 or logits.shape[:2] != shape[:2] or logits.shape[2] < vocab_size:
        raise ValueError(f"model={name}: its logits have shape {logits.shape}, and this text needs {shape}. Set its vocab_size to {vocab_size}.")
