"""Benchmarks of gradients: the split step, and one gradient for each example."""

import jax
import optax
from jax.flatten_util import ravel_pytree
from side_by_side import IN_A_ROW, MOMENTUM, RATE, in_a_row, make_rows, random_task, start_peer, time_contenders
from torch_peer import is_installed

import jaxbatch as jb
from experiments.split_backward.steps import make_masked_step
from jaxbatch.gradients.groups import check_num_groups
from jaxbatch.training.train_state import init_state


def split(rounds: int, batch_size: int, num_groups: int) -> list[dict]:
    """Compares a split step with a plain step, the naive way in JAX, and PyTorch's ways; and the same step with its parameters as one vector.

    An update of a tree is a small program for each leaf, which counts where a device is idle between them. The vector's rows have it as
    ``ours``, with the step on the tree among its peers.
    """
    check_num_groups(num_groups, batch_size)
    task, optimizer = random_task(jb.SimpleCNN(), batch_size), optax.sgd(RATE, MOMENTUM)
    params = init_state(task, optimizer, 0).params
    arguments = (params, optimizer.init(params), task.train_data)
    plain = jb.split_backward(task.loss_fn, optimizer, 1, microbatch_size=task.examples_at_a_time)
    ours = jb.split_backward(task.loss_fn, optimizer, num_groups, microbatch_size=task.examples_at_a_time)
    naive = make_masked_step(task.loss_fn, optimizer, num_groups)
    vector, unravel = ravel_pytree(params)
    of_vector = jb.split_backward(
        lambda vector, batch: task.loss_fn(unravel(vector), batch), optimizer, num_groups, microbatch_size=task.examples_at_a_time
    )
    vector_arguments = (vector, optimizer.init(vector), task.train_data)
    contenders = {
        "ours": lambda: ours(*arguments),
        "plain step": lambda: plain(*arguments),
        "naive: masked cotangents": lambda: naive(*arguments),
        "parameters as one vector": lambda: of_vector(*vector_arguments),
    }
    peer = start_peer(task, params, "SimpleCNN", batch_size, num_groups)
    if peer:
        contenders["torch retain_graph"] = lambda: peer.run("retain_graph")
        contenders["torch.func vmap"] = lambda: peer.run("func")
    memory = {"ours_bytes": jb.program_memory(ours.lower(*arguments).compile()), "plain_bytes": jb.program_memory(plain.lower(*arguments).compile())}
    memory["param_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    times = time_contenders(in_a_row(contenders), rounds, peer)
    rows = make_rows("split", "simple_cnn", batch_size, num_groups, times, per=IN_A_ROW)
    swapped = [{"ours": one["parameters as one vector"], "plain step": one["plain step"], "parameters as a tree": one["ours"]} for one in times]
    rows += make_rows("split", "simple_cnn, one vector", batch_size, num_groups, swapped, per=IN_A_ROW)
    return [row | memory for row in rows] + gradients(rounds, batch_size)


def gradients(rounds: int, batch_size: int) -> list[dict]:
    """Compares per-example gradients with a plain step, ``torch.func`` and opacus."""
    task, optimizer = random_task(jb.SimpleCNN(), batch_size), optax.sgd(RATE, MOMENTUM)
    params = init_state(task, optimizer, 0).params
    opt_state = optimizer.init(params)
    plain = jb.split_backward(task.loss_fn, optimizer, 1, microbatch_size=task.examples_at_a_time)
    ours = jax.jit(lambda params, batch: jb.per_example_gradients(task.loss_fn, params, batch))
    contenders = {
        "ours": lambda: ours(params, task.train_data),
        "plain step": lambda: plain(params, opt_state, task.train_data),
    }
    peer = start_peer(task, params, "SimpleCNN", batch_size, batch_size)
    if peer:
        contenders["torch.func vmap"] = lambda: peer.run("func")
        if is_installed("opacus"):
            contenders["opacus"] = lambda: peer.run("opacus")
    times = time_contenders(in_a_row(contenders), rounds, peer)
    return make_rows("gradients", "simple_cnn", batch_size, batch_size, times, per=IN_A_ROW)
