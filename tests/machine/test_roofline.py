"""The bound on a step's time: operations counted against closed forms, and the line between compute and transfer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbatch as jb
from jaxbatch.advice.memory_parts import Memory
from jaxbatch.advice.time_bound import StepBound, compute_takes_over, make_step_bound, step_work, work_by_batch_size
from jaxbatch.machine.roofline import Bound, Work, count_work, time_bound


def linear_task(features=64, classes=32):
    loss_fn = lambda w, batch: ((batch[0] @ w - batch[1]) ** 2).sum(-1)
    return jb.Task(lambda key: jnp.ones((features, classes)), loss_fn, None, (jnp.ones((100, features)), jnp.ones((100, classes))), None)


def test_a_step_of_a_linear_model_costs_two_products():
    size, features, classes = 128, 64, 32  # forward and the gradient of the weights; the input needs none
    work = step_work(linear_task(), optax.sgd(0.1), size)
    assert work.operations == pytest.approx(2 * 2 * size * features * classes, rel=0.05)
    assert work_by_batch_size(linear_task(), optax.sgd(0.1))(size).operations == pytest.approx(work.operations, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "matmul", "name"),
    [("float32", None, "tensorfloat32"), ("float32", "highest", "float32"), ("bfloat16", None, "bfloat16"), ("float16", None, "float16")],
)
def test_the_precision_of_products_is_read(dtype, matmul, name):
    x = jnp.ones((8, 8), dtype)
    with jax.default_matmul_precision(matmul) if matmul else jax.default_matmul_precision("default"):
        assert count_work(lambda x: x @ x, x).precision == name


def test_the_bound_is_the_larger_of_compute_and_transfer():
    t4 = jb.find_target("t4")
    compute, transfer = time_bound(t4, Work(8.1e12, "float32"), 1), time_bound(t4, Work(1, "float32"), 320.064e9)
    assert (compute.seconds, transfer.seconds) == (1.0, 1.0)
    assert time_bound(t4, Work(65e12, "float16"), 1).compute == 1.0
    assert time_bound(jb.find_target("v5e"), Work(197e12, "tensorfloat32"), 1).compute == 1.0  # TPUs multiply in bfloat16
    with pytest.raises(ValueError, match="no bound"):
        time_bound(jb.find_target("cpu"), Work(1, "float32"), 1)


def test_a_step_moves_its_state_batch_and_what_does_not_fit_in_the_cache():
    t4, task = jb.find_target("t4"), linear_task()
    memory = Memory(1000, 100, 200, 4, 0, t4.cache + 50, 0, 0.0)
    found = make_step_bound(task, t4, lambda size: Work(1.0, "float32"))(memory)
    assert found.bound.transfer == pytest.approx((2 * 304 + 1000 * 4 * (64 + 32) + 2 * 50) / t4.bandwidth)
    assert found.seconds_per_example == found.seconds / 1000


def test_where_compute_takes_over():
    assert compute_takes_over(StepBound(10, Bound(1.0, 2.0)), StepBound(30, Bound(3.0, 2.0))) == 20.0
    assert compute_takes_over(StepBound(10, Bound(3.0, 2.0)), StepBound(30, Bound(9.0, 6.0))) == 1.0
    assert compute_takes_over(StepBound(10, Bound(1.0, 2.0)), StepBound(30, Bound(3.0, 6.0))) is None


def test_the_bound_lies_below_what_a_card_took():
    """docs/gpu.md: SimpleCNN's step took 0.13 ms or more on an H200."""
    from experiments.harness.optimizers import OptimizerFlags, make_optimizer
    from experiments.harness.shape_task import shape_task

    task = shape_task("simple_cnn", "mnist", "float32")
    work = work_by_batch_size(task, make_optimizer(OptimizerFlags("momentum"))(0.1))
    memory = Memory(60, 51_720, 51_720, 4, 0, 0, 0, 0.0)
    bound = make_step_bound(task, jb.find_target("h200"), work)(memory).seconds
    assert 0 < bound < 0.13e-3
    assert np.isclose(work(6000).operations / work(60).operations, 100, rtol=0.05)
