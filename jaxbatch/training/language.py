r"""The task of predicting the next token of a text: of one long text cut into sequences, or of many texts packed into rows.

Sequences cut from a text have the same length, so that the mean over sequences is the mean over tokens. Packed rows have padding
and beginnings of texts, which predict nothing; so a row's loss is a total with a weight, the tokens that it predicts.

Axes: B sequences, T tokens of a sequence.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from jaxtyping import Array, Integer

from jaxbatch.data.packing import PADDING, PackedText
from jaxbatch.data.text import TextDataset, sequences
from jaxbatch.hints import no_linen_module
from jaxbatch.kinds import checked
from jaxbatch.losses.classification import correct, cross_entropy
from jaxbatch.sums import Weighted
from jaxbatch.training.tasks import Task

_TOKENS_AT_A_TIME = 2048  # on CPU, where more do not stay in the cache


@checked
def language_task(model, dataset: TextDataset, *, sequence_length: int = 128, microbatch_size: int | None = None) -> Task:
    """The task of a Flax Linen ``model`` that predicts the next token; the data are moved to the device once.

    Args:
        model: a module whose ``apply(variables, tokens)`` maps ``(B, T)`` tokens to logits ``(B, T, vocab_size)``, such as
            :class:`jaxbatch.TransformerLM`. It has no state, and no dropout.
        dataset: from :func:`jaxbatch.load_text`, or tokens of your own. The test metrics are taken on ``validation_tokens``. To look
            at the test text, once, replace them: ``dataset._replace(validation_tokens=dataset.test_tokens)``.
        sequence_length: T, tokens to predict in an example.
        microbatch_size: the most sequences worked on at a time; ``None``: all, on CPU as many as hold 2,048 tokens.

    Returns:
        A :class:`jaxbatch.Task`. An example is an array of T + 1 tokens. Its loss is the mean over its T tokens, in nats. Its metrics
        are ``loss``, ``bits_per_token`` (the loss in bits) and ``accuracy`` (the share of tokens whose logit is the largest).
        Durations may be in tokens, ``jaxbatch.tokens(10**7)``, and records count the ``tokens`` seen.

    Raises:
        ValueError: the model is not a Flax module or has other variables than parameters; its logits have another shape or too few
            classes; the tokens are not whole numbers ``(N,)`` from 0 to ``vocab_size - 1``; or a text is shorter than an example.

    Example:
        >>> from jaxbatch import TransformerLM, load_text
        >>> dataset = load_text("generated")
        >>> task = language_task(TransformerLM(dataset.vocab_size, width=32, num_layers=2), dataset, sequence_length=64)
        >>> task.num_examples, task.train_data.shape, task.test_data.shape
        (15624, (15624, 65), (1562, 65))
    """
    for part in ("train", "validation"):
        _check_tokens(getattr(dataset, f"{part}_tokens"), f"dataset.{part}_tokens", dataset.vocab_size)
    example = jnp.zeros((1, sequence_length), jnp.int32)
    _check_model(model, dataset.vocab_size, example)

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
        tokens_per_example=sequence_length,
    )


@checked
def packed_language_task(model, train: PackedText, validation: PackedText, vocab_size: int, *, microbatch_size: int | None = None) -> Task:
    """The task of a Flax Linen ``model`` that predicts the next token of many texts, packed into rows.

    Padding and the first token of a text are not predicted. Attention and positions stay within a text, so that its loss is
    that of the text alone. Means are per predicted token over the whole batch (:class:`jaxbatch.Weighted`), however it is cut.

    Args:
        model: a module whose ``apply(variables, tokens, segments)`` maps ``(B, T)`` tokens to logits ``(B, T, vocab_size)``, such as
            :class:`jaxbatch.TransformerLM`. It has no state, and no dropout.
        train, validation: from :func:`jaxbatch.pack_texts`.
        vocab_size: tokens are whole numbers below it.
        microbatch_size: as in :func:`language_task`.

    Returns:
        A :class:`jaxbatch.Task`. An example is a pair of arrays of T + 1 numbers: tokens, and the texts that they belong to. Losses
        and metrics, named as those of :func:`language_task`, are :class:`jaxbatch.Weighted`: totals over a row's predicted
        tokens, and their number. ``tokens_per_example`` is T, padding included.

    Raises:
        ValueError: as :func:`language_task`; or tokens and segments have different shapes.

    Example:
        >>> import numpy as np
        >>> from jaxbatch import TransformerLM, pack_texts
        >>> texts = [np.arange(length) for length in (3, 9, 5, 6)]
        >>> task = packed_language_task(TransformerLM(9, 8, 1, 2), pack_texts(texts, 8), pack_texts(texts, 8), 9)
        >>> losses = task.loss_fn(task.init(jax.random.key(0)), jax.tree.map(jnp.asarray, task.train_data))
        >>> losses.weight.tolist()  # 2 + 4 tokens, 8 tokens, 5 tokens
        [6.0, 8.0, 5.0]
    """
    for name, packed in (("train", train), ("validation", validation)):
        if packed.tokens.ndim != 2 or packed.tokens.shape != packed.segments.shape:
            raise ValueError(f"{name}: tokens {packed.tokens.shape} and segments {packed.segments.shape} must have one shape (rows, tokens).")
        _check_tokens(packed.tokens.reshape(-1), f"{name}.tokens", vocab_size)
    length = train.tokens.shape[1] - 1
    example = jnp.zeros((1, length), jnp.int32)
    _check_model(model, vocab_size, example, example)

    def row_losses(params, batch: PackedText):
        tokens, segments = batch
        logits: Any = model.apply(params, tokens[:, :-1], segments[:, :-1])
        labels = jnp.asarray(tokens[:, 1:], jnp.int32)
        predicted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != PADDING)
        kept = [jnp.where(predicted, values, 0).sum(1) for values in (cross_entropy(logits, labels), correct(logits, labels))]
        return kept, predicted.sum(1).astype(kept[0].dtype)

    def loss_fn(params, batch):
        (losses, _), weight = row_losses(params, batch)
        return Weighted(losses, weight)

    def metrics_fn(params, batch):
        (losses, hits), weight = row_losses(params, batch)
        return {"loss": Weighted(losses, weight), "bits_per_token": Weighted(losses / math.log(2), weight), "accuracy": Weighted(hits, weight)}

    return Task(
        init=lambda key: model.init(key, example, example),
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        train_data=PackedText(*map(jnp.asarray, train)),
        test_data=PackedText(*map(jnp.asarray, validation)),
        microbatch_size=microbatch_size,
        cpu_microbatch_size=None if microbatch_size else max(1, _TOKENS_AT_A_TIME // length),
        tokens_per_example=length,
    )


def _check_tokens(tokens, name: str, vocab_size: int) -> None:
    """Refuses tokens with which training would run but give wrong results."""
    if not hasattr(tokens, "dtype"):
        raise ValueError(f"{name} is a {type(tokens).__name__} and must be an array of whole numbers of shape (tokens,): use numpy.asarray.")
    if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} are {tokens.dtype} of shape {tokens.shape} and must be whole numbers of shape (tokens,).")
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} go from {low} to {high}, and vocab_size={vocab_size} allows 0 to {vocab_size - 1}.")


def _check_model(model, vocab_size: int, *inputs: Integer[Array, "1 T"]) -> None:
    """Refuses a model whose logits do not fit the text, or which has a state."""
    if not isinstance(model, nn.Module):
        raise ValueError(no_linen_module(model))
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    name = type(model).__name__
    try:
        jax.eval_shape(model.apply, variables, *inputs)
    except errors.InvalidRngError:
        raise ValueError(
            f"model={name} needs random numbers, as for dropout, which language_task does not give. Make a jaxbatch.Task whose batches hold a key "
            "for each example: docs/recipes.md shows how."
        ) from None
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(f"model={name} keeps variables in {', '.join(map(repr, others))}. language_task trains 'params' only: make a jaxbatch.Task.")
    shape = (1, inputs[0].shape[1], vocab_size)
    if logits.ndim != 3 or logits.shape[:2] != shape[:2] or logits.shape[2] < vocab_size:
        raise ValueError(f"model={name}: its logits have shape {logits.shape}, and this text needs {shape}. Set its vocab_size to {vocab_size}.")
