"""Contract: faults are noticed, named and survived; a run continues as if there had been none."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import cases
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from launched import Runs

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.local import LocalCheckpoints
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.training import faults
from deepseek_jax.training.faults import HUNG, Faults, Heartbeat, Peers

ROOT = pathlib.Path(__file__).parents[2]
MODEL = dataclasses.replace(cases.decoder("gqa", "sigmoid"), vocab_size=260, init_scale=0.05)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="watchdog_seconds \\(-1\\) must be at least 0"):
        Faults(watchdog_seconds=-1)
    with pytest.raises(ValueError, match="local_save_every \\(5\\) .* needs a folder"):
        Faults(local_save_every=5)
    with pytest.raises(ValueError, match="straggler_factor \\(1\\) above 1"):
        Faults(straggler_factor=1)
    with pytest.raises(ValueError, match="lease_seconds \\(0\\) must be above 0"):
        Faults(lease_seconds=0)
    with pytest.raises(ValueError, match="local_dir \\('gs://b/x'\\) folders on a disk"):
        Faults(local_dir="gs://b/x")


def test_heartbeats_lie_where_the_launcher_looks(monkeypatch, tmp_path):
    monkeypatch.delenv("HEARTBEAT_DIR", raising=False)
    assert Faults().folder(tmp_path) == tmp_path / "heartbeats"
    monkeypatch.setenv("HEARTBEAT_DIR", "/elsewhere")
    assert Faults().folder(tmp_path) == pathlib.Path("/elsewhere")
    assert Faults(heartbeat_dir="/mine").folder(tmp_path) == pathlib.Path("/mine")


@pytest.fixture
def ended(monkeypatch):
    """Exit codes that a watchdog asked for."""
    codes, over = [], threading.Event()

    def leave(code):
        codes.append(code)
        over.set()

    monkeypatch.setattr(os, "_exit", leave)
    return codes, over


def test_the_watchdog_ends_a_step_that_hangs_and_says_where(tmp_path, ended, capfd):
    codes, over = ended
    heartbeat = Heartbeat(tmp_path, 0.4)
    heartbeat.step(17)
    assert over.wait(20)
    heartbeat.close()
    assert set(codes) == {HUNG}
    said = capfd.readouterr().err
    assert "no step for" in said and "after step 17" in said
    assert "over.wait(20)" in said
    beat = json.loads((tmp_path / "0.json").read_text())
    assert (beat["process"], beat["step"], beat["pid"]) == (0, 17, os.getpid())
    assert abs(beat["time"] - time.time()) < 20


def test_the_watchdog_rests_before_the_first_step_and_while_busy(tmp_path, ended):
    heartbeat = Heartbeat(tmp_path, 0.2)
    time.sleep(0.6)
    for step in range(8):
        heartbeat.step(step)
        time.sleep(0.05)
    heartbeat.busy()
    time.sleep(0.6)
    assert json.loads((tmp_path / "0.json").read_text())["watchdog_seconds"] == 0.2
    heartbeat.close()  # and a launcher does not wait for another sign of life
    assert json.loads((tmp_path / "0.json").read_text())["watchdog_seconds"] == 0
    assert ended[0] == []


def test_a_watchdog_of_0_is_off(tmp_path, ended):
    heartbeat = Heartbeat(tmp_path, 0.0)
    heartbeat._tick = 0.05
    heartbeat.step(1)
    time.sleep(0.3)
    heartbeat.close()
    assert ended[0] == []


def peers(monkeypatch, tmp_path, count=4):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    heartbeat = Heartbeat(tmp_path, 0.0)
    heartbeat.close()
    return Peers(make_mesh(MeshShape(data=2, tensor=2, expert=2)), heartbeat)


def test_every_process_hears_every_word(monkeypatch, tmp_path):
    """Through a jitted step, as the loop does; all devices are one process's here."""
    own = peers(monkeypatch, tmp_path)
    step = jax.jit(own.telling(lambda state, batch: (state + batch, {"loss": batch})))
    with jax.set_mesh(own._mesh):
        assert own.words([])[0].sharding.shard_shape((8, 2)) == (1, 2)
        _, metrics = step(1.0, 2.0, *own.words([]))
        own.hear(metrics)
        assert own.stop([signal.SIGTERM]) == 0  # the others have not heard of it yet
        own.spent(0.25)
        _, metrics = step(1.0, 2.0, *own.words([signal.SIGTERM]))
        assert metrics["words"].is_fully_replicated
        own.hear(metrics)
    assert own.stop([]) == signal.SIGTERM
    assert metrics.keys() == {"loss"}
    assert own._heard[-1].tolist() == [0.25]


def test_a_run_of_one_process_has_no_words(monkeypatch, tmp_path):
    own = peers(monkeypatch, tmp_path, 1)
    assert own.words([signal.SIGTERM]) == ()
    assert own.telling(len) is len
    own.hear({})
    assert own.stop([signal.SIGINT]) == signal.SIGINT
    assert own.straggler(1.0, 1.25) == ({}, "")


def test_a_straggler_is_named_when_it_is_one_for_some_time(monkeypatch, tmp_path):
    own = peers(monkeypatch, tmp_path)

    def logged(*rows, seconds=1.0):
        own._heard = [np.float32(row) for row in rows]
        return own.straggler(seconds, 1.25)

    late = [0.1, 0.12, 0.5, 0.1], [0.1, 0.1, 0.5, 0.1]
    for _ in range(faults.PATIENCE - 1):
        record, said = logged(*late)
        assert said == "" and record["straggler"] is None
    record, said = logged(*late)
    assert record["straggler"] == 2
    np.testing.assert_allclose(record["own_seconds"], [0.1, 0.11, 0.5, 0.1], rtol=1e-5)
    expected = "process 2 is a straggler: 0.500 s of a step's 1.000 s are its own, 0.100 s of"
    assert said.startswith(expected)
    assert logged([0.1, 0.5, 0.1, 0.1])[1] == ""  # another one: counted anew
    for _ in range(2 * faults.PATIENCE):  # that late hardly matters in such steps
        assert logged(*late, seconds=3.0)[1] == ""


@pytest.mark.parametrize(("seconds", "stop"), [(0.8, 2.0), (600, 0.5)])
def test_time_in_which_the_process_did_not_run_is_its_own(tmp_path, seconds, stop):
    """Of a real process that is stopped; the watchdog does not count that time."""
    code = (
        "import pathlib, sys, time; from deepseek_jax.training.faults import Heartbeat;"
        f"h = Heartbeat(pathlib.Path({str(tmp_path)!r}), {seconds}); h.step(1);"
        "print('on', flush=True);"
        "time.sleep(0.5); h.busy(); time.sleep(1); h.close(); print(h.stalled)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(stop)
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert float(said) > 0.6 * stop


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    own = Runs(folder, model=MODEL, steps=60, sequence_length=16, save_every=10)
    launcher = own.start("whole")
    assert launcher.wait() == 0, own.output()
    assert [row["step"] for row in own.rows("whole")] == list(range(1, 61))
    return own


def same(runs, name):
    for file in ("metrics.jsonl", "eval.jsonl", "expert_load.jsonl"):
        assert runs.rows(name, file) == runs.rows("whole", file), file


@pytest.mark.slow
def test_kill_9_of_any_process_restarts_all_and_leaves_no_trace(runs):
    launcher = runs.start("killed")
    for step, rank in ((5, 1), (14, 0), (22, 1)):
        runs.wait_for(launcher, "killed", step)
        os.kill(runs.process(launcher, rank), signal.SIGKILL)
    assert launcher.wait() == 0, runs.output()
    said = runs.output()
    assert said.count("starting all 2 processes again") == 3
    assert "was killed by SIGKILL after step" in said and "resuming in" in said
    same(runs, "killed")


@pytest.mark.slow
def test_a_stopped_process_is_noticed_named_and_restarted(runs):
    launcher = runs.start("hung", "--faults.watchdog-seconds", "4")
    runs.wait_for(launcher, "hung", 12)
    os.kill(runs.process(launcher, 1), signal.SIGSTOP)
    assert launcher.wait() == 0, runs.output()
    said = runs.output()
    assert "process 1 (pid" in said and "is stopped, and silent" in said
    assert said.count("starting all 2 processes again") == 1
    same(runs, "hung")


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_after_one_step(runs):
    launcher = runs.start("stopped")
    runs.wait_for(launcher, "stopped", 12)
    os.kill(runs.process(launcher, 1), signal.SIGTERM)
    assert launcher.wait() == 143, runs.output()
    said = runs.output()
    assert "stopped by SIGTERM after step" in said and "again" not in said.replace("again to", "")
    step = max(int(path.name) for path in (runs.folder / "stopped/checkpoints").iterdir())
    assert step == runs.rows("stopped")[-1]["step"] < 60
    assert runs.start("stopped").wait() == 0
    same(runs, "stopped")


@pytest.mark.slow
def test_bad_input_in_one_process_ends_all_at_once(runs):
    """The run is another's: only process 0 finds out, and does not wait for the others."""
    first = runs.start("taken", "--steps", "100000")
    runs.wait_for(first, "taken", 1)
    began = time.monotonic()
    second = runs.start("taken")
    assert second.wait() == 2
    assert time.monotonic() - began < 100
    assert "is training in" in runs.output()
    first.terminate()
    assert first.wait() == 143


@pytest.mark.slow
def test_a_slow_process_is_named(runs):
    launcher = runs.start("slow", "--steps", "20", ODD="1", SLOW="0.3")
    assert launcher.wait() == 0, runs.output()
    assert "process 1 is a straggler" in runs.output()
    named = [row["straggler"] for row in runs.rows("slow", "processes.jsonl")]
    assert named[-1] == 1 and 0 not in named
    assert [row["straggler"] for row in runs.rows("whole", "processes.jsonl")].count(None) > 50


def place(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.fixture
def state():
    mesh = make_mesh(MeshShape(data=2, tensor=4))
    numbers = np.arange(64, dtype=np.float32).reshape(8, 8)
    return {
        "step": place(mesh, np.int32(3)),
        "params": {
            "w": place(mesh, numbers / 7, "data", "tensor"),
            "b": place(mesh, jax.numpy.asarray(numbers[0], jax.numpy.bfloat16), "tensor"),
        },
    }


def abstract(state):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    return lambda step, about: shapes


def test_a_local_checkpoint_comes_back_bit_for_bit(state, tmp_path):
    local = LocalCheckpoints(tmp_path, "a run")
    assert local.newest(abstract(state)) == -1
    for step in (3, 5, 7):
        local.save(step, state, {"position": step})
    local.wait()
    assert integrity.steps(local._folder) == [5, 7]
    again = LocalCheckpoints(tmp_path, "a run")
    assert again.newest(abstract(state)) == 7
    restored, about = again.restore(7, abstract(state))
    assert about == {"position": 7}
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert ours.dtype == theirs.dtype and ours.sharding == theirs.sharding
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    size = (local._folder / "7" / "state.bin").stat().st_size
    assert size == 4 + 64 * 4 + 8 * 2  # replicas are written once


def test_a_local_checkpoint_is_passed_over_unless_it_serves(state, tmp_path):
    local = LocalCheckpoints(tmp_path, "a run")
    for step in (5, 7):
        local.save(step, state, {})
    local.wait()
    assert LocalCheckpoints(tmp_path, "another").newest(abstract(state)) == -1
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    moved = jax.tree.map(lambda x: place(mesh, np.asarray(x), *x.sharding.spec), state)
    assert local.newest(abstract(moved)) == -1
    data = bytearray((local._folder / "7" / "state.bin").read_bytes())
    data[11] ^= 1
    (local._folder / "7" / "state.bin").write_bytes(data)
    assert local.newest(abstract(state)) == 5


def test_processes_agree_on_the_newest_step_that_all_have(state, tmp_path, monkeypatch):
    local = LocalCheckpoints(tmp_path, "a run")
    for step in (5, 7):
        local.save(step, state, {})
    local.wait()
    other = [-1] * 6 + [3, 5]
    gather = "deepseek_jax.checkpoint.local.multihost_utils.process_allgather"
    monkeypatch.setattr(gather, lambda mine: np.stack([mine, np.int32(other)]))
    assert local.newest(abstract(state)) == 5
    other = [-1] * 7 + [3]
    assert local.newest(abstract(state)) == -1


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_after_a_kill_the_newest_checkpoint_counts(runs, lost, tmp_path):
    """Every 3 steps on the own disk, every 50 durably; `lost`: one host comes back without."""
    name = f"local-{lost}"
    flags = ["--faults.local-save-every", "3", "--faults.local-dir", str(tmp_path)]
    flags += ["--save-every", "20"]
    launcher = runs.start(name, *flags)
    runs.wait_for(launcher, name, 29)
    pid = runs.process(launcher, 1)
    if lost:
        os.kill(pid, signal.SIGSTOP)
        for folder in tmp_path.glob("*/process_1_of_2"):
            shutil.rmtree(folder)
    os.kill(pid, signal.SIGKILL)
    assert launcher.wait() == 0, runs.output()
    [resumed] = [line for line in runs.output().splitlines() if "resuming in" in line]
    assert ("after step 20" in resumed) if lost else (f", from {tmp_path}" in resumed)
    same(runs, name)
    assert not list(tmp_path.glob("*/process*"))
