"""Round trip: what a checkpoint gives back, bit for bit, and what is left when saving fails."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1 as ocp

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.manager import Checkpoint, Manager, load_params, read_config, resolve
from deepseek_jax.core.errors import InputError

LAYERS = {"segment_0/block": (0,), "segment_1/block": (1, 2, 3), "mtp_0/block": (7,)}
ROOT = pathlib.Path(__file__).resolve().parents[2]


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def place(array, *spec):
    return jax.device_put(array, NamedSharding(mesh(), PartitionSpec(*spec)))


def make_params(seed=0):
    key = jax.random.key(seed)
    stacked = jax.random.normal(key, (3, 8, 4))
    return {
        "embedding": place(jax.random.normal(key, (16, 4)), "a"),
        "segment_0": {"block": {"w": place(jax.random.normal(key, (1, 8, 4)), None, "a")}},
        "segment_1": {
            "block": {
                "w": place(stacked.astype(jnp.bfloat16), None, "a", "b"),
                "moe": {"router": {"bias": place(stacked[:, 0] * 1e-3)}},
            },
            "blocks": place(jnp.ones(3)),
        },
        "mtp_0": {"block": {"w": place(jnp.full((1, 2), jnp.nan))}, "norm": place(jnp.ones(2))},
    }


def make_state(seed=0):
    params = make_params(seed)
    matrices = jax.tree.map(lambda x: x.ndim > 2, params)
    optimizer = optax.chain(
        optax.masked(optax.adamw(1e-3, mu_dtype=jnp.bfloat16), matrices), optax.scale(1.0)
    )
    return {
        "step": place(jnp.int32(seed)),
        "params": params,
        "opt_state": optimizer.init(params),
        "ema": None,
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def make_manager(tmp_path, **config):
    return Manager(tmp_path / "checkpoints", Checkpoint(**config), LAYERS)


def save(manager, step, state, **more):
    arguments = {"position": 10 * step, "config": {"type": "X"}, "files": {}} | more
    manager.save(step, state, **arguments)


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())


def test_a_state_comes_back_bit_for_bit_where_it_was(tmp_path):
    state = make_state(5)
    manager = make_manager(tmp_path)
    assert manager.restore(abstract(state)) is None
    save(manager, 5, state, files={"tokenizer/vocabulary.json": b"abc"})
    manager.close()
    restored = make_manager(tmp_path).restore(abstract(state))
    assert (restored.step, restored.position, restored.config) == (5, 50, {"type": "X"})
    same(state, restored.state)
    step = tmp_path / "checkpoints/5"
    assert (step / "tokenizer/vocabulary.json").read_bytes() == b"abc"
    manifest = json.loads((step / "manifest.json").read_text())["files"]
    on_disk = {p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file()}
    assert set(manifest) == on_disk - {"manifest.json"}


def test_on_disk_there_is_a_leaf_a_layer(tmp_path):
    state = make_state()
    manager = make_manager(tmp_path)
    save(manager, 1, state)
    manager.close()
    plain = ocp.load((tmp_path / "checkpoints/1").absolute())
    assert set(plain["params"]) == {
        "embedding", "layer_0", "layer_1", "layer_2", "layer_3", "layer_7", "segment_1", "mtp_0",
    }  # fmt: skip
    assert set(plain["params"]["segment_1"]) == {"blocks"}  # three numbers, but no block
    stacked = np.asarray(state["params"]["segment_1"]["block"]["w"])
    for layer in (1, 2, 3):
        assert np.array_equal(plain["params"][f"layer_{layer}"]["w"], stacked[layer - 1])
    leaves = json.loads((tmp_path / "checkpoints/1/meta.json").read_text())["leaves"]
    moments = [name for name in leaves if "/mu/" in name]
    assert moments and all("/layer_" in name for name in moments)  # only matrices had them


def test_another_mesh_takes_the_same_checkpoint(tmp_path):
    state = make_state()
    manager = make_manager(tmp_path)
    save(manager, 1, state)
    manager.close()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    elsewhere = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
    restored = make_manager(tmp_path).restore(elsewhere)
    w = restored.state["params"]["segment_1"]["block"]["w"]
    assert w.sharding == one
    assert np.array_equal(w, state["params"]["segment_1"]["block"]["w"])


def test_parameters_load_alone_in_another_dtype(tmp_path):
    state = make_state()
    manager = make_manager(tmp_path)
    save(manager, 1, state)
    manager.close()
    same(state["params"], load_params(resolve(tmp_path), abstract(state["params"]), LAYERS))
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), state["params"])
    w = load_params(resolve(tmp_path), wide, LAYERS)["segment_1"]["block"]["w"]
    assert w.dtype == jnp.float32
    assert np.array_equal(w, state["params"]["segment_1"]["block"]["w"].astype(jnp.float32))
    assert read_config(resolve(tmp_path)) == {"type": "X"}


def test_another_model_says_what_differs(tmp_path):
    state = make_state()
    manager = make_manager(tmp_path)
    save(manager, 1, state)
    manager.close()
    other = abstract(state)
    other["params"]["embedding"] = jax.ShapeDtypeStruct((32, 4), jnp.float32)
    del other["params"]["mtp_0"]
    other["params"]["more"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(InputError) as error:
        load_params(resolve(tmp_path), other["params"], LAYERS)
    text = str(error.value)
    assert "params/more is missing" in text
    assert "params/layer_7/w is not in this model" in text
    assert "params/embedding is (16, 4) where this model has (32, 4)" in text
    with pytest.raises(InputError, match="another model or optimizer"):
        make_manager(tmp_path).restore(other)
    fewer = {**LAYERS, "segment_1/block": (1, 2)}
    params = abstract(state["params"])
    params["segment_1"]["block"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), params["segment_1"]["block"]
    )
    with pytest.raises(InputError, match=r"layer_3/.* is not in this model"):
        load_params(resolve(tmp_path), params, fewer)


def test_the_state_may_be_donated_while_it_is_written(tmp_path, monkeypatch):
    started, go = threading.Event(), threading.Event()
    write_manifest = integrity.write_manifest

    def slow(directory):
        started.set()
        assert go.wait(30)
        write_manifest(directory)

    monkeypatch.setattr(integrity, "write_manifest", slow)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    state = {"w": jnp.arange(100_000, dtype=jnp.float32), "v": place(jnp.ones((8, 2)), "a")}
    shapes, expected = abstract(state), jax.tree.map(np.array, state)
    manager = make_manager(tmp_path)
    save(manager, 1, state)
    state = jax.tree.map(overwrite, state)  # training goes on
    assert started.wait(30) and names(tmp_path) == ["1.saving"]
    state = jax.tree.map(overwrite, state)
    go.set()
    manager.wait()
    restored = manager.restore(shapes).state
    assert all(np.array_equal(restored[name], expected[name]) for name in expected)


def test_a_save_waits_for_the_one_before(tmp_path):
    manager = make_manager(tmp_path, keep_last=9)
    for step in range(1, 5):
        save(manager, step, {"w": jnp.full(4, step)})
    manager.close()
    assert names(tmp_path) == ["1", "2", "3", "4"]
    for step in range(1, 5):
        assert integrity.damage(tmp_path / f"checkpoints/{step}") == ""


def test_synchronous_saves_are_done_on_return(tmp_path):
    manager = make_manager(tmp_path, asynchronous=False)
    save(manager, 1, {"w": jnp.ones(4)})
    assert integrity.damage(tmp_path / "checkpoints/1") == ""


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep_last": 2}, [9, 10]),
        ({"keep_last": 1}, [10]),
        ({"keep_last": 2, "keep_every": 4}, [4, 8, 9, 10]),
        ({"keep_last": 1, "keep_every": 5}, [5, 10]),
    ],
)
def test_retention(tmp_path, config, kept):
    manager = make_manager(tmp_path, asynchronous=False, **config)
    for step in range(1, 11):
        save(manager, step, {"w": jnp.ones(1)})
    assert integrity.steps(tmp_path / "checkpoints") == kept
    assert manager.restore({"w": jax.ShapeDtypeStruct((1,), jnp.float32)}).step == 10


def test_retention_counts_good_ones_only(tmp_path, capsys):
    shapes = {"w": jax.ShapeDtypeStruct((1,), jnp.float32)}
    manager = make_manager(tmp_path, asynchronous=False, keep_last=2)
    for step in (10, 20, 30):
        save(manager, step, {"w": jnp.full(1, step, jnp.float32)})
    (tmp_path / "checkpoints/30/meta.json").write_bytes(b"{}")
    manager = make_manager(tmp_path, asynchronous=False, keep_last=2)
    assert manager.restore(shapes).step == 20
    save(manager, 25, {"w": jnp.ones(1)})
    assert integrity.steps(tmp_path / "checkpoints") == [20, 25, 30]  # 30 is bad, still ahead
    save(manager, 35, {"w": jnp.ones(1)})
    assert integrity.steps(tmp_path / "checkpoints") == [25, 35]
    assert capsys.readouterr().err.count("warning") == 1


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
    shapes = {"w": jax.ShapeDtypeStruct((1,), jnp.float32)}
    manager = make_manager(tmp_path)
    for step in (10, 20):
        save(manager, step, {"w": jnp.full(1, step, jnp.float32)})
    manager.close()
    (tmp_path / "checkpoints/20/meta.json").write_bytes(b"{}")
    manager = make_manager(tmp_path)
    assert manager.restore(shapes).step == 10
    save(manager, 20, {"w": jnp.full(1, 21.0)})
    manager.close()
    restored = make_manager(tmp_path).restore(shapes)
    assert restored.step == 20 and restored.state["w"] == 21


def test_saving_a_restored_step_again_changes_nothing(tmp_path):
    manager = make_manager(tmp_path)
    save(manager, 3, {"w": jnp.ones(2)})
    manager.close()
    before = (tmp_path / "checkpoints/3/manifest.json").stat()
    manager = make_manager(tmp_path)
    manager.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
    save(manager, 3, {"w": jnp.ones(2)})
    manager.close()
    after = (tmp_path / "checkpoints/3/manifest.json").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


@pytest.mark.parametrize("values", [{"keep_last": 0}, {"keep_every": 0}])
def test_impossible_retention(values):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoint(**values)


@pytest.mark.parametrize("broken", ["write_manifest", "write_bytes", "save_async"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, broken):
    shapes = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    manager = make_manager(tmp_path)
    save(manager, 1, {"w": jnp.ones(4)})
    manager.wait()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"write_manifest": integrity, "write_bytes": pathlib.Path, "save_async": ocp}[broken]
    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, full)
        with pytest.raises(InputError) as error:
            save(manager, 2, {"w": jnp.zeros(4)})
            save(manager, 3, {"w": jnp.zeros(4)})  # an earlier save's error comes up here
    text = str(error.value)
    assert "the disk is full" in text and "checkpoint 1 is intact" in text
    assert str(tmp_path / "checkpoints/2") in text
    assert names(tmp_path) == ["1"]
    manager.wait()  # told once
    assert manager.restore(shapes).step == 1
    save(manager, 2, {"w": jnp.zeros(4)})  # there is room again
    manager.close()
    assert manager.restore(shapes).step == 2


def test_a_disk_that_is_really_full(tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or not mount:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False)
    if done.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        manager = make_manager(disk)
        save(manager, 1, {"w": jnp.ones(1000)})
        save(manager, 2, {"w": jax.random.normal(jax.random.key(0), (500_000,))})
        with pytest.raises(InputError, match=r"the disk is full; checkpoint 1 is intact"):
            manager.wait()
        assert names(disk) == ["1"]
        assert not caplog.records  # Orbax's tracebacks
        shapes = {"w": jax.ShapeDtypeStruct((1000,), jnp.float32)}
        assert manager.restore(shapes).step == 1
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_bug_in_a_save_is_not_called_a_full_disk(tmp_path, monkeypatch):
    manager = make_manager(tmp_path)
    monkeypatch.setattr(integrity, "write_manifest", lambda directory: 1 / 0)
    save(manager, 1, {"w": jnp.ones(4)})
    with pytest.raises(ZeroDivisionError):
        manager.close()
    assert names(tmp_path) == []


KILLED = """
    import os, signal, sys
    import jax.numpy as jnp
    from deepseek_jax.checkpoint import integrity
    from deepseek_jax.checkpoint.manager import Checkpoint, Manager

    place, where = sys.argv[1:]
    owners = {"write_manifest": integrity, "sync": integrity, "replace": integrity.pathlib.Path,
              "rename": integrity.pathlib.Path, "rmtree": integrity.shutil}
    manager = Manager(where, Checkpoint(keep_last=1), {})
    manager.restore({"w": jnp.zeros(4)})
    if place in owners:
        def killed(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(owners[place], place, killed)
    manager.save(2, {"w": jnp.full(4, 2.0)}, position=2, config={"type": "X"}, files={"a": b"a"})
    if place == "during":
        os.kill(os.getpid(), signal.SIGKILL)
    manager.close()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("place", "survivors"),
    [
        ("during", {1, 2}),  # Orbax may or may not be done: either way one good checkpoint
        ("write_manifest", {1}),
        ("replace", {1}),  # of the manifest
        ("rename", {1}),  # of the finished directory
        ("rmtree", {2}),  # of the old checkpoint, once the new one stands
        ("after", {2}),
    ],
)
def test_killed_while_saving(tmp_path, place, survivors):
    manager = make_manager(tmp_path)
    save(manager, 1, {"w": jnp.ones(4)})
    manager.close()
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, place, tmp_path / "checkpoints"], env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL
    for path in (tmp_path / "checkpoints").iterdir():  # no manifest, or a good one
        if path.name.isdecimal():
            assert integrity.damage(path) == ""
    manager = make_manager(tmp_path)
    assert all(name.isdecimal() for name in names(tmp_path))  # leftovers went
    restored = manager.restore({"w": jax.ShapeDtypeStruct((4,), jnp.float32)})
    assert restored.step in survivors
    assert np.array_equal(restored.state["w"], np.full(4, restored.step, np.float32))


def test_killed_during_the_very_first_save_starts_afresh(tmp_path):
    directory = tmp_path / "checkpoints"
    (directory / "1.saving.orbax-checkpoint-tmp/state").mkdir(parents=True)
    (directory / "1.saving/state").mkdir(parents=True)
    manager = make_manager(tmp_path)
    assert manager.restore({"w": jnp.ones(1)}) is None
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(InputError, match="cannot be made"):
        make_manager(tmp_path)
