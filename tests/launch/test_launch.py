"""Contract: what the launchers start, and how the one for this machine takes deaths and hangs.

The supervisor's processes are stand-ins here; tests/training/test_faults.py has real ones.
"""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from launch import supervise

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
BEGINNING = """
import json, os, pathlib, signal, subprocess, sys, time
rank, folder = int(os.environ["JAX_PROCESS_ID"]), pathlib.Path(os.environ["HEARTBEAT_DIR"])
memory = pathlib.Path(sys.argv[1])
attempt = len(list(memory.glob(f"{rank}-*")))
(memory / f"{rank}-{attempt}").write_text(os.environ["JAX_COORDINATOR_ADDRESS"])
def beat(step, seconds=600.0):
    folder.mkdir(exist_ok=True)
    text = json.dumps({"step": step, "watchdog_seconds": seconds, "time": time.time()})
    (folder / f"{rank}.tmp").write_text(text)
    (folder / f"{rank}.tmp").replace(folder / f"{rank}.json")
beat(attempt)
"""


@pytest.fixture
def supervised(tmp_path, monkeypatch, capfd):
    """Run stand-ins of this text: (exit code, what the launcher said, attempts)."""
    memory, folder = tmp_path / "memory", tmp_path / "folder"
    memory.mkdir()
    folder.mkdir()

    def run(text: str, count: int = 2, asked: list | None = None):
        script = tmp_path / "process.py"
        script.write_text(BEGINNING + textwrap.dedent(text))
        monkeypatch.setattr(
            supervise, "command", lambda arguments: [sys.executable, str(script), *arguments]
        )
        code = supervise.run(count, [str(memory)], folder, [] if asked is None else asked)
        return code, capfd.readouterr().err, len(list(memory.glob("0-*")))

    run.memory = memory
    return run


def test_a_run_is_complete_when_all_processes_are(supervised):
    assert supervised("time.sleep(0.3 * rank)") == (0, "", 1)


def test_bad_input_is_not_tried_again(supervised):
    code, said, attempts = supervised("if rank: sys.exit(2)\ntime.sleep(60)")
    assert (code, attempts) == (2, 1)
    assert "again" not in said


def test_a_killed_process_restarts_all_on_another_port(supervised):
    code, said, attempts = supervised("""
        if attempt < 2:
            while rank and not (memory / f"0-{attempt}").exists():  # it counts the attempts
                time.sleep(0.01)
            if rank: os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
    """)
    assert (code, attempts) == (0, 3)
    assert "process 1" in said and "killed by SIGKILL after step" in said
    assert "process 0" not in said
    ports = {(supervised.memory / f"{i}-{j}").read_text() for i in (0, 1) for j in range(3)}
    assert len(ports) == 3


def test_a_silent_process_is_named_killed_and_restarted(supervised, monkeypatch):
    monkeypatch.setattr(supervise, "SLACK", 0.2)
    code, said, attempts = supervised("""
        if attempt == 0:
            beat(7, 0.5)
            if rank: os.kill(os.getpid(), signal.SIGSTOP)
            for _ in range(200):
                time.sleep(0.1)
                beat(7, 0.5)
    """)
    assert (code, attempts) == (0, 2)
    assert "process 1" in said and "is stopped, and silent" in said and "after step 7" in said
    assert "process 0" not in said


def test_the_one_that_others_hang_for_is_named(supervised):
    """Process 0's watchdog ended it, as process 1 does not even show a sign of life."""
    code, said, attempts = supervised("""
        if attempt == 0:
            if rank: os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)
            sys.exit(75)
    """)
    assert (code, attempts) == (0, 2)
    assert "process 1" in said and "process 0" not in said


def test_a_hang_without_a_culprit_says_who_hung(supervised):
    code, said, attempts = supervised("if attempt == 0: sys.exit(75)")
    assert (code, attempts) == (0, 2)
    assert "hung after step 0" in said


def test_a_requested_stop_ends_the_run_once_all_have_saved(supervised):
    text = "time.sleep(0.3 + rank); (memory / f'saved{rank}').touch(); sys.exit(143)"
    assert supervised(text) == (143, "", 1)
    assert (supervised.memory / "saved1").exists()


def test_a_signal_before_a_process_listens_stops_the_run(supervised):
    text = "if rank: os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    assert supervised(text) == (143, "", 1)


def test_a_run_that_cannot_go_on_is_given_up(supervised, monkeypatch):
    monkeypatch.setattr(supervise, "PATIENCE", 3 * supervise.CRASH)
    code, said, attempts = supervised("beat(3); sys.exit(5)", 1)
    assert (code, attempts) == (5, 4)  # the first reached new steps
    assert "giving up: no step after 3" in said


def test_kills_are_borne_longer_than_crashes(supervised, monkeypatch):
    monkeypatch.setattr(supervise, "PATIENCE", 4)
    text = "beat(3); os.kill(os.getpid(), signal.SIGKILL)"
    assert supervised(text, 1)[::2] == (1, 5)


def test_what_a_process_started_is_ended_with_it(supervised):
    supervised("""
        if attempt == 0:
            child = subprocess.Popen(["sleep", "60"])
            (memory / "child").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
    """, 1)  # fmt: skip
    stat = pathlib.Path("/proc", (supervised.memory / "child").read_text(), "stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(supervised, number):
    asked: list[int] = []
    timer = threading.Timer(1.0, lambda: asked.append(number))
    timer.start()
    text = """
        got = []
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda number, _: got.append(number))
        while not got: time.sleep(0.05)
        sys.exit(128 + got[0])
    """
    assert supervised(text, asked=asked) == (128 + number, "", 1)
    timer.join()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds processes to their parent")
def test_a_killed_launcher_leaves_no_processes(tmp_path):
    text = (
        "import sys; from launch import supervise; supervise.command = lambda _: "
        "[sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'];"
        "supervise.main(['2'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        [sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, text=True
    )
    pids = [int(launcher.stdout.readline()) for _ in range(2)]
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    for _ in range(100):
        if not any(map(alive, pids)):
            break
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    """Whether it still runs; one that nobody has waited for yet does not."""
    status = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def shell(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DRY_RUN": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_script_is_sound_shell():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    assert len(scripts) == 5
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


def test_local_says_what_it_would_start():
    done = shell("local.sh", "2", "--config", "a b.py", GLIBC_TUNABLES="")
    first, second = map(shlex.split, done.stdout.splitlines())
    assert first[-4:] == ["-m", "deepseek_jax.train", "--config", "a b.py"]
    settings = dict(word.split("=", 1) for word in second if "=" in word)
    assert settings["JAX_PROCESS_ID"] == "1"
    assert settings["JAX_NUM_PROCESSES"] == "2"
    assert settings["JAX_COORDINATOR_ADDRESS"].startswith("localhost:")
    assert "JAX_COMPILATION_CACHE_DIR" in settings
    own = shell("local.sh", "1", JAX_COMPILATION_CACHE_DIR="/mine").stdout
    assert "JAX_COMPILATION_CACHE_DIR" not in own
    for wrong in ((), ("0",), ("many", "--config", "x.py")):
        done = shell("local.sh", *wrong)
        assert (done.returncode, done.stderr[:16]) == (2, "error: give a nu")


def test_tpu_vm_says_what_it_would_run():
    done = shell("tpu_vm.sh", "--config", "a b.py", TPU="mine", ZONE="us-east5-a", REPO="code")
    words = shlex.split(done.stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mine"]
    assert words[6:8] == ["--zone=us-east5-a", "--worker=all"]
    remote = shlex.split(words[8].removeprefix("--command="))
    assert remote[:9] == ["cd", "code", "&&", "tmux", "new-session", "-d", "-s", "train", remote[8]]
    inner = shlex.split(remote[8])
    assert inner[:2] == ["env", "JAX_COORDINATOR_ADDRESS=auto"]
    assert inner[3:9] == [
        "launch/again.sh", "python3", "-m", "deepseek_jax.train", "--config", "a b.py"
    ]  # fmt: skip
    assert "TPU" in shell("tpu_vm.sh").stderr


def test_slurm_says_what_it_would_run():
    done = shell("slurm.sbatch", "--config", "a b.py")
    assert shlex.split(done.stdout) == [
        "srun", "--kill-on-bad-exit=1", "python", "-m", "deepseek_jax.train", "--config", "a b.py"
    ]  # fmt: skip
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.split()[1].split("=")[0] for line in lines if line.startswith("#SBATCH")]
    known = ["job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time",
             "signal", "requeue", "open-mode", "output"]  # fmt: skip
    assert options == [f"--{name}" for name in known]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]


@pytest.mark.parametrize(
    ("codes", "expected"), [("1 75 0", 0), ("1 2", 2), ("143", 143), ("7 7 7", 7)]
)
def test_slurm_and_again_start_over_until_it_is_done(tmp_path, codes, expected):
    """`srun` and the command are stand-ins that end with one code after the other."""
    for name in ("srun", "sleep"):
        (tmp_path / name).write_text(
            f'#!/bin/bash\n[[ {name} = sleep ]] && exit\nread -ra codes < "$CODES"\n'
            'echo "${codes[@]:1}" > "$CODES"\nexit "${codes[0]}"\n'
        )
        (tmp_path / name).chmod(0o755)
    for script in ("slurm.sbatch", "again.sh"):
        (tmp_path / "codes").write_text(f"{codes}\n")
        path = f"{tmp_path}:{os.environ['PATH']}"
        own = {"PATH": path, "CODES": str(tmp_path / "codes"), "RESTARTS": "2", "DRY_RUN": ""}
        done = shell(script, *(["srun"] if script == "again.sh" else []), **own)
        assert done.returncode == expected
        assert (tmp_path / "codes").read_text().split() == []


# The fields of jobset.x-k8s.io/v1alpha2 and batch/v1 that the manifest uses, and their types.
POD = {
    "restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": dict,
    "containers": [{
        "name": str, "image": str, "command": [str], "args": [str],
        "env": [{"name": str, "value": str}], "ports": [{"containerPort": int}],
        "resources": {"limits": dict}, "volumeMounts": [{"name": str, "mountPath": str}],
    }],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}  # fmt: skip
JOB = {
    "parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int,
    "podFailurePolicy": {"rules": [{
        "action": str,
        "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
    }]},
    "template": {"spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion": str, "kind": str, "metadata": {"name": str, "annotations": dict},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip
GKE = {
    "NAME": "v2-lite", "IMAGE": "gcr.io/p/i:1", "ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "2x4x4",
    "HOSTS": "8", "CHIPS": "4", "CLAIM": "runs",
}  # fmt: skip


def check(value, schema, where="jobset"):
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() <= schema.keys(), where
        assert value.keys() >= schema.keys(), where
        for key, inner in schema.items():
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for item in value:
            check(item, schema[0], f"{where}[]")
    else:
        assert type(value) is schema, where


def test_gke_fills_in_a_sound_jobset():
    yaml = pytest.importorskip("yaml")
    done = shell("gke.sh", "--config", 'a "b".py', "--steps", "7", **GKE)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    check(manifest, JOBSET)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8
    container = job["template"]["spec"]["containers"][0]
    assert container["args"] == ["--config", 'a "b".py', "--steps", "7"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x4x4",
    }
    # Kubernetes has these rules: pods that a failure policy looks at are never restarted in place.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {volume["name"] for volume in job["template"]["spec"]["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
    assert len(json.dumps(manifest)) < 2**20
    left = {name: value for name, value in GKE.items() if name not in ("IMAGE", "HOSTS")}
    done = shell("gke.sh", **left)
    assert (done.returncode, done.stderr) == (2, "error: set HOSTS, IMAGE\n")
