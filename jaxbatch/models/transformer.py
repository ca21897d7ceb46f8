r"""A small transformer that predicts the next token, in Flax Linen: ``model.apply(variables, tokens) -> logits``.

Several short texts may share one row of tokens (*packing*). Then ``segments`` says which text each token belongs to; attention
and positions stay within a text, so that its logits are those of the text alone.

Axes: B sequences, T tokens, D channels of a head.
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Integer

from jaxbatch.machine.platform import compiled_platform

Positions = Literal["rotary", "learned"]

_ROTARY_BASE = 10_000.0
_EPSILON = 1e-6  # of the norms


class TransformerLM(nn.Module):
    r"""A decoder-only transformer; 820,352 parameters by default.

    Each layer adds attention to its input, then a two-layer network with GELU (tanh form). Both read an RMSNorm of their input
    (*pre-norm*), and a last RMSNorm stands before the head. No layer has a bias. With V = ``vocab_size``, W = ``width``,
    L = ``num_layers`` and E = ``expansion``, there are

    .. math:: V W + L\,((4 + 2E)\,W^2 + 2 W) + W

    parameters, V W more with ``tied_head=False``, and ``max_length`` · W more with learned positions.

    Weights start as GPT-2's do: normal with standard deviation 0.02, and :math:`0.02 / \sqrt{2L}` for the two matrices of a layer
    whose result is added to its input, because 2L such results add up. Scales of the norms start at 1.

    ``dtype`` is that of the matrix products. Parameters, norms, softmax and logits are float32 at least.

    Args:
        tokens: whole numbers below ``vocab_size``, in the call. A token out of range makes the logits NaN.
        segments: in the call, the number of the text that a token belongs to. A run of equal numbers is one text: positions
            restart with it, and attention does not leave it. Padding is a text of its own, such as number 0; leave it out of the
            loss. ``None``: each row is one text.

    Returns:
        Logits ``(B, T, vocab_size)``. Those at place t depend on tokens 0 to t, and predict token t + 1.

    Raises:
        ValueError: ``width`` is not a multiple of ``num_heads``; a head has an odd number of channels, which rotary positions cannot
            have; or learned positions get more than ``max_length`` tokens.

    Example:
        >>> import jax
        >>> shapes = jax.eval_shape(TransformerLM().init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        820352

    References:
        Radford et al., `Language Models are Unsupervised Multitask Learners
        <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>`_, 2019, section 2.3;
        Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021: rotary positions; Zhang and Sennrich, `Root Mean Square Layer
        Normalization <https://arxiv.org/abs/1910.07467>`_, 2019.
    """

    vocab_size: int = 256
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    expansion: int = 4  # width of a layer's inner network, in widths
    positions: Positions = "rotary"
    tied_head: bool = True  # the head is the embedding's transpose
    max_length: int = 1024  # tokens; only of learned positions
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Integer[Array, "B T"], segments: Integer[Array, "B T"] | None = None) -> Float[Array, "B T vocab"]:
        _check_sizes(self, tokens.shape[1])
        wide = jnp.promote_types(self.dtype, jnp.float32)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=_normal(), name="embed")
        starts = _text_starts(tokens, segments)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] - starts
        tokens = tokens.astype(jnp.int32)
        x = embed(jnp.where(tokens < 0, self.vocab_size, tokens)).astype(self.dtype)  # NaN for what is no token; JAX counts -1 from the end
        if self.positions == "learned":
            x = x + nn.Embed(self.max_length, self.width, embedding_init=_normal(), name="positions")(positions).astype(self.dtype)
        mask = jnp.tril(jnp.ones((1, 1, *2 * tokens.shape[1:]), bool)) & (starts[:, None, :, None] == starts[:, None, None, :])
        angles = rotary_angles(positions, self.width // self.num_heads) if self.positions == "rotary" else None
        x = x.reshape(-1, self.width)  # XLA:CPU transposes all activations to compute the gradient of a kernel that meets three axes
        for index in range(self.num_layers):
            x = _Layer(self.num_layers, self.num_heads, self.expansion, self.dtype, name=f"layer_{index}")(x, angles, mask)
        x = _norm(wide, "norm")(x)
        if self.tied_head:
            logits = x @ embed.embedding.astype(wide).T
        else:
            logits = nn.Dense(self.vocab_size, use_bias=False, kernel_init=_normal(), dtype=wide, name="head")(x)
        return logits.reshape(*tokens.shape, -1)


class _Layer(nn.Module):
    """Attention and a two-layer network, each added to its input, ``(B · T, width)``."""

    num_layers: int
    num_heads: int
    expansion: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N width"], angles: Float[Array, "_ T half"] | None, mask: Bool[Array, "_ 1 T T"]) -> Float[Array, "N width"]:
        width, length = x.shape[1], mask.shape[-1]

        def dense(features: int, name: str, layers: int = 0):
            return nn.Dense(features, use_bias=False, kernel_init=_normal(layers), dtype=self.dtype, name=name)

        y = dense(3 * width, "qkv")(_norm(self.dtype, "attention_norm")(x))
        query, key, value = y.reshape(-1, length, 3, self.num_heads, width // self.num_heads).transpose(2, 0, 3, 1, 4)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        attended = attend(query, key, value, mask, _queries_at_a_time(length)).swapaxes(1, 2).reshape(x.shape)
        x = x + dense(width, "attention_out", self.num_layers)(attended)
        y = dense(self.expansion * width, "up")(_norm(self.dtype, "network_norm")(x))
        return x + dense(width, "down", self.num_layers)(nn.gelu(y, approximate=True))


def rotary_angles(positions: Int32[Array, "B T"], channels: int) -> Float[Array, "B T half"]:
    r"""The angle by which each pair of a head's channels is turned at each place: :math:`t \cdot 10000^{-2i/D}` for pair i.

    Example:
        >>> rotary_angles(jnp.array([[0, 1]], jnp.int32), 2).tolist()
        [[[0.0], [1.0]]]
    """
    speeds = _ROTARY_BASE ** (-jnp.arange(0, channels, 2, dtype=jnp.result_type(float)) / channels)
    return positions[..., None] * speeds[None, None]


def rotate(x: Float[Array, "B heads T D"], angles: Float[Array, "_ T half"]) -> Float[Array, "B heads T D"]:
    """Turns channel i and channel i + D/2 of each head, as a point of the plane, by ``angles``.

    The product of a rotated query and a rotated key depends on their places only by the difference of the two.

    Example:
        >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.full((1, 1, 1), jnp.pi / 2)).round(3).tolist()
        [[[[-1.0, 1.0]]]]
    """
    sine, cosine = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)


def attend(
    query: Float[Array, "B heads T D"],
    key: Float[Array, "B heads T D"],
    value: Float[Array, "B heads T D"],
    mask: Bool[Array, "_ 1 T T"],
    at_a_time: int,
) -> Float[Array, "B heads T D"]:
    """Causal softmax attention, computed in float32 at least, for so many queries at a time.

    Queries that are worked on together get the keys up to the last of them, so that half of all scores, at best, are not computed.
    ``jax.nn.dot_product_attention`` would compute them all, and round float64 to float32 on the way.

    Args:
        query, key, value: of each head.
        mask: True where query t may look at key s. Every query must look at one key at least, and at none after it.
        at_a_time: queries worked on together.

    Example:
        >>> x = jnp.arange(3.0)[None, None, :, None]  # with keys of 0, every query takes the mean of the values up to its own
        >>> attend(x, 0 * x, x, jnp.tril(jnp.ones((1, 1, 3, 3), bool)), 2).ravel().tolist()
        [0.0, 0.5, 1.0]
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    length, results = query.shape[2], []
    for start in range(0, length, at_a_time):
        end = min(start + at_a_time, length)
        scores = jnp.einsum("bhtd,bhsd->bhts", query[:, :, start:end], key[:, :, :end], preferred_element_type=wide) / query.shape[-1] ** 0.5
        scores = jnp.where(mask[:, :, start:end, :end], scores, -jnp.inf)
        powers = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        summed = jnp.einsum("bhts,bhsd->bhtd", powers.astype(value.dtype), value[:, :, :end], preferred_element_type=wide)
        results.append((summed / powers.sum(-1, keepdims=True)).astype(value.dtype))
    return jnp.concatenate(results, 2)


def _queries_at_a_time(length: int) -> int:
    """On CPU 64, or an eighth of a long text, so that programs stay small; elsewhere all, which is one kernel."""
    return max(64, -(-length // 8)) if compiled_platform() == "cpu" else length


def _text_starts(tokens: Integer[Array, "B T"], segments: Integer[Array, "B T"] | None) -> Int32[Array, "_ T"]:
    """The place at which the text of each token begins; ``(1, T)`` if rows are one text each."""
    if segments is None:
        return jnp.zeros((1, tokens.shape[1]), jnp.int32)
    begins = segments[:, 1:] != segments[:, :-1]
    numbers = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None]
    starts = lax.cummax(jnp.where(begins, numbers, 0), axis=1)
    return jnp.pad(starts, ((0, 0), (1, 0)))


def _norm(dtype, name: str) -> nn.RMSNorm:
    """RMSNorm in float32 at least, its result in ``dtype``."""
    return nn.RMSNorm(epsilon=_EPSILON, dtype=dtype, name=name)


def _normal(layers: int = 0):
    """GPT-2's start; ``layers``: the depth of the network, for a matrix whose result is added to the input of its layer."""
    return nn.initializers.normal(0.02 / (2 * layers) ** 0.5 if layers else 0.02)


def _check_sizes(model: TransformerLM, length: int) -> None:
    channels, rest = divmod(model.width, model.num_heads)
    if rest:
        raise ValueError(f"width={model.width} must be a multiple of num_heads={model.num_heads}.")
    if model.positions not in ("rotary", "learned"):
        raise ValueError(f"positions={model.positions!r} must be 'rotary' or 'learned'.")
    if model.positions == "rotary" and channels % 2:
        raise ValueError(f"width={model.width} and num_heads={model.num_heads} give heads of {channels} channels; rotary positions need even ones.")
    if model.positions == "learned" and length > model.max_length:
        raise ValueError(f"{length} tokens are more than max_length={model.max_length}: raise it, or take positions='rotary'.")
