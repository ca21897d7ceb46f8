"""The transformer: its size, what its attention may see, packed texts, PyTorch's numbers, gradients of its sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.models.transformer import attend, rotary_angles, rotate
from tests import reference

KINDS = list(itertools.product(("rotary", "learned"), (True, False)))  # positions, tied head
IDS = [f"{positions}-{'tied' if tied else 'untied'}" for positions, tied in KINDS]


def small(**settings):
    return jb.TransformerLM(**{"vocab_size": 13, "width": 16, "num_layers": 2, "num_heads": 2, "max_length": 24} | settings)


def some_tokens(*shape, vocab_size=13):
    return jnp.asarray(np.random.default_rng(0).integers(0, vocab_size, shape), jnp.int32)


def start(model, scale=4.0):
    """Parameters away from their small start, so that every part of the network matters."""
    variables = jax.jit(model.init)(jax.random.key(0), some_tokens(1, 4))
    return jax.tree.map(lambda leaf: scale * leaf, variables)


@pytest.mark.parametrize(("vocab_size", "width", "layers", "heads", "expansion"), [(13, 16, 2, 2, 4), (256, 128, 4, 4, 4), (50, 24, 3, 3, 2)])
@pytest.mark.parametrize(("positions", "tied"), KINDS, ids=IDS)
def test_the_number_of_parameters(vocab_size, width, layers, heads, expansion, positions, tied):
    model = jb.TransformerLM(vocab_size, width, layers, heads, expansion, positions, tied, max_length=40)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.uint8))
    expected = vocab_size * width + layers * ((4 + 2 * expansion) * width**2 + 2 * width) + width
    expected += (not tied) * vocab_size * width + (positions == "learned") * 40 * width
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_weights_start_as_gpt_2_s():
    params = jax.jit(jb.TransformerLM(positions="learned", tied_head=False).init)(jax.random.key(1), some_tokens(1, 4))["params"]
    assert len(jax.tree.leaves(params)) == 3 + 1 + 4 * 6
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            assert (leaf == 1).all()
            continue
        added_up = "attention_out" in name or "down" in name
        np.testing.assert_allclose(leaf.std(), 0.02 / np.sqrt(8) if added_up else 0.02, rtol=6 / np.sqrt(leaf.size))


@pytest.mark.parametrize(("positions", "tied"), KINDS, ids=IDS)
def test_a_token_changes_no_earlier_logit(positions, tied):
    model = small(positions=positions, tied_head=tied)
    tokens, variables, run = some_tokens(2, 10), start(model), jax.jit(model.apply)
    logits = run(variables, tokens)
    assert logits.shape == (2, 10, 13)
    for place in (0, 4, 9):
        other = run(variables, tokens.at[:, place].set((tokens[:, place] + 1) % 13))
        np.testing.assert_array_equal(other[:, :place], logits[:, :place])
        assert (jnp.abs(other[:, place:] - logits[:, place:]).max((0, 2)) > 1e-4).all()  # but every later one


@pytest.mark.parametrize(("positions", "tied"), KINDS, ids=IDS)
def test_a_packed_text_has_the_logits_of_the_text_alone(x64, positions, tied):
    model = small(positions=positions, tied_head=tied, dtype=jnp.float64)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start(model))
    tokens = some_tokens(2, 12)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [3] * 1 + [1] * 8 + [3] * 3])  # a number may come again: it is another text
    packed = model.apply(variables, tokens, segments)
    for row, pieces in enumerate([((0, 5), (5, 9), (9, 12)), ((0, 1), (1, 9), (9, 12))]):
        for first, stop in pieces:
            alone = model.apply(variables, tokens[row : row + 1, first:stop])
            np.testing.assert_allclose(packed[row, first:stop], alone[0], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(model.apply(variables, tokens, jnp.ones_like(tokens)), model.apply(variables, tokens), rtol=1e-12, atol=1e-13)


def test_padding_has_no_effect_on_the_gradient():
    model = small()
    variables, tokens = start(model), some_tokens(1, 9)
    segments = jnp.array([[1] * 6 + [0] * 3])

    def loss(variables, tokens):
        losses = jb.cross_entropy(model.apply(variables, tokens, segments)[0, :5], tokens[0, 1:6])
        return losses.mean()

    gradient = jax.jit(jax.grad(loss))
    one, other = gradient(variables, tokens), gradient(variables, tokens.at[0, 6:].set(0))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_rotary_scores_depend_on_the_difference_of_places():
    random = np.random.default_rng(0)
    query, key = (jnp.asarray(random.normal(size=(1, 2, 7, 8)), jnp.float32) for _ in range(2))

    def scores(shift):
        angles = rotary_angles(jnp.arange(7, dtype=jnp.int32)[None] + shift, 8)
        return jnp.einsum("bhtd,bhsd->bhts", rotate(query, angles), rotate(key, angles))

    np.testing.assert_allclose(scores(50), scores(0), atol=2e-5)
    places = jnp.arange(7, dtype=jnp.int32)[None]
    mixed = jnp.einsum("bhtd,bhsd->bhts", rotate(query, rotary_angles(places + 1, 8)), rotate(key, rotary_angles(places, 8)))
    assert jnp.abs(mixed - scores(0)).max() > 0.1
    norms = jnp.linalg.norm(rotate(query, rotary_angles(places, 8)), axis=-1)
    np.testing.assert_allclose(norms, jnp.linalg.norm(query, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 3, 4, 7, 10, 64])
def test_attention_is_the_same_however_many_queries_go_together(at_a_time):
    random = np.random.default_rng(1)
    query, key, value, out = random.normal(size=(4, 2, 3, 10, 4))
    allowed = np.tril(np.ones((2, 1, 10, 10), bool)) & (random.random((2, 1, 10, 10)) < 0.7) | np.eye(10, dtype=bool)
    with jax.enable_x64(True):
        (found, backward), (expected, slow_backward) = (
            jax.vjp(function, *map(jnp.asarray, (query, key, value)))
            for function in (lambda *parts: attend(*parts, jnp.asarray(allowed), at_a_time), lambda *parts: reference.attend(*parts, allowed))
        )
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        for one, other in zip(backward(jnp.asarray(out)), slow_backward(jnp.asarray(out)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_attention_s_scores_may_be_large():
    query = jnp.full((1, 1, 3, 2), 300.0)
    value = jnp.stack([jnp.arange(3.0), 2 * jnp.arange(3.0)], -1)[None, None]
    out = attend(query, query, value, jnp.tril(jnp.ones((1, 1, 3, 3), bool)), 2)
    np.testing.assert_allclose(out[0, 0], [[0.0, 0.0], [0.5, 1.0], [1.0, 2.0]], rtol=1e-6)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters_and_logits():
    variables, tokens = start(small(), 2.0), some_tokens(3, 20)
    exact, rough = (jax.jit(small(dtype=dtype).apply)(variables, tokens) for dtype in (jnp.float32, jnp.bfloat16))
    fresh = jax.eval_shape(small(dtype=jnp.bfloat16).init, jax.random.key(0), tokens)
    assert rough.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    assert 0 < np.abs(rough - exact).max() < 0.03 * np.abs(exact).max()
    one, other = (
        jax.jit(jax.grad(lambda p: sequence_losses(small(dtype=dtype))(p, tokens).mean()))(variables) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(other)} == {jnp.dtype("float32")}
    assert jb.cosine_similarity(one, other) > 0.999


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "width=16 must be a multiple of num_heads=3."),
        ({"num_heads": 16}, "width=16 and num_heads=16 give heads of 1 channels; rotary positions need even ones."),
        ({"positions": "learned", "max_length": 7}, "8 tokens are more than max_length=7: raise it, or take positions='rotary'."),
    ],
)
def test_sizes_that_cannot_be(settings, message):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(small(**settings).init, jax.random.key(0), some_tokens(1, 8))
    assert str(error.value) == message


def sequence_losses(model):
    """The mean loss of each sequence's tokens."""
    return lambda variables, tokens: jb.cross_entropy(model.apply(variables, tokens[:, :-1]), tokens[:, 1:]).mean(1)


@pytest.mark.parametrize(("positions", "tied"), KINDS, ids=IDS)
def test_loss_and_gradients_equal_pytorch_s_in_float64(x64, positions, tied):
    torch = pytest.importorskip("torch")
    from scripts.torch_networks import TransformerLM, as_torch_transformer

    model = small(positions=positions, tied_head=tied, dtype=jnp.float64)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start(model)["params"])
    tokens = np.array(some_tokens(5, 12), np.int64)
    theirs = TransformerLM(13, 16, 2, 2, positions == "rotary", tied, 24).double()
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in as_torch_transformer(params).items()})
    logits = theirs(torch.from_numpy(tokens[:, :-1]))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten())
    loss.backward()
    loss_fn = sequence_losses(model)
    value, gradient = jax.jit(jax.value_and_grad(lambda params: loss_fn({"params": params}, jnp.asarray(tokens)).mean()))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-9)
    mine = as_torch_transformer(gradient)
    assert set(mine) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad.numpy()
        np.testing.assert_allclose(mine[name], expected, atol=1e-8 * np.abs(expected).max(), err_msg=name)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's attention under vmap
def test_gradients_of_sequences_equal_those_of_torch_func_in_float64(x64):
    torch = pytest.importorskip("torch")
    from scripts.torch_networks import TransformerLM, as_torch_transformer

    model = small(dtype=jnp.float64)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start(model)["params"])
    tokens = np.array(some_tokens(4, 9), np.int64)
    theirs = TransformerLM(13, 16, 2, 2).double()
    weights = {name: torch.from_numpy(value) for name, value in as_torch_transformer(params).items()}

    def loss(weights, one):
        logits = torch.func.functional_call(theirs, weights, (one[None, :-1],))
        return torch.nn.functional.cross_entropy(logits[0], one[1:])

    expected = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, torch.from_numpy(tokens))
    ours = jb.per_example_gradients(sequence_losses(model), {"params": params}, jnp.asarray(tokens))["params"]
    for index in range(4):
        mine = as_torch_transformer(jax.tree.map(lambda leaf: leaf[index], ours))
        for name, value in mine.items():
            largest = np.abs(expected[name][index].numpy()).max()
            np.testing.assert_allclose(value, expected[name][index].numpy(), atol=1e-9 * largest, err_msg=name)


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, other)


@pytest.mark.parametrize(("positions", "tied"), [pytest.param(*KINDS[0], marks=pytest.mark.slow), KINDS[3]], ids=[IDS[0], IDS[3]])
def test_gradients_of_sequences_and_groups_are_those_of_loops_in_float64(x64, positions, tied):
    model = small(positions=positions, tied_head=tied, dtype=jnp.float64)
    variables, tokens = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start(model)), some_tokens(6, 9)
    loss_fn = sequence_losses(model)
    close(jb.per_example_gradients(loss_fn, variables, tokens), reference.per_example_gradients(loss_fn, variables, tokens))
    expected = reference.group_gradients(loss_fn, variables, tokens, 3)
    for method in ("map", "vmap", "unroll"):
        close(jb.group_gradients(loss_fn, variables, tokens, 3, method=method), expected)
    close(jb.accumulated_gradient(loss_fn, variables, tokens, 4), reference.mean_gradient(loss_fn, variables, tokens))
    optimizer = optax.adamw(0.01)
    found = jb.split_backward(loss_fn, optimizer, 3)(variables, optimizer.init(variables), tokens)
    close(found, reference.split_backward(loss_fn, optimizer, 3, variables, optimizer.init(variables), tokens))
