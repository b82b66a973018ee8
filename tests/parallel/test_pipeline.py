"""Reference and contract: a pipeline's gradients are the plain ones, its waits those of theory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.pipeline import counted
from deepseek_jax.parallel.manual import gathered, per_device, traded
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.pipeline import AXIS, Parts, Pipeline, one_forward_one_backward

WIDTH, SCALE = 3, 2.0
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("sizes", [(2, 2, 4), (4, 1, 2), (4, 1, 6), (4, 2, 4), (8, 1, 3)])
def test_idle_passes_are_those_of_theory(sizes):
    pipeline = Pipeline(*sizes)
    runs, forward, backward = counted(pipeline)
    assert {*forward} == {*backward} == {pipeline.turns}
    assert 1 - 2 * pipeline.turns / runs == pytest.approx(pipeline.bubble)


def first(params, batch):
    return jnp.tanh(params * batch)


def layers(params, number, x, batch):
    y = jnp.tanh(x @ params + number * batch)
    return y, (x * y).sum(), jnp.float32(number + 1) * batch.sum()


def last(params, x, batch):
    return (params * x**2 * batch).sum(), (x * batch).sum()


@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 1, 7), (3, 1, 8), (2, 3, 6), (4, 2, 8)])
def test_gradients_and_reports_are_the_plain_ones(sizes):
    """More microbatches than inputs are kept of; what runs on nothing must leave no trace."""
    pipeline = Pipeline(*sizes)
    stages, chunks, count = sizes
    ends = RNG.normal(size=(2, 1, WIDTH)).astype(np.float32)
    own = RNG.normal(size=(chunks, stages, WIDTH, WIDTH)).astype(np.float32)
    batches = RNG.normal(size=(count, 1, WIDTH)).astype(np.float32)

    def plain(start, own, end):
        loss, reports = 0.0, []
        for batch in batches:
            x, found = first(start, batch), []
            for number, params in enumerate(own.reshape(-1, WIDTH, WIDTH)):
                x, more, report = layers(params, number, x, batch)
                loss += more
                found.append(report)
            more, report = last(end, x, batch)
            loss += more
            reports.append((jnp.stack(found), report))
        layered, ended = (sum(part) for part in zip(*reports, strict=True))
        return SCALE * loss, (layered.reshape(chunks, stages), ended)

    def of_one(own, start, end, batches):
        grads, layered, ended = one_forward_one_backward(
            pipeline, Parts(first, layers, last), start, own[:, 0], end, batches, jnp.float32(SCALE)
        )
        start, own, end = grads
        start, end = jax.lax.psum((start, end), AXIS)
        return start, own[:, None], end, layered[:, None], ended

    whole, split = PartitionSpec(), PartitionSpec(None, AXIS)
    with jax.set_mesh(make_mesh(MeshShape(data=1, stage=stages), jax.devices()[:stages])):
        run = per_device(of_one, (split, whole, whole, whole), (whole, split, whole, split, whole))
        found = jax.jit(run)(own, *ends, batches)
    grads, reports = jax.jit(jax.grad(plain, (0, 1, 2), has_aux=True))(ends[0], own, ends[1])
    for mine, other in zip(found, (*grads, *reports), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_collectives_between_stages_leave_split_what_tensor_shards_have():
    """Values and slopes are those of whole arrays; the program moves halves of columns."""
    mesh = make_mesh(MeshShape(data=1, stage=2, fsdp=2, tensor=2), jax.devices())
    x, w = (RNG.standard_normal(shape).astype(np.float32) for shape in ((4, 8, 6), (4, 16, 6)))
    split = PartitionSpec(None, "fsdp", "tensor")

    def of_device(x):
        x = gathered(x, split, ("tensor",))
        return jnp.sin(traded(x, split, AXIS, 0, 1))  # this stage's two of four, from both stages

    def loss(x):
        run = per_device(
            of_device, (PartitionSpec(None, "fsdp"),), PartitionSpec(AXIS), ("tensor",)
        )
        return (run(x) * w).sum()

    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, split))
        program = jax.jit(jax.value_and_grad(loss))
        found = program(placed)
        text = program.lower(placed).compile().as_text()
    expected = jax.value_and_grad(lambda x: (jnp.sin(jnp.concatenate((x, x), 1)) * w).sum())(x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    moved = re.findall(r"= \(?f32\[([\d,]+)\].* (all-gather|all-to-all|reduce-scatter)\(", text)
    assert {kind for _, kind in moved} >= {"all-gather", "all-to-all"}
    assert all(shape.endswith(",3") for shape, _ in moved), moved
