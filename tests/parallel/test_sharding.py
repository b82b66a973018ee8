"""Sharded = single-device: a training step on every mesh axis, alone and in pairs; round trips."""

import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core import target, tree
from deepseek_jax.core.axes import BATCH_AXES, MESH_AXES, Spec
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.build import build
from deepseek_jax.ops.losses import cross_entropy
from deepseek_jax.parallel.compile import compile_program
from deepseek_jax.parallel.manual import gathered, per_device
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import (
    batch_sharding,
    check_batch,
    flat_tokens,
    place_batch,
    tree_shardings,
    weight_sharding,
)
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.recipe import BatchStep
from deepseek_jax.training.step import make_gradients

MODEL = build(
    cases.decoder(
        "mla_q_rank", "sigmoid_grouped", num_shared_experts=1, num_mtp_layers=1, vocab_size=64
    )
)
SPARSE = [build(cases.decoder(name, "sigmoid")) for name in ("mla_indexer", "gqa_gate")]
ROWS, LENGTH = 8, 12


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.config.vocab_size, (ROWS, LENGTH + 2)).astype(np.int32)
    segments = np.where(np.arange(LENGTH) < 5, 1, 2) * np.ones((ROWS, 1), int)
    return {
        "tokens": tokens[:, :-2],
        "targets": np.stack([tokens[:, 1:-1], tokens[:, 2:]], -1),
        "weights": np.ones((ROWS, LENGTH, 2), np.float32),
        "segments": segments.astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
    }


def gradients(mesh, model=MODEL):
    """Gradients, means and routing counts of one batch on a mesh, as NumPy."""
    objective = make_language(Language(), model)
    with jax.set_mesh(mesh):
        shardings = tree_shardings(mesh, model.specs, model.shapes)
        params = jax.device_put(cases.random_params(model.shapes, 0), shardings)
        placed = place_batch(mesh, batch())
        step = jax.jit(make_gradients(objective))
        grads, means, aux = step(params, placed, jax.random.key(1), np.float32(1))
    counts = {path: routing.counts for path, routing in aux.items()}
    return jax.device_get((tree.flatten(grads), means, counts))


@pytest.fixture(scope="module")
def alone():
    return gradients(make_mesh(MeshShape(), jax.devices()[:1]))


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 8},
        {"fsdp": 8},
        {"expert": 8},
        {"tensor": 2, "data": 1},
        {"slice": 2, "data": 4},
        {"fsdp": 2, "expert": 4},
        {"expert": 2, "tensor": 2, "data": 2},
        {"context": 2, "data": 4},
    ],
    ids=lambda axes: "-".join(f"{axis}{size}" for axis, size in axes.items()),
)
def test_gradients_equal_those_of_one_device(axes, alone):
    shape = MeshShape(**({"data": 1} | axes))
    count = int(np.prod([getattr(shape, axis) for axis in MESH_AXES]))
    assert_alike(gradients(make_mesh(shape, jax.devices()[:count])), alone)


@pytest.mark.parametrize("model", SPARSE, ids=lambda model: type(model.config.attention).__name__)
def test_sparse_attention_on_a_mesh_is_that_of_one_device(model):
    alone = gradients(make_mesh(MeshShape(), jax.devices()[:1]), model)
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2, context=2, data=1))
    assert_alike(gradients(mesh, model), alone)


def assert_alike(found, alone):
    grads, means, counts = found
    for path, expected in alone[2].items():
        np.testing.assert_array_equal(counts[path], expected)
    for name, expected in alone[1].items():
        np.testing.assert_allclose(means[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
    for path, expected in alone[0].items():
        scale = np.abs(expected).max() + 1e-12
        np.testing.assert_allclose(grads[path] / scale, expected / scale, atol=2e-5, err_msg=path)


def test_parameters_are_really_spread():
    mesh = make_mesh(MeshShape(fsdp=2, expert=2, tensor=2))
    shardings = tree.flatten(tree_shardings(mesh, MODEL.specs, MODEL.shapes))
    shapes = tree.flatten(MODEL.shapes)
    path = "segment_0/block/moe/experts/gate"
    whole, part = shapes[path].shape, shardings[path].shard_shape(shapes[path].shape)
    assert np.prod(whole) == 8 * np.prod(part)


def test_an_axis_that_does_not_divide_a_dimension_leaves_it_whole():
    mesh = make_mesh(MeshShape(tensor=8))
    spec = Spec(axes=("embed", "mlp"), reduced=(0,), outputs=(1,))
    assert weight_sharding(mesh, spec, (4, 12)).spec == jax.sharding.PartitionSpec()
    assert weight_sharding(mesh, spec, (4, 16)).spec == jax.sharding.PartitionSpec(None, "tensor")


def test_batches_are_spread_over_every_batch_axis():
    mesh = make_mesh(MeshShape(slice=2, fsdp=2, expert=2, data=1))
    placed = place_batch(mesh, batch())["tokens"]
    assert placed.sharding.shard_shape(placed.shape)[0] == 1
    assert set(placed.sharding.spec[0]) == set(BATCH_AXES)
    np.testing.assert_array_equal(placed, batch()["tokens"])


@pytest.mark.parametrize("shape", [{"fsdp": 3}, {"data": 16}, {"data": 4}])
def test_meshes_that_do_not_fit_say_how_many_devices_there_are(shape):
    with pytest.raises(InputError, match="there are 8"):
        make_mesh(MeshShape(**shape))


@pytest.mark.parametrize("shape", [{"fsdp": 0}, {"fsdp": -1, "data": -1}, {"tensor": -2}])
def test_impossible_meshes_are_refused(shape):
    with pytest.raises(ValueError, match="at least 1"):
        MeshShape(**shape)


@pytest.mark.parametrize(
    ("rows", "parts", "length", "message"),
    [(14, 1, 16, "14.*4 batch shards"), (16, 8, 16, "batch shards"), (8, 1, 18, "multiple of")],
)
def test_batches_that_do_not_split_evenly_are_refused(rows, parts, length, message):
    mesh = make_mesh(MeshShape(context=2, data=4))
    good = BatchStep(step=0, batch_size=16, accumulation_steps=2)
    check_batch(mesh, [good], 16)
    bad = BatchStep(step=0, batch_size=rows, accumulation_steps=parts)
    with pytest.raises(InputError, match=message):
        check_batch(mesh, [good, bad], length)


def test_every_device_makes_the_logits_of_its_own_tokens_only():
    """Contract, read from the compiled program: a chunk of 64 tokens is 8 a device, of 8."""
    mesh = make_mesh(MeshShape())
    with jax.set_mesh(mesh):
        tokens, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        rows = jax.ShapeDtypeStruct((8, 16, 32), np.float32, sharding=tokens)
        targets = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=tokens)
        head = jax.ShapeDtypeStruct((32, 999), np.float32, sharding=whole)

        def loss(rows, head, targets):
            weights = targets.reshape(-1) * 1.0
            return cross_entropy(rows.reshape(-1, 32), head, targets.reshape(-1), weights, 0.0, 64)

        slopes = jax.grad(lambda *inputs: loss(*inputs)[0], (0, 1))
        text = jax.jit(slopes).lower(rows, head, targets).compile().as_text()
    assert re.search(r"f32\[8,999\]\S* dot\(", text)
    assert not re.search(r"f32\[64,999\]", text)


def test_tokens_are_merged_device_by_device():
    """Several rows a device, on a context axis: nothing is sent, and the way back is the way."""
    mesh = make_mesh(MeshShape(data=2, context=4))
    where = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context", None))
    x = np.arange(4 * 8 * 3, dtype=np.float32).reshape(4, 8, 3)

    def there_and_back(x):
        flat, back = flat_tokens(x)
        return flat, back(flat * 2)

    with jax.set_mesh(mesh):
        run = jax.jit(there_and_back)
        placed = jax.device_put(x, where)
        program = compile_program(run.lower(placed), mesh)
        flat, back = run(placed)
    assert program.collectives == ()
    np.testing.assert_array_equal(back, 2 * x)
    assert {*map(tuple, np.asarray(flat))} == {*map(tuple, x.reshape(-1, 3))}


@pytest.mark.parametrize("axis", ["fsdp", ("fsdp",), ("fsdp", "expert")], ids=str)
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_weights_slope_is_summed_apart_in_two_goes_over_all_chips(monkeypatch, dimension, axis):
    """As TPUs want it; its values are those of one device, and rounding a weight leaves it wide."""
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    sizes = {"fsdp": 4, "expert": 2} if len(axis) == 2 else {"fsdp": 8}
    mesh, rng = make_mesh(MeshShape(data=1, **sizes)), np.random.default_rng(0)
    w, x = (rng.standard_normal(size).astype(np.float32) for size in ((16, 16), (8, 16)))
    split = PartitionSpec(*[None] * dimension, axis)

    def of_device(w, x):
        return jnp.sin(x) @ gathered(w, split, dtype=jnp.bfloat16)

    def loss(w, x):
        rows = PartitionSpec(axis)
        return (per_device(of_device, (split, rows), rows)(w, x) ** 2).sum()

    def plain(w, x):
        narrow = w + jax.lax.stop_gradient(w.astype(jnp.bfloat16).astype(w.dtype) - w)
        return ((jnp.sin(x) @ narrow) ** 2).sum()

    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(w, x)
        text = str(jax.make_jaxpr(jax.grad(loss))(w, x))
    expected = jax.jit(jax.value_and_grad(plain))(w, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-5), found, expected
    )
    groups = re.findall(r"reduce_scatter\[\s*axis_index_groups=\(?(\S+)", text)
    assert len(groups) == 2 and ("None" in groups) == (len(axis) == 2), groups
