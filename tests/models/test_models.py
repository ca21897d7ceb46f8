"""The AdaBatch networks: parameter counts, initialisation, PyTorch's numbers where PyTorch is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch import models
from jaxbatch.layers import convolution

COUNTS = [
    (models.AlexNet, 10, 2_472_266),
    (models.AlexNet, 100, 2_495_396),
    (models.ResNet20, 10, 272_474),
    (models.ResNet20, 100, 278_324),
    (models.VGG19BN, 10, 20_040_522),
    (models.VGG19BN, 100, 20_086_692),
]
NETWORKS = [models.AlexNet, models.ResNet20, models.VGG19BN]
SLOW_VGG = pytest.param(models.VGG19BN, marks=pytest.mark.slow)  # to compile


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(20, 32, 32, 3)), jnp.float32)


@pytest.mark.parametrize(("network", "num_classes", "count"), COUNTS)
def test_parameter_counts(network, num_classes, count):
    shapes = jax.eval_shape(network(num_classes).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize("network", [models.ResNet20, SLOW_VGG])
def test_convolutions_start_as_published(network):
    params = jax.jit(network().init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if leaf.ndim == 4:
            features, size = leaf.shape[:2]
            np.testing.assert_allclose(leaf.std(), np.sqrt(2 / (size**2 * features)), rtol=6 / np.sqrt(leaf.size))
        elif "scale" in name:
            assert (leaf == 1).all()
        elif "Dense" not in name:
            assert (leaf == 0).all()
    dense = params["Dense_0"]
    if network is models.VGG19BN:
        np.testing.assert_allclose(dense["kernel"].std(), 0.01, rtol=0.1)
        assert (dense["bias"] == 0).all()
    else:
        assert np.abs(dense["kernel"]).max() <= 64**-0.5


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(network, images):
    variables = jax.jit(network().init)(jax.random.key(0), images[:1])
    run = lambda dtype: jax.jit(network(dtype=dtype).apply)(variables, images)
    exact, rough = run(jnp.float32), run(jnp.bfloat16)
    assert rough.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(rough, exact, atol=0.1 * np.abs(exact).max() + 1e-3)


SIDES = {models.ResNet20: {16: 32, 32: 16, 64: 8}, models.VGG19BN: {64: 32, 128: 16, 256: 8}}  # by features


@pytest.mark.parametrize("network", [models.ResNet20, SLOW_VGG])
def test_evaluation_with_the_batch_s_moments_is_training_s_forward_pass(x64, network):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(20, 32, 32, 3)))
    model = network(dtype=jnp.float64)
    params = {"params": jax.jit(model.init)(jax.random.key(0), images[:1])["params"]}
    logits, found = jax.jit(lambda p, x: model.apply(p, x, train=True, mutable=["batch_stats"]))(params, images)

    def biased(path, leaf):  # what is kept is n / (n - 1) times what normalises
        if path[-1].key != "var":
            return leaf
        number = int(path[1].key.split("_")[1])
        side = SIDES[network].get(leaf.size) or (4 if number < 12 else 2)
        pixels = 20 * side**2
        return leaf * (pixels - 1) / pixels

    moments = jax.tree_util.tree_map_with_path(biased, found)
    three = jax.jit(model.apply)({**params, **moments}, images[:3])  # whose own moments are others
    np.testing.assert_allclose(three, logits[:3], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("network", [models.AlexNet, pytest.param(models.ResNet20, marks=pytest.mark.slow), SLOW_VGG])
def test_a_step_takes_at_most_twice_the_memory_of_xla_s_own_convolutions(network, monkeypatch):
    model, images, labels = network(), jnp.zeros((128, 32, 32, 3)), jnp.zeros(128, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images[:1])["params"]

    def step_bytes():
        def loss(params, images):
            logits, statistics = model.apply({"params": params}, images, train=True, mutable=["batch_stats"])
            return jb.cross_entropy(logits, labels).mean(), statistics

        memory = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, images).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    ours = step_bytes()
    monkeypatch.setattr(convolution, "choose_conv", lambda *_, **__: "platform")
    assert ours <= 2 * step_bytes()


@pytest.mark.parametrize("network", [models.AlexNet, models.ResNet20, SLOW_VGG, pytest.param(models.ResNet50, marks=pytest.mark.slow)])
def test_loss_and_gradients_equal_pytorch_s_in_float64(x64, network):
    torch = pytest.importorskip("torch")
    from scripts.torch_networks import as_torch_weights, build

    count, side = (6, 64) if network is models.ResNet50 else (20, 32)
    images = np.random.default_rng(0).normal(size=(count, side, side, 3))
    labels = np.arange(count) % 10
    model = network(10, dtype=jnp.float64)
    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(images[:1]))["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    theirs = build(network.__name__).double().train()
    weights = {name: torch.from_numpy(value) for name, value in as_torch_weights(params, theirs).items()}
    theirs.load_state_dict(weights, strict=False)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    loss = torch.nn.functional.cross_entropy(theirs(batch), torch.from_numpy(labels))
    loss.backward()

    def ours(params):
        logits, statistics = model.apply({"params": params}, jnp.asarray(images), train=True, mutable=["batch_stats"])
        return jb.cross_entropy(logits, jnp.asarray(labels)).mean(), statistics

    (value, statistics), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-9)
    mine = as_torch_weights(gradient, theirs)
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad.numpy()
        largest = np.abs(expected).max()
        if network is models.VGG19BN and name.endswith("conv.bias"):
            assert largest < 1e-12  # a bias before batch normalisation: rounding in theirs, 0 in ours
            continue
        np.testing.assert_allclose(mine[name], expected, atol=1e-8 * largest, err_msg=name)
    for index, unit in enumerate(getattr(theirs, "units", [])):  # running = 0.9 · start + 0.1 · the batch's
        found = statistics["batch_stats"][f"ConvBatchNorm_{index}"]["BatchNorm_0"]
        np.testing.assert_allclose(found["mean"], unit.norm.running_mean.numpy() / 0.1, atol=1e-8)
        np.testing.assert_allclose(found["var"], (unit.norm.running_var.numpy() - 0.9) / 0.1, rtol=1e-8)
