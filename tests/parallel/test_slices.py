"""Gradients between slices in int4: on any mesh nothing of the exact sum is lost; bytes fall."""

import dataclasses
import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.models.build import build
from deepseek_jax.ops.exchange import Exchange
from deepseek_jax.parallel.compile import collectives
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings
from deepseek_jax.training import loop
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.loop import Lent
from deepseek_jax.training.optimizer import AdamW, Constant, make_optimizer
from deepseek_jax.training.pipeline import make_mesh_gradients
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.slices import abstract_left_out, add_slices, describe, shares
from deepseek_jax.training.stages import stage_step
from deepseek_jax.training.state import abstract_state, initial_state
from deepseek_jax.training.step import make_gradients

OBJECTIVE = Language(z_weight=1e-3)
ROWS = ((7, 9), (12,), (5, 6, 5), (16,)) * 4
LENT = Lent(lambda *_: {"loss": 1.0, "bits_per_byte": 1.0}, lambda *_: "")


def model(kind="none", **fields):
    base = {"num_layers": 2, "num_dense_layers": 1, "num_mtp_layers": 1, "vocab_size": 64}
    config = cases.decoder("mla_q_rank", "sigmoid_grouped", num_shared_experts=1, **base | fields)
    moe = dataclasses.replace(config.moe, exchange=Exchange(kind=kind))
    return build(dataclasses.replace(config, moe=moe))


def mesh_of(axes):
    count = int(np.prod([*axes.values()]))
    return make_mesh(MeshShape(**({"data": 1} | axes)), jax.devices()[:count])


def by_slice(model, steps=2, chunks=1):
    """(params, batch, left_out, scale) -> ((gradients, left_out), means, routing)."""
    objective = make_language(OBJECTIVE, model)
    gradients = make_mesh_gradients(OBJECTIVE, model, objective, steps, chunks, by_slice=True)

    def run(params, batch, left_out, scale):
        grads, means, routing = gradients(params, batch, jax.random.key(1), scale)
        return add_slices(grads, left_out, scale, model), means, routing

    return run


def check(axes, kind, chunks=1):
    own = model(kind)
    params = cases.random_params(own.shapes, 3)
    batch = cases.make_batch(ROWS, 16, 2, 0, 64)
    plain = jax.jit(make_gradients(make_language(OBJECTIVE, own), 2))
    exact, means, routing = plain(params, batch, jax.random.key(1), jnp.float32(1))
    mesh = mesh_of(axes)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(mesh, own.specs, own.shapes))
        lies = abstract_left_out(mesh, own)
        before = {p: jnp.full(x.shape, 1e-3, device=x.sharding) for p, x in lies.items()}
        run = jax.jit(by_slice(own, chunks=chunks))
        given = params, place_batch(mesh, batch), before, jnp.float32(8)
        (grads, after), found, loads = run(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, means)
    for path, block in routing.items():
        np.testing.assert_array_equal(loads[path].counts, block.counts)
    dealt, rounded = shares(mesh, own.specs, own.shapes), 0
    for path, expected in tree.flatten(exact).items():
        grad, size = np.asarray(tree.flatten(grads)[path]) / 8, np.abs(expected).max() + 1e-12
        if path in after:
            at, count = dealt[path].at, mesh.shape["slice"]
            rounded += int(np.abs(grad - expected).max() > 1e-3 * size)
            grad = grad + np.asarray(after[path]).sum(at) - count * np.float32(1e-3)
        np.testing.assert_allclose(grad / size, expected / size, atol=1e-5, err_msg=path)
    assert rounded > 10


QUICK = [({"slice": 2, "fsdp": 2, "expert": 2}, "ring")]
SLOW = [
    ({"slice": 4, "data": 2}, "none", 2),  # chunks of stages, of which there is one
    ({"slice": 2, "data": 2, "tensor": 2}, "none"),
    ({"slice": 2, "context": 2, "expert": 2}, "padded"),
    ({"slice": 2, "stage": 2, "data": 2}, "none"),
    ({"slice": 2, "fsdp": 2, "expert": 2}, "two_hop"),
]


def name_of(case):
    return "-".join(f"{axis}{size}" for axis, size in case[0].items()) + f"-{case[1]}"


@pytest.mark.parametrize("case", QUICK, ids=name_of)
def test_gradients_and_what_they_left_out_are_the_exact_ones(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=name_of)
def test_gradients_and_what_they_left_out_are_the_exact_ones_on_every_mesh(case):
    check(*case)


def test_only_packed_bytes_and_small_leaves_cross_slices():
    """Contract, from the compiled program, and that what is printed is what is sent."""
    own, mesh = model(embed_dim=64, vocab_size=512), mesh_of({"slice": 2, "fsdp": 2})

    def crossing(run, *left_out):
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            own.shapes,
            tree_shardings(mesh, own.specs, own.shapes),
        )
        batch = cases.make_batch(ROWS[:4], 16, 2, 0, 64)
        with jax.set_mesh(mesh):
            program = jax.jit(run).lower(shapes, batch, *left_out, np.float32(1)).compile()
        rows = collectives(program.as_text(), mesh)
        return sum(row.bytes for row in rows if "slice" in row.axes)

    exact = make_mesh_gradients(OBJECTIVE, own, make_language(OBJECTIVE, own), 1)
    plain = crossing(lambda p, b, s: exact(p, b, jax.random.key(1), s))
    less = crossing(by_slice(own, 1), abstract_left_out(mesh, own))
    said = describe(mesh, own)
    assert float(said.split(" MB")[0].split()[-1]) == pytest.approx(less / 1e6, abs=0.01)
    assert plain / less > 6
    assert "between 2 slices" in said
    assert "nothing crosses" in describe(mesh_of({"fsdp": 2}), own)


def recipe(tmp_path, **fields):
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text("".join(f"{index} and {n}\n" for n in range(99)))
    data = Data(
        source=TextFiles(paths=(str(tmp_path / "*.txt"),)),
        tokenizer=Bytes(),
        cache_dir=str(tmp_path),
    )
    base = {"steps": 6, "batch_size": 8, "sequence_length": 16, "save_every": 3, "log_every": 1}
    small = model(vocab_size=260, num_layers=1, num_dense_layers=0, num_mtp_layers=0).config
    base |= {"precision": Precision(compute="float32"), "model": small}
    base |= {"optimizer": AdamW(learning_rate=3e-3, schedule=Constant()), "data": data}
    return TrainConfig(**base | {"run_dir": str(tmp_path / "run")} | fields)


def lines(run_dir):
    with open(f"{run_dir}/metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")} for row in rows]


def run(monkeypatch, config, slices, how="int4"):
    """Train on as many devices as slices; the exit code."""
    few = jax.devices()[:slices]
    monkeypatch.setattr(loop, "make_mesh", lambda shape: make_mesh(shape, few))
    mesh = MeshShape(slice=slices, data=1, slice_gradients=how)
    return loop.train(dataclasses.replace(config, mesh=mesh), LENT)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_with_what_was_left_out(tmp_path, monkeypatch):
    whole, parts = recipe(tmp_path, run_dir=str(tmp_path / "whole")), recipe(tmp_path)
    assert run(monkeypatch, whole, 2) == 0
    assert run(monkeypatch, dataclasses.replace(parts, steps=3), 2) == 0
    assert run(monkeypatch, parts, 2) == 0
    assert lines(parts.run_dir) == lines(whole.run_dir)
    assert all(row["left_out_norm"] > 0 for row in lines(whole.run_dir))


@pytest.mark.slow
def test_a_run_goes_on_with_other_slices_and_says_what_is_dropped(tmp_path, monkeypatch, capsys):
    turns = [(2, "float32"), (2, "int4"), (4, "int4"), (1, "int4")]
    for steps, (slices, how) in enumerate(turns, 1):
        config = recipe(tmp_path, steps=steps, save_every=1)
        assert run(monkeypatch, config, slices, how) == 0
        error = capsys.readouterr().err
        assert ("had left out is of other slices and dropped" in error) == (steps > 2), steps
    norms = [row.get("left_out_norm") for row in lines(config.run_dir)]
    assert [norm is not None for norm in norms] == [False, True, True, False]


@pytest.mark.slow
def test_int4_learns_what_exact_gradients_learn(tmp_path, monkeypatch):
    losses = []
    for how in ("float32", "int4"):
        config = recipe(tmp_path, steps=60, save_every=0, run_dir=str(tmp_path / how))
        assert run(monkeypatch, config, 2, how) == 0
        losses.append(np.mean([row["loss"] for row in lines(config.run_dir)[-10:]]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_step_that_is_not_finite_leaves_what_was_left_out(tmp_path):
    shape = MeshShape(slice=2, data=1, slice_gradients="int4")
    config, mesh = recipe(tmp_path, mesh=shape), make_mesh(shape, jax.devices()[:2])
    own, stage = build(config.model), config.filled_stages()[0]
    optimizer = make_optimizer(config.optimizer, own.specs)
    with jax.set_mesh(mesh):
        lies = abstract_state(own, optimizer, mesh, by_slice=True).left_out
        params = own.init(jax.random.key(0))
        state = initial_state(params, optimizer, 1.0, lies)
        left = {p: jnp.full(x.shape, 0.5, device=lies[p].sharding) for p, x in lies.items()}
        step = jax.jit(stage_step(config, own, stage, stage.batch_at(0), first=0))
        batch = place_batch(mesh, cases.make_batch(ROWS[:8], 16, 1, 0, 64))
        state = state.replace(left_out=left)
        good, _ = step(state, batch)
        bad = batch | {"weights": batch["weights"].at[0, 0, 0].set(jnp.inf)}
        state, metrics = step(state, bad)
    assert int(metrics["skipped"]) == 1
    for path, value in state.left_out.items():
        assert (np.asarray(value) == 0.5).all(), path
        assert (np.asarray(good.left_out[path]) != 0.5).any(), path


def test_layers_that_are_not_scanned_are_refused():
    own = model(scan=False)
    with (
        jax.set_mesh(mesh_of({"slice": 2})),
        pytest.raises(InputError, match=r"slice_gradients int4: set model\.scan"),
    ):
        jax.eval_shape(
            by_slice(own), own.shapes, cases.make_batch(ROWS, 16, 2, 0, 64), {}, np.float32(1)
        )
