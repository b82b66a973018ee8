"""Round trip: checkpoints in a bucket (tests/bucket.py), bit for bit, whatever mesh reads them."""

import contextlib
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1 as ocp

from deepseek_jax.checkpoint import integrity, objects
from deepseek_jax.checkpoint.manager import Checkpoint, Manager
from deepseek_jax.checkpoint.params import read_params
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import Object
from deepseek_jax.parallel.mesh import MeshShape, make_mesh

LAYERS = {"segment_0/block": (0, 1, 2)}


def state():
    key = jax.random.key(0)
    return {
        "params": {
            "segment_0/block/experts/up/weight": jax.random.normal(key, (3, 4, 8, 16)),
            "embed/weight": jax.random.normal(key, (48, 6), jnp.bfloat16),
            "norm": jnp.arange(5.0),
        },
        "step": jnp.int32(7),
    }


def manager(place, **fields):
    return Manager(f"gs://bucket/{place}/checkpoints", Checkpoint(**fields), LAYERS)


def manager_of(place, **fields):
    return contextlib.closing(manager(place, **fields))


def save(to, step, values, files=()):
    to.save(step, values, position=10 * step, config={"type": "X"}, files=dict(files))


def abstract(values):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)


def test_what_is_saved_comes_back_on_any_mesh(gs, monkeypatch):
    monkeypatch.setattr(objects, "BUFFER", 256)  # bytes: leaves are cut into several chunks
    values, mesh = state(), make_mesh(MeshShape(fsdp=2, tensor=4))

    def placed(path, leaf):
        name = jax.tree_util.keystr(path)
        spec = PartitionSpec(None, "fsdp", None, "tensor") if "experts" in name else PartitionSpec()
        spec = PartitionSpec("tensor") if "embed" in name else spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    with manager_of("mesh") as first:
        save(first, 7, values, {"tokenizer/a.json": b"{}"})
    for wanted in (abstract(values), jax.tree_util.tree_map_with_path(placed, values)):
        restored = manager("mesh").restore(wanted)
        assert restored.step == 7 and restored.position == 70 and restored.config == {"type": "X"}
        jax.tree.map(np.testing.assert_array_equal, restored.state, values)
        jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(), restored.state, values)
    experts = restored.state["params"]["segment_0/block/experts/up/weight"]
    assert experts.sharding.shard_shape(experts.shape) == (3, 2, 8, 4)
    chunks = gs.names("bucket/mesh/checkpoints/7/state/params.layer_1.")
    chunks = [name for name in chunks if not name.endswith(".json")]
    assert [n.rpartition("/")[2] for n in chunks] == [f"{i}.0.0" for i in range(4)]
    assert max(len(gs[n]) for n in chunks) == 512  # a row is never cut


def test_shards_that_a_process_does_not_hold_are_others(gs, monkeypatch):
    """Of shards each process puts its own; what is in everyone's memory is put once."""
    mesh = make_mesh(MeshShape(fsdp=2, tensor=4))
    halves = NamedSharding(mesh, PartitionSpec("fsdp"))
    leaf = jax.device_put(jnp.arange(64.0).reshape(8, 8), halves)
    found = objects.contents({"w": leaf})
    assert sorted(found) == ["state/w/0.0", "state/w/1.0", "state/w/zarr.json"]
    assert found["state/w/1.0"] == np.arange(32.0, 64.0, dtype=np.float32).tobytes()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert sorted(objects.contents({"w": leaf})) == ["state/w/0.0", "state/w/1.0"]
    assert objects.contents({"w": np.ones(3)}) == {}  # the same everywhere: process 0's


def test_the_first_process_waits_for_the_others_tables(gs, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    folder, done = Object("gs://bucket/tables/3"), threading.Event()
    writer = threading.Thread(
        target=lambda: (objects.write(folder, {"a": b"1"}, attempt=5), done.set()), daemon=True
    )
    gs["bucket/tables/3/written/4-1.json"] = b"{}"  # of an earlier start: it does not count
    writer.start()
    assert not done.wait(1) and "bucket/tables/3/manifest.json" not in gs.names()
    gs["bucket/tables/3/b"] = b"2"
    digest = integrity._fingerprint(folder / "b")
    gs["bucket/tables/3/written/5-1.json"] = json.dumps({"b": digest}).encode()
    assert done.wait(5)
    writer.join()
    assert integrity.damage(folder) == ""
    assert set(json.loads(gs["bucket/tables/3/manifest.json"])["files"]) == {"a", "b"}


def test_a_copy_opens_with_orbax_and_reads_lazily(gs):
    with manager_of("copy") as first:
        save(first, 1, state())
    copy = integrity.resolve("gs://bucket/copy")
    assert copy.name == "1" and integrity.damage(copy) == ""
    loaded = ocp.load(copy)
    np.testing.assert_array_equal(loaded["params"]["norm"], np.arange(5.0))
    source = read_params(copy)["layer_2/experts/up/weight"]
    expected = state()["params"]["segment_0/block/experts/up/weight"]
    np.testing.assert_array_equal(source.read((3,)), expected[2, 3])


def test_the_newest_and_the_kept_stay(gs):
    values = {"w": jnp.ones(4)}
    with manager_of("kept", keep_last=2, keep_every=3) as first:
        for step in range(1, 6):
            save(first, step, values)
    there = {int(name.split("/")[3]) for name in gs.names("bucket/kept/checkpoints/")}
    assert there == {3, 4, 5} == set(integrity.steps(Object("gs://bucket/kept/checkpoints")))


def test_what_is_torn_is_no_checkpoint_and_goes_at_the_next_start(gs):
    with manager_of("torn") as first:
        save(first, 1, {"w": jnp.ones(4)})
        save(first, 2, {"w": jnp.ones(4)})
    del gs["bucket/torn/checkpoints/2/manifest.json"]
    gs["bucket/torn/checkpoints/3/written/9-1.json"] = b"{}"
    assert integrity.newest_good(Object("gs://bucket/torn/checkpoints")) == 1
    with manager_of("torn") as second:
        assert second.newest() == 1
    assert {name.split("/")[3] for name in gs.names("bucket/torn/checkpoints/")} == {"1"}


@pytest.mark.parametrize("cut", ["missing", "shorter", "flipped"])
def test_damage_anywhere_is_found(gs, cut, capsys):
    place = f"damage-{cut}"
    with manager_of(place) as first:
        save(first, 1, state(), {"tokenizer/a.json": b"{}"})
        save(first, 2, state(), {"tokenizer/a.json": b"{}"})
    prefix = f"bucket/{place}/checkpoints/2/"
    for name in gs.names(prefix):
        content = gs[name]
        if not content:
            continue
        changed = {"shorter": content[:-1], "flipped": bytes([content[0] ^ 1]) + content[1:]}
        if cut == "missing":
            del gs[name]
        else:
            gs[name] = changed[cut]
        assert integrity.newest_good(Object(f"gs://bucket/{place}/checkpoints")) == 1, name
        gs[name] = content
    assert integrity.newest_good(Object(f"gs://bucket/{place}/checkpoints")) == 2
    assert "is damaged" in capsys.readouterr().err
    gs[f"bucket/{place}/checkpoints/1/meta.json"] = b"{}"
    gs[f"bucket/{place}/checkpoints/2/meta.json"] = b"{}"
    with pytest.raises(InputError, match=rf"gs://bucket/{place}/.*every checkpoint is damaged: 2"):
        integrity.resolve(f"gs://bucket/{place}")


def test_another_models_checkpoint_is_refused(gs):
    with manager_of("other") as first:
        save(first, 1, {"w": jnp.ones(4)})
    with pytest.raises(InputError, match=r"gs://bucket/other/checkpoints/1: .* another model"):
        manager("other").restore({"w": jax.ShapeDtypeStruct((5,), jnp.float32)})
