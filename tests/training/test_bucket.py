"""Invariance: a run in a bucket writes what one in a folder does, also when stopped or killed.

The bucket is a stand-in on this machine with the semantics of Google's (tests/bucket.py), reached
over its HTTP protocol by the client that would reach the real one; the real one was not.
"""

import collections
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import cases
import fast
import jax
import numpy as np
import pytest
from launched import CONFIG, Runs

from deepseek_jax import convert, evaluate, generate, report
from deepseek_jax import train as train_command
from deepseek_jax.checkpoint.integrity import lock_run
from deepseek_jax.checkpoint.manager import load_params, resolve
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.errors import run_command
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.monitoring import metrics
from deepseek_jax.monitoring.metrics import read_lines
from deepseek_jax.training import loop
from deepseek_jax.training.faults import Faults
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import TrainConfig

MODEL = cases.decoder(
    "mla", "sigmoid", num_layers=3, num_dense_layers=1, vocab_size=260, init_scale=0.05
)
LOGS = ("metrics.jsonl", "eval.jsonl", "expert_load.jsonl")


def held_out(model, params, dataset, batch_size):
    total = sum(float(np.abs(x).sum()) for x in jax.tree.leaves(params))
    return {"loss": total, "bits_per_byte": float(batch_size)}


LENT = Lent(held_out, lambda model, params, dataset, config: "the end")


@pytest.fixture(scope="module")
def texts(gs, tmp_path_factory):
    """The same texts in a folder and in the bucket: (glob, glob)."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        text = "".join(f"line {i * j} of file {i} says {(i + j) ** 3}\n" for j in range(40))
        (folder / f"{i}.txt").write_text(text)
        gs[f"data/text/{i}.txt"] = text.encode()
    return f"{folder}/*.txt", "gs://data/text/*.txt"


def recipe(texts, run_dir, cache, **fields):
    source = TextFiles(paths=(texts,))
    data = Data(source=source, tokenizer=Bytes(), held_out=0.2, cache_dir=str(cache))
    base = {"steps": 11, "batch_size": 8, "sequence_length": 16, "log_every": 1}
    base |= {"save_every": 4, "eval_every": 5, "precision": Precision(compute="float32")}
    return TrainConfig(model=MODEL, data=data, run_dir=str(run_dir), **(base | fields))


def rows(run_dir, name):
    """The lines of a log without what depends on the clock."""
    timed = ("tokens_per_second", "mfu")
    lines = read_lines(f"{run_dir}/{name}")
    return [{key: row[key] for key in row if key not in timed} for row in lines]


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A run in a folder that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(recipe(texts[0], run_dir, run_dir / "cache"), LENT) == 0
    return run_dir


@pytest.fixture(scope="module")
def run(gs, texts, whole, tmp_path_factory):
    """The same run in the bucket, on texts in the bucket."""
    cache = tmp_path_factory.mktemp("cache")
    assert train(recipe(texts[1], "gs://runs/team/a", cache), LENT) == 0
    return "gs://runs/team/a"


def test_a_run_in_a_bucket_equals_one_in_a_folder(gs, run, whole):
    for name in LOGS:
        assert rows(run, name) == rows(whole, name) != [], name
    there = gs.names("runs/team/a/")
    steps = {name.split("/")[4] for name in there if "/checkpoints/" in name}
    assert steps == {"11", "4", "8"}
    kinds = {name.split("/")[3] for name in there}
    assert kinds == {
        "checkpoints", "config.json", "eval", "expert_load", "metrics", "report", "tensorboard",
    }  # fmt: skip
    for name in ("meta.json", "data.sha256"):
        assert (
            gs[f"runs/team/a/checkpoints/8/{name}"] == (whole / "checkpoints/8" / name).read_bytes()
        )
    shapes, layers = build(MODEL).shapes, layer_table(MODEL)
    ours, theirs = (load_params(resolve(path), shapes, layers) for path in (run, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def said(main, *flags, capsys):
    capsys.readouterr()
    run_command(main, [str(flag) for flag in flags])
    return capsys.readouterr().out


def test_every_command_reads_it(gs, run, whole, texts, tmp_path, capsys):
    """The same words from the bucket as from the folder."""
    for main, flag, *flags in (
        (generate.main, "--checkpoint", "--prompt", "line 3", "--max-new-tokens", 9),
        (evaluate.main, "--checkpoint", "--json"),
        (convert.main, "inspect"),
    ):
        answers = [said(main, flag, place, *flags, capsys=capsys) for place in (run, whole)]
        assert answers[0] == answers[1] != "", main
    by_step = said(convert.main, "inspect", f"{run}/checkpoints/8/", capsys=capsys)
    assert by_step == answers[0]
    scores = [
        json.loads(said(evaluate.main, "--checkpoint", run, "--data", t, "--json", capsys=capsys))
        for t in texts
    ]
    assert scores[0].pop("data") != scores[1].pop("data") and scores[0] == scores[1]
    assert said(report.main, run, capsys=capsys).strip() == f"{run}/report/report.html"
    assert b"data:image/png" in gs["runs/team/a/report/report.html"]
    for place, target in ((run, "a"), (whole, "b")):
        said(convert.main, "to-hf", place, tmp_path / target, capsys=capsys)
    pairs = zip(sorted((tmp_path / "a").iterdir()), sorted((tmp_path / "b").iterdir()), strict=True)
    for ours, theirs in pairs:
        assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()
    for file in (tmp_path / "a").iterdir():
        gs[f"runs/hf/{file.name}"] = file.read_bytes()
    places = "gs://runs/hf", tmp_path / "a"
    answers = [said(convert.main, "inspect", place, capsys=capsys) for place in places]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_a_run_starts_from_anothers_parameters(gs, run, whole, texts, tmp_path, kind):
    given = {"run": (run, whole)}.get(kind)
    if kind == "folder":
        convert.main(["to-hf", str(whole), str(tmp_path / "hf")])
        for file in (tmp_path / "hf").iterdir():
            gs[f"runs/given/{file.name}"] = file.read_bytes()
        given = ("gs://runs/given", tmp_path / "hf")
    logs = []
    for place, where in zip(given, (f"gs://runs/from-{kind}", tmp_path / "from"), strict=True):
        config = recipe(texts[0], where, tmp_path / "cache", steps=2, init_from=str(place))
        assert train(config, LENT) == 0
        logs.append(rows(where, "metrics.jsonl"))
    assert logs[0] == logs[1] != []


def test_damage_is_passed_over_and_what_is_torn_is_no_checkpoint(gs, texts, whole, tmp_path, capfd):
    config = recipe(texts[0], "gs://runs/damaged", tmp_path)
    assert train(config, LENT) == 0
    chunk = next(n for n in gs.names("runs/damaged/checkpoints/11/state/params.") if "/0" in n)
    gs[chunk] = bytes([gs[chunk][0] ^ 1]) + gs[chunk][1:]
    assert resolve("gs://runs/damaged").name == "8"
    said = capfd.readouterr().err
    assert f"11 is damaged ({chunk.split('/11/')[1]} does not match its size" in said
    del gs["runs/damaged/checkpoints/8/manifest.json"]
    assert resolve("gs://runs/damaged").name == "4"
    assert train(config, LENT) == 0
    assert "after step 4" in capfd.readouterr().err
    for name in LOGS:
        assert rows("gs://runs/damaged", name) == rows(whole, name), name
    assert resolve("gs://runs/damaged").name == "11"


def test_metrics_grow_in_parts_and_are_cut_back(gs, texts, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "PART", 1000)
    monkeypatch.setattr(metrics, "PAUSE", 0.0)
    config = recipe(texts[0], "gs://runs/parts", tmp_path, save_every=3)
    calls = []

    def stopping(model, params, dataset, batch_size):
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return held_out(model, params, dataset, batch_size)

    assert train(config, LENT._replace(held_out=stopping)) == 143
    assert len(gs.names("runs/parts/metrics/")) >= 3
    log = metrics.RunLog("gs://runs/parts")  # of a run that was killed later
    log.cut_back(100)
    for step in range(7, 30):
        log.metrics(step, {"loss": 1.0} | dict.fromkeys("abcdefgh", 0.5))
    log.close()
    assert rows("gs://runs/parts", "metrics.jsonl")[-1]["step"] == 29
    assert train(config, LENT) == 0
    for name in LOGS:
        assert rows("gs://runs/parts", name) == rows(whole, name), name
    numbers = [n.rpartition("/")[2] for n in gs.names("runs/parts/metrics/")]
    assert numbers == [f"{i:06d}.jsonl" for i in range(len(numbers))] and len(numbers) >= 5


def test_what_a_hosts_disk_holds_meanwhile(gs, texts, tmp_path, monkeypatch):
    """Emergency checkpoints, heartbeats, and what is put when it is complete."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.delenv("HEARTBEAT_DIR", raising=False)
    faults = Faults(local_save_every=2, local_dir=str(tmp_path / "near"))
    config = recipe(texts[0], "gs://runs/near", tmp_path / "cache", faults=faults, eval_every=0)

    def failing(model, params, dataset, batch_size):
        raise RuntimeError("a fault at the end")

    with pytest.raises(RuntimeError, match="a fault at the end"):
        train(dataclasses.replace(config, save_every=0), LENT._replace(held_out=failing), (2, 3))
    assert not any("/checkpoints/" in name for name in gs.names("runs/near"))
    steps = [path.name for path in (tmp_path / "near").glob("*/process_0_of_1/*")]
    assert sorted(steps) == ["10", "8"]
    assert [row["step"] for row in rows("gs://runs/near", "metrics.jsonl")][:10] == [*range(1, 11)]
    assert train(config, LENT) == 0
    assert [row["step"] for row in rows("gs://runs/near", "metrics.jsonl")] == [*range(1, 12)]
    assert not list((tmp_path / "near").glob("*/process_0_of_1"))
    assert b"operation" in gs["runs/near/profile/operations.txt"]
    there = gs.names("runs/near/")
    assert any(name.endswith(".xplane.pb") for name in there)
    assert sum("/tensorboard/events" in name for name in there) >= 6  # a file a flush
    left = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert {path.parent.name for path in left} == {"heartbeats"}


@pytest.fixture
def command(tmp_path):
    """Starts the command on a config: (config, flags)."""

    def start(config, *flags):
        file = tmp_path / "killed.py"
        file.write_text(CONFIG.format(text=json.dumps(to_dict(config))))
        own = {"XLA_FLAGS": fast.FLAGS}
        own |= {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
        own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        own |= {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
        return subprocess.Popen(
            [sys.executable, "-m", "deepseek_jax.train", "--config", str(file), *flags],
            env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


MOMENTS = [  # the request at which the process is killed, and whether it is still carried out
    ("PUT", "/metrics/000000.jsonl", False),
    ("PUT", "/checkpoints/5/state/params.layer_0.attention", True),
    ("PUT", "/checkpoints/5/manifest.json", False),
    ("PUT", "/checkpoints/5/manifest.json", True),
    ("DELETE", "/checkpoints/5/manifest.json", True),
    ("PUT", "/metrics/000000.jsonl", True),
    ("PUT", "/run.lease", True),
]


def killing(process, kind, part, done):
    """For `Bucket.before`: kills a process at a request, whose others then come to nothing."""

    def before(asked, name):
        if process.returncode is None and asked == kind and part in name:
            process.kill()
            process.wait()
            return not done
        return process.returncode is not None

    return before


@pytest.mark.slow
def test_kill_9_at_any_request_leaves_no_trace(gs, texts, tmp_path, command):
    """The command itself: every kill is followed by the same command line."""
    fields = {"steps": 15, "save_every": 5, "batch_size": 4}
    config = recipe(texts[1], "", tmp_path / "cache", **fields)
    keep = dataclasses.replace(config.checkpoint, keep_last=1)
    config = dataclasses.replace(config, checkpoint=keep)
    for kind, part, done in MOMENTS:
        process = command(config, "--run-dir", "gs://runs/killed")
        gs.before = killing(process, kind, f"runs/killed{part}", done)
        said = process.communicate()[0]
        gs.before = lambda kind, name: None
        assert process.returncode == -signal.SIGKILL, said
    process = command(config, "--run-dir", "gs://runs/killed")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "resuming in gs://runs/killed after step" in said
    whole = command(config, "--run-dir", str(tmp_path / "whole"))
    said = whole.communicate()[0]
    assert whole.returncode == 0, said
    for name in LOGS:
        assert rows("gs://runs/killed", name) == rows(tmp_path / "whole", name) != [], name
    left = gs.names("runs/killed/checkpoints/")
    assert {name.split("/")[3] for name in left} == {"15"}
    assert "runs/killed/run.lease" not in gs.names()


@pytest.mark.slow
def test_two_processes_write_and_resume_one_run(gs, tmp_path):
    """Each puts its own shards; one is killed while the other's already lie there."""
    runs = Runs(tmp_path, model=MODEL, steps=12, sequence_length=16, save_every=4, eval_every=6)
    flags = ("--mesh.data", "1", "--mesh.fsdp", "2")

    def before(kind, name):
        if "runs/two/checkpoints/8/written/" in name:
            os.kill(runs.process(launcher, 1), signal.SIGKILL)
            gs.before = lambda kind, name: None
            return True
        return False

    gs.before = before
    launcher = runs.start("gs://runs/two", *flags)
    assert launcher.wait(300) == 0, runs.output()
    assert "process 1" in runs.output() and "was killed by SIGKILL" in runs.output()
    assert "resuming in gs://runs/two after step 4" in runs.output()
    assert runs.start("local", *flags).wait(300) == 0, runs.output()
    for name in LOGS:
        assert rows("gs://runs/two", name) == runs.rows("local", name) != [], name
    there = gs.names("runs/two/checkpoints/12/")
    pieces = collections.Counter(
        name.rpartition("/")[0] for name in there if "/state/" in name and "zarr.json" not in name
    )
    assert set(pieces.values()) == {1, 2}  # of a leaf that is split, each has put its half
    assert not any("/written/" in name for name in there)
    shapes, layers = build(MODEL).shapes, layer_table(MODEL)
    places = "gs://runs/two", tmp_path / "local"
    ours, theirs = (load_params(resolve(path), shapes, layers) for path in places)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--run-dir", "s3://bucket/run"], "run_dir: s3://bucket/run: not a gs://bucket/name"),
        (["--run-dir", "gs://absent/run"], "gs://absent/run/run.lease: NOT_FOUND"),
        (["--run-dir", "gs://forbidden/run"], "PERMISSION_DENIED"),
        (["--run-dir", "gs://runs/held"], "is training in gs://runs/held; stop it or choose"),
        (["--data.cache-dir", "gs://runs/cache"], "data.cache_dir (gs://runs/cache) must be a"),
        (["--init-from", "gs://runs/nothing"], "gs://runs/nothing: no such directory"),
    ],
)
def test_refusals_are_a_sentence_and_exit_code_2(
    gs, texts, tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.setattr(train_command, "restart_with_huge_pages", lambda name: None)
    monkeypatch.setattr(loop, "matmul_peak", loop.matmul_peak)  # put back: the config replaces it
    file = tmp_path / "refused.py"
    config = recipe(texts[0], tmp_path / "run", tmp_path / "cache", steps=1)
    file.write_text(CONFIG.format(text=json.dumps(to_dict(config))))
    with lock_run("gs://runs/held", 8), pytest.raises(SystemExit) as exit_:
        run_command(train_command.main, ["--config", str(file), *flags])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split()) and "Traceback" not in said
