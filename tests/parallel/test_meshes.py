"""Sharded = single-device: five training steps on every axis alone, in pairs and mixed.

Losses, every gradient, what each expert got, drops and telemetry equal those of one device, and the
router's bias has the same bits on all of them.
"""

import dataclasses
import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.axes import MESH_AXES
from deepseek_jax.layers.moe import Capacity
from deepseek_jax.models.build import build
from deepseek_jax.ops.exchange import Exchange
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.pipeline import Pipeline, deal
from deepseek_jax.parallel.sharding import place_batch, tree_shardings
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.pipeline import layout, make_mesh_gradients
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import make_train_step

LENGTH, STEPS, MICROBATCHES = 16, 5, 2
ROWS = ((7, 9), (12,), (5, 6, 5), (16,)) * 4  # documents in each row; two rows end in padding
OBJECTIVE = Language(z_weight=1e-3)


@functools.cache
def model(kind="none", dispatch=None, attention="mla_q_rank", **fields):
    """A dense layer, one with experts and one that predicts further; every loss is there."""
    base = {"num_layers": 2, "num_dense_layers": 1, "num_mtp_layers": 1, "vocab_size": 64}
    config = cases.decoder(attention, "sigmoid_grouped", num_shared_experts=1, **(base | fields))
    balance = dataclasses.replace(config.moe.balance, uniform_weight=0.01, z_weight=0.01)
    moe = dataclasses.replace(config.moe, balance=balance, exchange=Exchange(kind=kind))
    moe = dataclasses.replace(moe, dispatch=dispatch) if dispatch else moe
    return build(dataclasses.replace(config, moe=moe))


def trained(model, mesh, microbatches=MICROBATCHES, chunks=1):
    """First gradients, and by step the metrics and loads of five steps; biases on every device."""
    keeping = optax.GradientTransformationExtraArgs(  # the gradient is what the optimizer remembers
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params, *, learning_rate: (
            jax.tree.map(lambda g: -learning_rate * g, grads),
            grads,
        ),
    )
    with jax.set_mesh(mesh):
        objective = make_language(OBJECTIVE, model)
        gradients = make_mesh_gradients(OBJECTIVE, model, objective, microbatches, chunks)
        step = make_train_step(gradients, objective, keeping, lambda _: 0.02)
        lies = tree_shardings(mesh, model.specs, model.shapes)
        params = jax.device_put(cases.random_params(model.shapes, 3), lies)
        state = initial_state(params, keeping, 1.0)
        batch = cases.make_batch(ROWS, LENGTH, 2, 0, model.config.vocab_size)
        placed, key = place_batch(mesh, batch), jax.random.key(1)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(step, out_shardings=(shardings, None))
        found, first = [], None
        for _ in range(STEPS):
            state, metrics = step(state, placed, key)
            found.append(jax.device_get(metrics))
            first = tree.flatten(jax.device_get(state.opt_state)) if first is None else first
    biases = {p: x for p, x in tree.flatten(state.params).items() if p.endswith("router/bias")}
    copies = {p: [np.asarray(s.data) for s in x.addressable_shards] for p, x in biases.items()}
    return first, found, copies


@functools.cache
def alone(model, microbatches=MICROBATCHES):
    return trained(model, make_mesh(MeshShape(), jax.devices()[:1]), microbatches)


def check(axes, model, microbatches=MICROBATCHES, chunks=1):
    count = int(np.prod([*axes.values()]))
    mesh = make_mesh(MeshShape(**({"data": 1} | axes)), jax.devices()[:count])
    grads, steps, biases = trained(model, mesh, microbatches, chunks)
    expected, expected_steps, expected_biases = alone(model, microbatches)
    for path, other in expected.items():
        scale = np.abs(other).max() + 1e-12
        np.testing.assert_allclose(grads[path] / scale, other / scale, atol=1e-5, err_msg=path)
    for mine, other in zip(steps, expected_steps, strict=True):
        mine, other = dict(mine), dict(other)
        loads = mine.pop("expert_load"), other["expert_load"]
        del mine["checked"]
        jax.tree.map(np.testing.assert_array_equal, *loads)
        assert sum(x.sum() for x in loads[1].values()) > 0
        for name, value in mine.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-5, atol=1e-7, err_msg=name)
    for path, copies in biases.items():
        assert np.abs(copies[0]).max() > 0
        for copy in copies:
            np.testing.assert_array_equal(copy, expected_biases[path][0], err_msg=path)


def name_of(axes):
    return "-".join(f"{axis}{size}" for axis, size in axes.items())


SIZES = {"context": 4, "tensor": 4, "stage": 2}  # alone; the others take all 8 devices
ALONE = [{axis: SIZES.get(axis, 8)} for axis in MESH_AXES]
PAIRS = [dict.fromkeys(pair, 2) for pair in itertools.combinations(MESH_AXES, 2)]
MIXED = {
    "stage-expert-data": ({"stage": 2, "data": 2, "expert": 2}, "padded"),
    "stage-fsdp-tensor": ({"stage": 2, "fsdp": 2, "tensor": 2}, "none"),
    "slice-expert-fsdp": ({"slice": 2, "fsdp": 2, "expert": 2}, "two_hop"),
    "stage-context-expert": ({"stage": 2, "context": 2, "expert": 2}, "ring"),
    "context-expert-tensor": ({"context": 2, "expert": 2, "tensor": 2}, "ragged"),
}
QUICK = [{"fsdp": 8}, {"expert": 8}, {"stage": 2, "data": 2}, {"context": 2, "tensor": 2}]


@pytest.mark.parametrize("axes", QUICK, ids=name_of)
def test_five_steps_are_those_of_one_device(axes):
    check(axes, model())


@pytest.mark.slow
@pytest.mark.parametrize("axes", [a for a in ALONE + PAIRS if a not in QUICK], ids=name_of)
def test_five_steps_on_every_axis_and_pair_are_those_of_one_device(axes):
    check(axes, model())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MIXED)
def test_five_steps_on_mixed_meshes_are_those_of_one_device(mesh):
    axes, kind = MIXED[mesh]
    check(axes, model(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "expert": 2}, {"context": 2, "stage": 2}], ids=name_of
)
def test_capacity_drops_the_same_choices_on_a_mesh(axes):
    check(axes, model("padded" if "expert" in axes else "none", Capacity(factor=0.6)))
    assert alone(model("none", Capacity(factor=0.6)))[1][0]["router/dropped_fraction"] > 0


@pytest.mark.slow
def test_interleaved_stages_are_one_device_too():
    check({"stage": 2, "fsdp": 2}, model(num_layers=5), microbatches=4, chunks=2)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["data", "tensor"])
def test_stages_share_a_tied_head(other):
    check({"stage": 2, other: 2}, model(tie_embeddings=True))


@pytest.mark.slow
def test_widths_that_stages_do_not_divide_stay_whole():
    check({"stage": 3}, model(num_layers=3, vocab_size=63))


@pytest.mark.slow
def test_a_vocabulary_that_only_stages_or_only_tensor_shards_divide():
    check({"stage": 2, "tensor": 2}, model(vocab_size=66))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mla_indexer", "gqa_gate"])
def test_sparse_attention_goes_through_stages(attention):
    check({"stage": 2, "data": 2}, model(attention=attention))


def test_layers_are_dealt_evenly_and_skipped_where_there_are_none():
    assert [len(own) for own in deal(61, 16, 1)] == [4] * 13 + [3] * 3
    assert [i for own in deal(7, 2, 2) for i in own] == [*range(7)]
    plan = layout([1, 4], Pipeline(2, 1, 2))
    assert plan.kinds == [[0, 1, 1], [1, 1, -1]]
    assert (plan.slots, plan.rows[1]) == ([[0], [0, 1, 2]], [[-1, 0, 1], [2, 3, -1]])


def test_a_schedule_does_every_chunk_of_every_microbatch_once_and_in_time():
    for stages, chunks, count in ((1, 1, 3), (4, 1, 2), (3, 1, 7), (2, 3, 4), (4, 2, 8)):
        pipeline = Pipeline(stages, chunks, count)
        places = [pipeline.place(turn) for turn in range(pipeline.turns)]
        assert sorted(places) == [*itertools.product(range(chunks), range(count))]
        assert [pipeline.turn(*place) for place in places] == [*range(pipeline.turns)]
    assert Pipeline(8, 1, 32).bubble == pytest.approx(7 / 39)
    assert Pipeline(8, 4, 32).bubble == pytest.approx(7 / 135)
    assert "waits 17.9% of a step" in Pipeline(8, 1, 32).describe()


def test_activation_memory_does_not_grow_with_microbatches():
    """Contract, from the compiled program: 8 and 32 microbatches of the same size."""

    def temporaries(microbatches):
        mesh = make_mesh(MeshShape(stage=2, data=1), jax.devices()[:2])
        own = model()
        batch = cases.make_batch((ROWS[0],) * 2 * microbatches, 64, 2, 0, 64)
        with jax.set_mesh(mesh):
            objective = make_language(OBJECTIVE, own)
            gradients = make_mesh_gradients(OBJECTIVE, own, objective, microbatches)
            shapes = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                own.shapes,
                tree_shardings(mesh, own.specs, own.shapes),
            )
            lowered = jax.jit(gradients).lower(shapes, batch, jax.random.key(0), np.float32(1))
            return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(8), temporaries(32)
    row = 2 * 64 * (5 * 4 + 2 * 4 * 2)  # the batch itself, in its new order, is held besides
    assert many < few + 24 * 4 * row
