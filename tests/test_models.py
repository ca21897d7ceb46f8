"""The AdaBatch networks: parameter counts, initialisation, PyTorch's numbers where PyTorch is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch import models

COUNTS = [
    (models.AlexNet, 10, 2_472_266),
    (models.AlexNet, 100, 2_495_396),
    (models.ResNet20, 10, 272_474),
    (models.ResNet20, 100, 278_324),
    (models.VGG19BN, 10, 20_040_522),
    (models.VGG19BN, 100, 20_086_692),
]
NETWORKS = [models.AlexNet, models.ResNet20, models.VGG19BN]


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(20, 32, 32, 3)), jnp.float32)


@pytest.mark.parametrize(("network", "num_classes", "count"), COUNTS)
def test_parameter_counts(network, num_classes, count):
    shapes = jax.eval_shape(network(num_classes).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize("network", [models.ResNet20, models.VGG19BN])
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


@pytest.mark.parametrize("network", [models.ResNet20, models.VGG19BN])
def test_statistics_are_the_batch_s_own_and_serve_at_evaluation(network, images):
    model = network()
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, statistics = train({"params": variables["params"]}, images)
    # Evaluated with the batch's own moments, the network gives nearly what it gave in training.
    out = jax.jit(model.apply)({"params": variables["params"], **statistics}, images)
    correlation = np.corrcoef(np.ravel(out), np.ravel(logits))[0, 1]
    assert correlation > 0.98  # the unbiased variances make the difference
    assert np.abs(out).max() > 0


@pytest.mark.parametrize("network", NETWORKS)
def test_loss_and_gradients_equal_pytorch_s_in_float64(x64, network):
    torch = pytest.importorskip("torch")
    from scripts.torch_networks import as_torch_weights, build

    images = np.random.default_rng(0).normal(size=(20, 32, 32, 3))
    labels = np.arange(20) % 10
    model = network(dtype=jnp.float64)
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
