"""Round trip: no damaged file is ever trusted, whatever it is and wherever the damage lies."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.integrity import damage, lock_run, newest_good, resolve
from deepseek_jax.checkpoint.manager import Checkpoint, Manager
from deepseek_jax.core.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = {"w": jax.ShapeDtypeStruct((64,), jnp.float32)}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    run = tmp_path_factory.mktemp("original")
    manager = Manager(run / "checkpoints", Checkpoint(), {})
    for step in (10, 20):
        state = {"w": jnp.full(64, step, jnp.float32)}
        manager.save(step, state, position=step, config={"type": "X"}, files={"t/v.json": b"{}"})
    manager.close()
    return run


@pytest.fixture
def run(original, tmp_path):
    return pathlib.Path(shutil.copytree(original, tmp_path / "run"))


def files(run, step=20):
    directory = run / f"checkpoints/{step}"
    return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


def falls_back(run, capsys):
    """Whether a restore takes 10 with one warning line that names both."""
    capsys.readouterr()
    restored = Manager(run / "checkpoints", Checkpoint(), {}).restore(SHAPES)
    lines = capsys.readouterr().err.splitlines()
    assert restored.step == 10 and np.all(np.asarray(restored.state["w"]) == 10)
    assert len(lines) == 1 and lines[0].startswith("warning: ")
    assert str(run / "checkpoints/20") in lines[0] and str(run / "checkpoints/10") in lines[0]
    return lines[0]


def test_sound(run, capsys):
    assert damage(run / "checkpoints/20") == ""
    assert newest_good(run / "checkpoints") == 20
    assert resolve(run) == resolve(run / "checkpoints") == run / "checkpoints/20"
    assert resolve(run / "checkpoints/10") == run / "checkpoints/10"
    assert capsys.readouterr().err == ""


def test_a_flipped_bit_in_any_file(run, capsys):
    random.seed(0)
    for name in files(run):
        path = run / "checkpoints/20" / name
        content = path.read_bytes()
        if not content:
            continue
        for _ in range(6):
            flipped = bytearray(content)
            flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)
            path.write_bytes(flipped)
            assert damage(run / "checkpoints/20"), name
        warning = falls_back(run, capsys)
        assert name.name in warning or name.name == "manifest.json"
        path.write_bytes(content)
    assert damage(run / "checkpoints/20") == ""


def test_every_bit_of_the_manifest_counts(run):
    path = run / "checkpoints/20/manifest.json"
    content = path.read_bytes()
    for index in [*range(0, 40), *range(40, len(content) - 10, 11), *range(-10, 0)]:
        for bit in range(8):
            flipped = bytearray(content)
            flipped[index] ^= 1 << bit
            path.write_bytes(flipped)
            assert damage(run / "checkpoints/20"), (index, bit)


@pytest.mark.parametrize("cut", ["empty", "one byte less", "missing", "one byte more"])
def test_any_file_cut_or_gone(run, capsys, cut):
    for name in files(run):
        path = run / "checkpoints/20" / name
        content = path.read_bytes()
        if not content and cut in ("empty", "one byte less"):
            continue
        if cut == "missing":
            path.unlink()
        else:
            changed = {"empty": b"", "one byte less": content[:-1], "one byte more": content + b"x"}
            path.write_bytes(changed[cut])
        assert damage(run / "checkpoints/20"), name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    path = run / "checkpoints/20/meta.json"
    path.unlink() if cut == "missing" else path.write_bytes(b"")
    assert "meta.json" in falls_back(run, capsys)


def test_a_directory_without_manifest_is_incomplete(run, capsys):
    (run / "checkpoints/20/manifest.json").unlink()
    assert "manifest.json" in falls_back(run, capsys)
    assert resolve(run) == run / "checkpoints/10"
    with pytest.raises(InputError, match=r"20: this checkpoint is damaged: manifest.json"):
        resolve(run / "checkpoints/20")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"files": 3}', '{"files": [1]}', '{"files": {"a": 1}}']
)
def test_a_manifest_of_another_shape(run, text):
    (run / "checkpoints/20/manifest.json").write_text(text)
    assert damage(run / "checkpoints/20")


def test_none_good(run):
    shutil.rmtree(run / "checkpoints/10/state")
    (run / "checkpoints/20/config.json").write_text("{}")
    for call in (
        lambda: Manager(run / "checkpoints", Checkpoint(), {}).restore(SHAPES),
        lambda: resolve(run),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert "every checkpoint is damaged: 20 (config.json" in str(error.value)
        assert "10 (state" in str(error.value)


def test_nothing_to_resolve(tmp_path, run):
    for path in (tmp_path / "nowhere", tmp_path, run / "checkpoints/20/config.json"):
        with pytest.raises(InputError, match="run directory"):
            resolve(path)


def test_a_copied_checkpoint_under_another_name(run, tmp_path):
    copy = shutil.copytree(run / "checkpoints/20", tmp_path / "best")
    assert resolve(copy) == copy


def test_strange_names_are_not_checkpoints(run):
    for name in ("x", "30.saving", "30.deleting", "-5", "1.5"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints/40").write_text("a file")
    assert integrity.steps(run / "checkpoints") == [10, 20]


HOLDER = """
    import os, sys, time
    from deepseek_jax.checkpoint.integrity import lock_run
    with lock_run(sys.argv[1]):
        if sys.argv[2] == "fork" and os.fork() == 0:
            time.sleep(60)  # a worker that outlives its parent
            os._exit(0)
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("workers", ["alone", "fork"])
def test_one_process_a_run(tmp_path, workers):
    script = tmp_path / "holder.py"
    script.write_text(textwrap.dedent(HOLDER))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, script, tmp_path / "run", workers],
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        other = f"another process \\(pid {holder.pid}\\) is training"
        with pytest.raises(InputError, match=other), lock_run(tmp_path / "run"):
            pass
        with lock_run(tmp_path / "another"):
            pass
        holder.kill()
        holder.wait()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                with lock_run(tmp_path / "run"):
                    break
            except InputError:
                time.sleep(0.05)
        else:
            pytest.fail("the lock outlived its process")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_the_lock_goes_with_its_block(tmp_path):
    refused = pytest.raises(InputError, match=str(os.getpid()))
    with lock_run(tmp_path), refused, lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_a_run_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), lock_run(tmp_path / "file"):
        pass


def test_the_manifest_is_written_last_and_whole(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/b").write_bytes(b"")
    synced = []
    sync = integrity.sync
    monkeypatch.setattr(integrity, "sync", lambda path: (synced.append(path.name), sync(path)))
    integrity.write_manifest(tmp_path)
    assert synced == ["a", "d", "b", "manifest.json.tmp", tmp_path.name]
    assert set(json.loads((tmp_path / "manifest.json").read_text())["files"]) == {"a", "d/b"}
    assert damage(tmp_path) == ""
