"""Contract: a run in which something that must hold is broken stops, says what, and saves nothing.

Each thing is broken on its own, inside a real run on 8 devices.
"""

import dataclasses
import functools
import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.errors import BrokenRun, run_command
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers import moe
from deepseek_jax.layers.router import Balance
from deepseek_jax.training import invariants, loop
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import TrainConfig

MODEL = cases.decoder(
    "gqa", "sigmoid_grouped", num_layers=2, num_dense_layers=1, num_mtp_layers=1, vocab_size=260,
    init_scale=0.05,
)  # fmt: skip
BALANCE = Balance(sequence_weight=0.01, uniform_weight=0.01, z_weight=0.001)
MODEL = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, balance=BALANCE))
LENT = Lent(lambda *_: {"loss": 1.0, "bits_per_byte": 1.0}, lambda *_: "the end")
SLOW = pytest.mark.slow
BIAS = "segment_1/block/moe/router/bias"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"file {i} says {i**3}\n" * 20)
    source = TextFiles(paths=(str(folder / "*.txt"),))
    return Data(source=source, tokenizer=Bytes(), held_out=0.2, cache_dir=str(folder / "cache"))


def recipe(data, run_dir, **fields):
    base = {"model": MODEL, "steps": 6, "batch_size": 8, "sequence_length": 16, "save_every": 2}
    base |= {"precision": Precision(compute="float32"), "check_every": 3}
    return TrainConfig(data=data, run_dir=str(run_dir), **(base | fields))


def tampered(monkeypatch, change):
    """Every step's (state, metrics) go through `change`, after the step numbered in state.step."""
    compiled = loop._Run._compiled

    def wrapped(self, *given):
        step = compiled(self, *given)
        return lambda state, batch: change(*step(state, batch))

    monkeypatch.setattr(loop._Run, "_compiled", wrapped)


def on_one_device(leaf, index, change):
    """The array with one device's copy changed."""
    shards = [shard.data for shard in leaf.addressable_shards]
    changed = change(np.array(shards[index]))
    shards[index] = jax.device_put(changed, leaf.addressable_shards[index].device)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def a_bias_that_drifts(state, metrics):
    if int(state.step) == 4:
        block = state.params["segment_1"]["block"]["moe"]["router"]
        block["bias"] = on_one_device(block["bias"], 5, lambda x: np.nextafter(x, 1))
    return state, metrics


def test_a_sound_run_is_left_alone(data, tmp_path, monkeypatch):
    asked, check = [], invariants.check

    def noted(step, *given, whole):
        asked.append((step, bool(whole)))
        check(step, *given, whole=whole)

    monkeypatch.setattr(invariants, "check", noted)
    assert train(recipe(data, tmp_path), LENT) == 0
    expected = [(1, True), (2, False), (3, True), (4, False), (6, True)]
    assert asked == expected


def test_a_bias_that_drifts_on_one_device_stops_the_run_before_the_save(
    data, tmp_path, monkeypatch, capsys
):
    tampered(monkeypatch, a_bias_that_drifts)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda _: train(recipe(data, tmp_path), LENT), [])
    assert stopped.value.code == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: step 4: {BIAS} is another on device 5 than on the first" in said
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


@pytest.mark.slow
def test_checks_can_be_switched_off(data, tmp_path, monkeypatch):
    tampered(monkeypatch, a_bias_that_drifts)
    assert train(recipe(data, tmp_path, check_every=0), LENT) == 0


def leaking(name, change):
    """`layers.moe.<name>` with its result changed."""
    usual = getattr(moe if name == "routed_experts" else moe.routing, name)
    return lambda *given, **options: change(usual(*given, **options))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "routed_experts",
            lambda found: (found[0], found[1].at[0].add(-1), found[2]),
            r"step 1: mtp_0/block, layer 0: 248 choices reached experts and 0 were dropped, "
            r"but 128 tokens made 2 each \(and 1 more\); the run is stopped",
        ),
        pytest.param("sequence_loss", lambda x: x * 0, r"sequence_loss is 0, though", marks=SLOW),
        pytest.param("uniform_loss", lambda x: x * 0, r"uniform_loss is 0", marks=SLOW),
        pytest.param("z_loss", lambda x: x * jnp.nan, r"router/z_loss is nan", marks=SLOW),
    ],
)
def test_what_a_layer_does_wrong_stops_the_first_step(
    data, tmp_path, monkeypatch, name, change, message
):
    where = moe if name == "routed_experts" else moe.routing
    monkeypatch.setattr(where, name, leaking(name, change))
    with pytest.raises(BrokenRun, match=message):
        train(recipe(data, tmp_path), LENT)
    assert not list((tmp_path / "checkpoints").iterdir())


def seen():
    """What a sound step of two layers and a prediction layer shows."""

    def block(layers):
        fields = {
            f"{name}_loss": np.ones(layers, np.float32) for name in ("sequence", "uniform", "z")
        }
        counts = np.full((layers, 4), 6, np.int32)
        return {
            "counts": counts,
            "dropped": np.zeros(layers, int),
            "tokens": np.full(layers, 12),
        } | fields

    terms = {f"router/{name}_loss": (0.5, 8.0) for name in ("sequence", "uniform", "z")}
    terms |= {"cross_entropy": (2.0, 9.0), "mtp_loss": (2.0, 9.0)}
    gradients = {"segment_1/block/moe/experts": 1.0, "mtp_0/block/moe/router": 0.0}
    return {
        "blocks": {"segment_1/block": block(2), "mtp_0/block": block(1)},
        "terms": terms,
        "gradients": gradients,
    }


def judged(found):
    return [
        *invariants.wrong_counts(found, 2),
        *invariants.wrong_losses(found),
        *invariants.wild_gradients(found),
    ]


MAIN, FURTHER = "segment_1/block", "mtp_0/block"
BROKEN = {  # the fault as it is told: what is set, where, to what
    f"{MAIN}, layer 1: 23 choices": (("blocks", MAIN, "counts"), (1, 2), 5),
    f"{MAIN}, layer 0: 24 choices": (("blocks", MAIN, "dropped"), 0, 3),
    f"{FURTHER}, layer 0: router/z_loss is 0": (("blocks", FURTHER, "z_loss"), 0, 0),
    "router/sequence_loss is 0": (("terms",), "router/sequence_loss", (0.0, 8.0)),
    "mtp_loss is 0": (("terms",), "mtp_loss", (0.0, 9.0)),
    "cross_entropy is inf": (("terms",), "cross_entropy", (np.inf, 9.0)),
    "the gradient of mtp_0/block/moe/router is": (("gradients",), f"{FURTHER}/moe/router", np.nan),
}


@pytest.mark.parametrize("message", BROKEN)
def test_each_fault_is_named_and_nothing_else(message):
    sound = seen()
    assert judged(sound) == []
    way, place, value = BROKEN[message]
    functools.reduce(dict.__getitem__, way, sound)[place] = value
    (fault,) = judged(sound)
    assert fault.startswith(message)


def test_what_may_be_zero_may():
    """A term without tokens, a block without tokens, and KL to uniform among one expert."""
    found = seen()
    found["terms"]["mtp_loss"] = (0.0, 0.0)
    block = found["blocks"]["mtp_0/block"]
    for values in block.values():
        values[:] = 0
    assert judged(found) == []
    found = seen()
    for block in found["blocks"].values():
        block["counts"] = block["counts"][:, :1] * 4
        block["uniform_loss"][:] = 0
    found["terms"]["router/uniform_loss"] = (0.0, 1.0)
    assert judged(found) == []


def test_gradients_are_measured_module_by_module():
    """Those of a model on its batch: each module's length is its leaves'."""
    grads = {"a": {"x": jnp.arange(3.0), "y": jnp.ones(2)}, "b": {"x": jnp.full(2, jnp.nan)}}
    found = invariants.observed(invariants.squares(grads), {}, {}, {})
    assert float(found["gradients"]["a"]) == 7 and np.isnan(found["gradients"]["b"])
    assert invariants.wild_gradients(found) == ["the gradient of b is not finite"]
    found = {"gradients": {"a": 1.0, "c": np.inf}}
    assert invariants.wild_gradients(found) == ["the gradient of c is not finite"]


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_module(
    data, tmp_path, monkeypatch
):
    def poisoned(state, metrics):
        if int(state.step) == 3:
            metrics["checked"]["gradients"]["segment_0/block/mlp/up"] = jnp.float32(jnp.inf)
        return state, metrics

    tampered(monkeypatch, poisoned)
    with pytest.raises(BrokenRun, match="step 3: the gradient of segment_0/block/mlp/up is not"):
        train(recipe(data, tmp_path), LENT)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_processes_that_disagree_are_found_from_their_summaries():
    same = np.array([[[7, -1], [8, -1]], [[7, -1], [8, -1]]])
    assert invariants._disagreements(["a", "b"], same) == []
    other = same.copy()
    other[1, 1, 0] = 9
    found = invariants._disagreements(["a", "b"], other)
    assert found == ["b is another in process 1 than in process 0"]
    other[0, 0, 1] = 3
    found = invariants._disagreements(["a", "b"], other)
    assert found[0] == "a is another on device 3 than on the first of its process"


def test_only_biases_are_compared():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.NamedSharding(mesh, jax.P())
    leaf = jax.device_put(jnp.ones((2, 4)), whole)
    drifted = on_one_device(leaf, 3, lambda x: np.nextafter(x, 2))
    params = {"a": {"router": {"bias": leaf, "weight": drifted}}}
    assert invariants.unequal_biases(params) == []
    params = {"a": {"router": {"bias": drifted, "weight": leaf}}}
    assert next(iter(tree.flatten(params))) == "a/router/bias"
    assert invariants.unequal_biases(params)[0].startswith("a/router/bias is another on device 3")


def test_copies_are_of_the_same_part_and_processes_compare_whole_ones():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = jnp.arange(4.0)
    split = jax.device_put(values, jax.NamedSharding(mesh, jax.P("x")))
    assert invariants.unequal_biases({"router": {"bias": split}}) == []
    drifted = on_one_device(split, 5, lambda x: np.nextafter(x, 9))
    assert "on device 5" in invariants.unequal_biases({"router": {"bias": drifted}})[0]
    one, same, other = (jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
                        for x in (values, values, values + 1))  # fmt: skip
    assert invariants._summary(one) == invariants._summary(same) != invariants._summary(other)
