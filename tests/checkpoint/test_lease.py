"""Invariance: of processes that want a run in a bucket, one gets it (see tests/bucket.py)."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from deepseek_jax.checkpoint import lease
from deepseek_jax.checkpoint.integrity import lock_run
from deepseek_jax.checkpoint.lease import LEASE, Lease
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import Object

ROOT = pathlib.Path(__file__).resolve().parents[2]
ELSEWHERE = {"host": "other", "pid": 7, "machine": "another", "token": "theirs"}
HOLDER = """
    import sys, time
    from deepseek_jax.checkpoint import integrity, lease
    from deepseek_jax.core.errors import InputError
    lease._machine = lambda: sys.argv[3]
    time.sleep(max(0, float(sys.argv[4]) - time.time()))
    try:
        with integrity.lock_run(sys.argv[1], float(sys.argv[2])):
            print("held", flush=True)
            time.sleep(60)
    except InputError as error:
        print(error, flush=True)
"""


@pytest.fixture
def holder(gs, tmp_path):
    """Starts processes that hold a run: (run, seconds, machine, time to start at)."""
    script, started = tmp_path / "holder.py", []
    script.write_text(textwrap.dedent(HOLDER))

    def start(run, seconds, machine="elsewhere", at=0.0):
        started.append(
            subprocess.Popen(
                [sys.executable, script, run, str(seconds), machine, str(at)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_lease_goes_with_its_block(gs):
    with lock_run("gs://bucket/a", 5):
        said = json.loads(gs[f"bucket/a/{LEASE}"])
        assert said["pid"] == os.getpid() and said["expires"] > time.time()
    assert f"bucket/a/{LEASE}" not in gs.names()
    with lock_run("gs://bucket/a", 5):
        pass


def test_it_is_renewed_and_a_second_run_refused(gs, holder):
    first = holder("gs://bucket/b", 3)
    assert first.stdout.readline() == "held\n"
    before, began = gs[f"bucket/b/{LEASE}"], time.monotonic()
    refused = pytest.raises(InputError, match=rf"process \(pid {first.pid} on .*\) is training in")
    with refused, lock_run("gs://bucket/b", 3):
        pass
    assert time.monotonic() - began < 3
    time.sleep(3)  # it lasts longer than it was made for
    assert json.loads(gs[f"bucket/b/{LEASE}"])["expires"] > json.loads(before)["expires"] + 1
    assert first.poll() is None
    with lock_run("gs://bucket/b2", 3):  # another run is another's
        pass


def test_a_killed_holders_lease_is_taken_when_it_has_run_out(gs, holder, capfd):
    first = holder("gs://bucket/c", 2)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    began = time.monotonic()
    with lock_run("gs://bucket/c", 2):
        assert 1 < time.monotonic() - began < 4
        assert json.loads(gs[f"bucket/c/{LEASE}"])["pid"] == os.getpid()
    assert f"held by pid {first.pid} on" in capfd.readouterr().err


def test_that_of_a_dead_process_of_this_machine_is_taken_at_once(gs, holder):
    first = holder("gs://bucket/d", 60, lease._machine())
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    began = time.monotonic()
    with lock_run("gs://bucket/d", 60):
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b'{"host": "x"}',
        json.dumps(ELSEWHERE | {"seconds": 60, "expires": time.time() - 100}).encode(),
    ],
)
def test_what_ran_out_long_ago_or_is_no_lease_is_taken_at_once(gs, content):
    gs[f"bucket/e/{LEASE}"] = content
    began = time.monotonic()
    with lock_run("gs://bucket/e", 60):
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("case", ["expired", "none"])
def test_of_processes_that_race_exactly_one_wins(gs, holder, case):
    run = f"gs://bucket/race-{case}"
    if case == "expired":
        over = ELSEWHERE | {"seconds": 60, "expires": time.time() - 100}
        gs[f"bucket/race-expired/{LEASE}"] = json.dumps(over).encode()
    gs.before = lambda kind, name: time.sleep(0.05)  # all have read before either puts
    at = time.time() + 2
    racers = [holder(run, 4, f"machine {i}", at) for i in range(4)]
    said = [racer.stdout.readline() for racer in racers]
    gs.before = lambda kind, name: None
    winner = said.index("held\n")
    assert json.loads(gs[f"{run.removeprefix('gs://')}/{LEASE}"])["pid"] == racers[winner].pid
    others = [line for line in said if line != "held\n"]
    assert len(others) == 3
    assert all(f"pid {racers[winner].pid} on" in line for line in others)


def test_a_holder_that_was_stopped_too_long_ends_and_writes_no_more(gs, holder):
    first = holder("gs://bucket/f", 2)
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGSTOP)
    second = holder("gs://bucket/f", 2, "a third")
    assert second.stdout.readline() == "held\n"
    first.send_signal(signal.SIGCONT)
    assert first.wait(5) == 75
    assert "could not be renewed for 2 s" in first.stderr.read()
    assert json.loads(gs[f"bucket/f/{LEASE}"])["pid"] == second.pid


def test_a_holder_that_finds_anothers_lease_ends(gs, holder):
    first = holder("gs://bucket/g", 4)
    assert first.stdout.readline() == "held\n"
    gs[f"bucket/g/{LEASE}"] = json.dumps(ELSEWHERE | {"seconds": 60, "expires": 2e9}).encode()
    assert first.wait(5) == 2
    assert "was taken from it: pid 7 on other" in first.stderr.read()


def test_an_answer_that_was_lost_does_not_lose_the_lease(gs, monkeypatch):
    """The client repeats the put, which then finds the generation that it made itself."""
    put_if = Object.put_if

    def deaf(*arguments, **names):
        put_if(*arguments, **names)

    monkeypatch.setattr(Object, "put_if", deaf)
    held = Lease(Object("gs://bucket/h"), 3)
    time.sleep(4)
    assert json.loads(gs[f"bucket/h/{LEASE}"])["expires"] > time.time()
    held.close()


def test_a_bucket_that_is_not_there_or_not_ours(gs):
    for name, why in (("absent", "NOT_FOUND"), ("forbidden", "PERMISSION_DENIED"), ("x", "Inval")):
        with pytest.raises(InputError, match=f"^gs://{name}/a/{LEASE}: .*{why}"):
            Lease(Object(f"gs://{name}/a"), 1)
