"""Slow twins: the obvious way to compute what the library computes cleverly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from jaxbatch.training.plans import Progress, segments_from


def groups_of(batch, num_groups):
    """The contiguous groups of a batch, as a list."""
    size = jax.tree.leaves(batch)[0].shape[0] // num_groups
    return [jax.tree.map(lambda leaf: leaf[k * size : (k + 1) * size], batch) for k in range(num_groups)]


def group_gradients(loss_fn, params, batch, num_groups):
    """A Python loop over groups."""
    gradient = jax.jit(jax.grad(lambda p, group: loss_fn(p, group).mean()))
    gradients = [gradient(params, group) for group in groups_of(batch, num_groups)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)


def per_example_gradients(loss_fn, params, batch):
    """A Python loop over examples."""
    return group_gradients(loss_fn, params, batch, jax.tree.leaves(batch)[0].shape[0])


def mean_gradient(loss_fn, params, batch):
    """The gradient of the mean loss, in one piece."""
    return jax.jit(jax.grad(lambda p: loss_fn(p, batch).mean()))(params)


def split_backward(loss_fn, optimizer, num_groups, params, opt_state, batch):
    """A Python loop over K updates whose gradients are all taken at the incoming parameters."""
    start = params
    for group in groups_of(batch, num_groups):
        gradient = jax.grad(lambda p: loss_fn(p, group).mean())(start)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state, loss_fn(start, batch)


def gradient_statistics(loss_fn, params, batch, num_groups):
    """Signal and trace from two batch sizes, m = B / K and B, as in McCandlish et al., appendix A.1; float64."""
    size = jax.tree.leaves(batch)[0].shape[0]
    stacked = group_gradients(loss_fn, params, batch, num_groups)
    flat = np.concatenate([np.asarray(leaf, np.float64).reshape(num_groups, -1) for leaf in jax.tree.leaves(stacked)], 1)
    small, large = size / num_groups, size
    square_small, square_large = (flat**2).sum(1).mean(), (flat.mean(0) ** 2).sum()
    signal = (large * square_large - small * square_small) / (large - small)
    return signal, (square_small - square_large) / (1 / small - 1 / large)


def momentum_closed_form(params, velocity, gradients, rate, momentum):
    """theta - rate * (v * sum_j mu^j + sum_k g_k (1 - mu^(K-k+1)) / (1 - mu)), K from the gradients' leading axis."""

    def leaf(theta, v, g):
        count = g.shape[0]
        decay = sum(momentum**j for j in range(1, count + 1))
        weights = [(1 - momentum ** (count - k + 1)) / (1 - momentum) for k in range(1, count + 1)]
        return theta - rate * (v * decay + sum(w * g[k] for k, w in enumerate(weights)))

    return jax.tree.map(leaf, params, velocity, gradients)


def conv(x, kernel, strides, padding):
    """Cross-correlation by its definition: NHWC images, (O, k, k, C) kernel, loops over output pixels, float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    size = kernel.shape[1]
    rows, columns = ((n - size) // strides + 1 for n in x.shape[1:3])
    out = np.empty((x.shape[0], rows, columns, kernel.shape[0]))
    for r in range(rows):
        for c in range(columns):
            window = x[:, r * strides : r * strides + size, c * strides : c * strides + size]
            out[:, r, c] = np.einsum("bijc,oijc->bo", window, kernel)
    return out


def max_pool(x, window):
    """Maximum over windows, NHWC, loops over output pixels."""
    x = np.asarray(x)
    rows, columns = (n // window for n in x.shape[1:3])
    blocks = [[x[:, r * window : (r + 1) * window, c * window : (c + 1) * window].max((1, 2)) for c in range(columns)] for r in range(rows)]
    return np.stack([np.stack(row, 1) for row in blocks], 1)


class PlainSimpleCNN(nn.Module):
    """The study's network in Flax's own layers, for weights taken from :class:`jaxbatch.SimpleCNN`."""

    @nn.compact
    def __call__(self, x):
        for features, size in ((10, 5), (20, 5), (40, 3)):
            x = nn.relu(nn.max_pool(nn.Conv(features, (size, size), padding="VALID")(x), (2, 2), (2, 2)))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))

    @staticmethod
    def from_simple_cnn(variables):
        """Flax's (k, k, C, O) kernels from ours."""
        ours = variables["params"]
        convs = {
            f"Conv_{i}": {
                "kernel": ours[f"ConvMaxPool_{i}"]["kernel"].transpose(1, 2, 3, 0),
                "bias": ours[f"ConvMaxPool_{i}"]["bias"],
            }
            for i in range(3)
        }
        return {"params": {**convs, "Dense_0": ours["Dense_0"]}}


def step_of_shares(task, state, batch, num_devices, rate):
    """One SGD step on devices whose batch statistics are their own: each share by itself, without any filler.

    Gradients are summed, and what the shares' parts find is averaged by their numbers of examples.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    share = -(-size // num_devices)
    length = min(task.examples_at_a_time or share, share)

    def part_of_mean(params, part):
        losses, aux = task.loss_fn(params, part)
        return losses.sum() / size, (losses, aux)

    gradient, losses, model_state = jax.tree.map(jnp.zeros_like, state.params), [], state.model_state
    for start in range(0, share, length):
        found, counts = [], []
        for device in range(num_devices):
            first = device * share + start
            stop = min(first + length, (device + 1) * share, size)
            if first < stop:
                part = jax.tree.map(lambda leaf: leaf[first:stop], batch)
                one, (values, aux) = jax.grad(part_of_mean, has_aux=True)(state.params, part)
                gradient = jax.tree.map(jnp.add, gradient, one)
                losses.append(np.asarray(values))
                found.append(aux)
                counts.append(stop - first)
        mean = jax.tree.map(lambda *leaves: sum(n * leaf for n, leaf in zip(counts, leaves, strict=True)) / sum(counts), *found)
        model_state = task.update_model_state(model_state, mean)
    params = jax.tree.map(lambda p, g: p - rate * g, state.params, gradient)
    return state._replace(params=params, step=state.step + 1, model_state=model_state), np.concatenate(losses).mean()


def noise_of_parts(loss_fn, params, parts, metric=None):
    """Signal and trace by leaf from parts of any sizes: each part's gradient by itself, the formulas in float64."""
    sizes = np.array([jax.tree.leaves(part)[0].shape[0] for part in parts], np.float64)
    means = [jax.tree.leaves(mean_gradient(loss_fn, params, part)) for part in parts]
    metric = [1.0] * len(means[0]) if metric is None else [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(metric)]
    signals, traces = [], []
    for number, weight in enumerate(metric):
        own = [np.asarray(mean[number], np.float64) for mean in means]
        whole = sum(size * mean for size, mean in zip(sizes, own, strict=True)) / sizes.sum()
        within = sum(size * (weight * (mean - whole) ** 2).sum() for size, mean in zip(sizes, own, strict=True))
        traces.append(within / (len(parts) - 1))
        signals.append((weight * whole**2).sum() - traces[-1] / sizes.sum())
    return np.array(signals), np.array(traces)


def token_mean_gradient(token_loss, params, batch):
    """The mean loss of all tokens that count, and its gradient: the others are cut out first. Zeros if no token counts."""
    counts = np.asarray(batch["counts"])
    kept = {name: np.asarray(leaf)[counts] for name, leaf in batch.items() if name != "counts"}
    if not counts.any():
        return 0.0, jax.tree.map(jnp.zeros_like, params)
    return jax.value_and_grad(lambda p: token_loss(p, kept).mean())(params)


def token_steps(token_loss, optimizer, params, batches, num_groups=1):
    """A Python loop over batches, and in each over K updates from the means of the groups' own tokens; the batches' mean losses."""
    opt_state, losses = optimizer.init(params), []
    for batch in batches:
        start = params
        losses.append(float(token_mean_gradient(token_loss, start, batch)[0]))
        for group in groups_of(batch, num_groups):
            updates, opt_state = optimizer.update(token_mean_gradient(token_loss, start, group)[1], opt_state, params)
            params = optax.apply_updates(params, updates)
    return params, np.array(losses)


def noise_of_weighted_parts(gradients, weights, batch_size):
    """Signal and trace from the products of all pairs of different parts; gradients of summed losses, (P, dimensions)."""
    gradients, weights = np.asarray(gradients, np.float64), np.asarray(weights, np.float64)
    pairs = [(j, k) for j in range(len(weights)) for k in range(len(weights)) if j != k]
    signal = sum(gradients[j] @ gradients[k] for j, k in pairs) / sum(weights[j] * weights[k] for j, k in pairs)
    return signal, batch_size * (((gradients.sum(0) / weights.sum()) ** 2).sum() - signal)


def attend(query, key, value, mask):
    """Softmax attention of every head, with all scores at once; axes (B, heads, T, D)."""
    scores = query @ jnp.swapaxes(key, -1, -2) / jnp.sqrt(query.shape[-1])
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1) @ value


def coupled_gradient(loss_fn, encode, params, batch):
    """Losses of a whole batch's representations and the gradient of their mean, in one piece."""

    def mean(params):
        losses = loss_fn(params, encode(params, batch))
        return losses.mean(), losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return losses, gradient


def dense_hessian(loss_fn, params, batch):
    """The matrix itself, of the mean loss of examples without weights."""
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.hessian(lambda w: loss_fn(unravel(w), batch).mean())(flat))


def smoothed_cross_entropy(logits, labels, smoothing):
    """The cross-entropy with the target distribution written out: a share of ``smoothing`` for all classes alike; float64."""
    losses = []
    for row, label in zip(np.asarray(logits, np.float64), np.asarray(labels), strict=True):
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1 - smoothing
        losses.append(-(target * (row - np.log(np.exp(row - row.max()).sum()) - row.max())).sum())
    return np.array(losses)


def plan_segments(config, num_examples, *, start=Progress()):
    """All segments of a plan at once."""
    return list(segments_from(config, num_examples, start))
