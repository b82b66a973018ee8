"""Invariance: what waits in the host's memory, moments or layer inputs, changes no bit of a run.

Contract: every name that a remat policy moves is in the program, and moments lie where they should.
"""

import dataclasses

import cases
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.block import LAYER_INPUT, POLICIES
from deepseek_jax.models.build import build
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.optimizer import AdamW, Muon, make_optimizer
from deepseek_jax.training.planning import abstract_batch
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.stages import stage_step
from deepseek_jax.training.state import abstract_state, initial_state, on_device

MODEL = cases.decoder("mla", "sigmoid", num_layers=3, num_dense_layers=1, num_mtp_layers=1)
MODEL = dataclasses.replace(MODEL, vocab_size=260, init_scale=0.05)
LENT = Lent(
    lambda model, params, *_: {
        "loss": sum(float(np.abs(x).sum()) for x in jax.tree.leaves(params)),
        "bits_per_byte": 1.0,
    },
    lambda *_: "the end",
)


def recipe(run_dir=".", paths=("*.txt",), model=MODEL, **fields):
    data = Data(source=TextFiles(paths=paths), tokenizer=Bytes(), cache_dir=f"{run_dir}/cache")
    base = {"steps": 4, "batch_size": 8, "sequence_length": 16, "save_every": 2, "log_every": 1}
    base |= {"precision": Precision(compute="float32"), "mesh": MeshShape(data=1, fsdp=8)}
    return TrainConfig(model=model, data=data, run_dir=str(run_dir), **(base | fields))


def host(optimizer):
    return dataclasses.replace(optimizer, memory="pinned_host")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
def test_a_run_is_bit_equal_with_moments_on_the_host_and_resumes(tmp_path, optimizer):
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text("".join(f"{index} and {n}\n" for n in range(99)))
    paths, losses = (str(tmp_path / "*.txt"),), []
    for name, chosen in (("here", optimizer), ("there", host(optimizer))):
        config = recipe(tmp_path / name, paths, optimizer=chosen)
        assert train(dataclasses.replace(config, steps=2), LENT) == 0
        assert train(config, LENT) == 0  # from a checkpoint, whose arrays go back there
        lines = (tmp_path / name / "eval.jsonl").read_text().splitlines()
        losses.append([line.split('"loss"')[1] for line in lines])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_moments_stay_on_the_host_through_a_step():
    config = recipe(optimizer=host(AdamW()))
    model, mesh = build(MODEL, config.precision), make_mesh(config.mesh)
    optimizer, stage = make_optimizer(config.optimizer, model.specs), config.filled_stages()[0]
    state = abstract_state(model, optimizer, mesh, config.optimizer.memory)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    kinds = {x.memory_kind for x in jax.tree.leaves(shardings.opt_state["mu"])}
    assert kinds == {"pinned_host"}
    assert {x.memory_kind for x in jax.tree.leaves(shardings.params)} == {"device"}
    batch = jax.tree.map(
        lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding),
        abstract_batch(mesh, 8, 16, config),
    )
    with jax.set_mesh(mesh):
        start = jax.jit(lambda p: initial_state(p, optimizer, 1.0), out_shardings=shardings)
        step = stage_step(config, model, stage, stage.batch_at(0), first=0)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        state, _ = step(start(model.init(jax.random.key(0))), batch)
        near = jax.jit(on_device)(state)
    for name in ("mu", "nu"):
        for leaf in jax.tree.leaves(state.opt_state[name]):
            assert leaf.sharding.memory_kind == "pinned_host"
            assert np.abs(np.asarray(leaf)).max() > 0 or leaf.ndim < 3
    assert {x.sharding.memory_kind for x in jax.tree.leaves(near)} == {"device"}


def gradients(remat):
    model = build(dataclasses.replace(MODEL, remat=remat), Precision(compute="float32"))
    objective = make_language(Language(), model)
    batch = {
        name: jnp.ones(x.shape, x.dtype)
        for name, x in abstract_batch(make_mesh(MeshShape()), 8, 16, recipe()).items()
    }
    batch["tokens"] = jnp.arange(8 * 16).reshape(8, 16) % 250

    def loss(params):
        sums, _ = objective.loss_fn(params, batch, jax.random.key(0))
        return sum(c * sums[term][0] for term, c in objective.coefficients.items())

    return jax.grad(loss), model.init(jax.random.key(0))


def test_offloaded_layer_inputs_change_no_gradient():
    """Bit by bit as with `full`, which recomputes the same from inputs that stay."""
    found = []
    for remat in ("full", "offload"):
        gradient, params = gradients(remat)
        found.append(jax.jit(gradient)(params))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(found[0]))


def names(jaxpr):
    """Every checkpoint name within a jaxpr, those of its inner ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from names(inner)


def moves(jaxpr):
    """Shapes of what goes to the host's memory."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put" and "Host" in str(equation.params["devices"]):
            yield equation.invars[0].aval.shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from moves(inner)


@pytest.mark.parametrize("remat", POLICIES)
def test_every_name_of_a_policy_is_in_the_program(remat):
    gradient, params = gradients(remat)
    jaxpr = jax.make_jaxpr(gradient)(params).jaxpr
    assert LAYER_INPUT in set(names(jaxpr))
    moved = set(moves(jaxpr))
    assert moved == ({(8, 16, MODEL.embed_dim)} if remat == "offload" else set())


def kept_apart(jaxpr):
    """Whether each rematerialized part may be merged with the first pass, by its layers."""
    for equation in jaxpr.eqns:
        if "prevent_cse" in equation.params:
            yield equation.params["prevent_cse"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from kept_apart(inner)


@pytest.mark.parametrize(("unroll", "expected"), [(1, {True, False}), (2, {True})])
def test_a_layer_without_a_loop_is_kept_from_being_merged(unroll, expected):
    """One dense layer, two in a loop, one for MTP: XLA opens loops of one turn."""
    config = dataclasses.replace(MODEL, remat="full", unroll=unroll)
    model = build(config, Precision(compute="float32"))
    tokens = jax.ShapeDtypeStruct((2, 16), "int32")
    following = jax.ShapeDtypeStruct((2, 16, 1), "int32")

    def loss(params, tokens, following):
        output = model.apply(params, tokens, next_tokens=following)
        return output.hidden.sum() + output.mtp[0].sum()

    jaxpr = jax.make_jaxpr(loss)(model.shapes, tokens, following).jaxpr
    assert set(kept_apart(jaxpr)) == expected
