"""Invariance: what a search weighs without a compiler agrees with what is exactly known."""

import dataclasses
import json
import math
import sys

import jax
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.config import load_config, override
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.build import build
from deepseek_jax.models.networks import build_network
from deepseek_jax.parallel.chips import Place, chip
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.training import search
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.planning import held
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.state import abstract_state


def config(*flags, name="quickstart"):
    loaded = load_config(f"configs/{name}.py", TrainConfig)
    return override(loaded, list(flags), prog="test")


def place(count, kind="TPU v5"):
    return Place(jax.devices() * (count // 8), kind, chip(kind), 459e12, False)


def test_given_bytes_are_those_of_the_state_on_a_mesh():
    ours = config()
    model, stage = build(ours.model, ours.precision), ours.filled_stages()[0]
    sizes = {"slice": 1, "stage": 1, "data": 1, "fsdp": 2, "context": 1, "expert": 4, "tensor": 1}
    optimizer = make_optimizer(stage.optimizer, model.specs)
    exact = held(abstract_state(model, optimizer, make_mesh(MeshShape(**sizes))))
    assert search.given_bytes(ours, model, sizes) == exact > 0


def test_candidates_of_v3_on_512_chips():
    ours = config("--sequence-length=8192", name="deepseek_v3")
    found = search.candidates(ours, place(512))
    assert all(math.prod(one.mesh.values()) == 512 for one in found)
    assert all(one.batch_size % (512 // one.mesh["tensor"]) == 0 for one in found)
    like = {"fsdp": 32, "expert": 16, "tensor": 1}
    mine = [one for one in found if like.items() <= one.mesh.items()]
    assert len(mine) == len(search.ROWS) * len(search.POLICIES)
    by = {(one.remat, one.rows): one for one in mine}
    # Layer inputs are 2 bytes x 62 layers x 7168 a token; offloaded they need nothing here.
    inputs = by["full", 4].least - by["offload", 4].least
    assert inputs == pytest.approx(2 * 62 * 7168 * 4 * 8192)
    assert by["offload", 4].least < by["full", 4].least < by["dots", 4].least < by["none", 4].least
    assert by["full", 8].seconds > by["dots", 8].seconds > by["dots", 4].seconds
    assert by["none", 32].least > chip("TPU v5").memory


def test_candidates_of_a_decoder_that_sees_count_its_encoder():
    """VL2-small's: what is kept of ten views, 27 layers' inputs of 729 patches, where it learns."""
    whole = config(name="deepseek_vl2_small")
    ours = dataclasses.replace(whole, stages=whole.stages[1:2])
    found = search.candidates(ours, place(64))
    one = next(one for one in found if one.mesh["fsdp"] == 64 and one.remat == "full")
    assert {"--stages.1.batch-size=576", "--model.language.remat=full"} <= {*one.flags(ours, 1)}
    model = build_network(ours.model, ours.precision)
    given = search.given_bytes(ours, model, one.mesh)
    _, largest = search.weight_bytes(model, one.mesh, tree.flatten(model.shapes))
    inputs = 2 * (10 * 729 * 27 * 1152 + 4096 * 27 * 2048)
    assert one.least == pytest.approx(given + largest + inputs, rel=1e-3)
    fixed = dataclasses.replace(ours.stages[0], trainable=("!vision/*",))
    frozen = search.candidates(dataclasses.replace(ours, stages=(fixed,)), place(8))
    kept = {one.rows: one.least for one in frozen if one.remat == "full" and one.mesh["fsdp"] == 8}
    assert kept[2] - kept[1] == pytest.approx(2 * 4096 * 27 * 2048)


def test_meshes_suit_heads_experts_and_what_is_configured():
    assert {m["tensor"] for m in search.meshes(config("--mesh.context=2"), 16)} <= {1, 2, 4}
    assert all(m["context"] == 2 for m in search.meshes(config("--mesh.context=2"), 16))
    assert search.meshes(config("--mesh.context=3"), 16) == []
    dense = config(name="deepseek_r1_distill_qwen_7b")
    assert {m["expert"] for m in search.meshes(dense, 64)} == {1}


def answering(tmp_path, refuse):
    """A command that answers like `plan`, and notes what it was asked."""
    script = tmp_path / "plan.py"
    script.write_text(f"""
import json, pathlib, sys
flags = dict(f.lstrip("-").split("=") for f in sys.argv if "=" in f)
with open({str(tmp_path / "asked")!r}, "a") as file:
    file.write(json.dumps(flags) + "\\n")
rows = int(flags["batch-size"])
mesh = {{k[5:]: int(v) for k, v in flags.items() if k.startswith("mesh.") and int(v) > 1}}
found = {{"mesh": mesh, "tokens": rows, "fits": not ({refuse}), "step_seconds": 1 + rows / 100}}
print(json.dumps(found | {{"mfu": 0.5, "remat": flags["model.remat"], "batch_size": rows}}))
""")
    return [sys.executable, str(script)]


@pytest.fixture
def described(monkeypatch):
    monkeypatch.setattr(search, "described", lambda name: place(8, "TPU v5 lite"))


def test_a_search_ranks_and_stops(tmp_path, described, capsys):
    command = answering(tmp_path, "flags['model.remat'] == 'none'")
    found = search.search(config(), "v5e:2x4", 5, command)
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert len(asked) == found["compiled"] == len(found["plans"]) <= 5
    fits = [one["fits"] for one in found["plans"]]
    assert fits == sorted(fits, reverse=True)
    times = [one["step_seconds"] / one["tokens"] for one in found["plans"] if one["fits"]]
    assert times == sorted(times)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 + len(asked)
    assert all("ETA" in line for line in said[1:])


def test_what_needs_more_than_a_refused_one_is_not_tried(tmp_path, described):
    with_tensor = config("--mesh.context=4")  # few meshes
    search.search(with_tensor, "v5e:2x4", 12, answering(tmp_path, "True"))
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    order = ("offload", "full", "dots", "none")
    for index, one in enumerate(asked):
        for later in asked[index + 1 :]:
            if all(one[k] == later[k] for k in one if k.startswith("mesh")):
                more = int(later["batch-size"]) >= int(one["batch-size"])
                remat = order.index(later["model.remat"]) >= order.index(one["model.remat"])
                assert not (more and remat)


def test_a_failing_command_ends_the_search(tmp_path, described):
    command = [sys.executable, "-c", "raise SystemExit('broken')"]
    with pytest.raises(InputError, match="broken"):
        search.search(config(), "v5e:2x4", 1, command)
