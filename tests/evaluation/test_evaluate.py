"""Contract: what the command prints and how it refuses bad input."""

import json
import subprocess
import sys

import jax
import pytest

from deepseek_jax import evaluate
from deepseek_jax.core.errors import run_command
from deepseek_jax.evaluation.suite import held_out, open_task


def test_prints_a_table_and_json(run, capsys):
    run_command(evaluate.main, ["--checkpoint", run.directory])
    names, values = capsys.readouterr().out.splitlines()
    assert names.split("  ")[-3:] == ["bits per byte", "gzip -9", "xz -9e"]
    assert len(names) == len(values)
    run_command(evaluate.main, ["--checkpoint", f"{run.directory}/checkpoints/1", "--json"])
    scores = json.loads(capsys.readouterr().out)
    dataset = open_task(run.config, run.tokenizer, None)
    expected = held_out(run.model, run.params, dataset, 16)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert f"{expected['loss']:.4f}" in values


@pytest.mark.parametrize(("rows", "devices"), [(16, 8), (12, 4), (3, 1)])
def test_rows_spread_over_the_devices_that_divide_them(run, capsys, monkeypatch, rows, devices):
    """Sharded = single-device, and the model runs on all the devices of the mesh."""
    used = []

    def watched(model, params, dataset, batch_size):
        used.append(jax.sharding.get_mesh().size)
        used.extend(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params))
        return held_out(model, params, dataset, batch_size)

    monkeypatch.setattr(evaluate, "held_out", watched)
    flags = ["--checkpoint", run.directory, "--batch-size", str(rows), "--json"]
    run_command(evaluate.main, flags)
    scores = json.loads(capsys.readouterr().out)
    assert set(used) == {devices}
    alone = held_out(run.model, run.params, open_task(run.config, run.tokenizer, None), rows)
    assert {name: scores[name] for name in alone} == pytest.approx(alone, rel=1e-6)


def test_scores_that_are_not_finite_are_null_in_json(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "held_out", lambda *_: {"loss": float("nan"), "tokens": 3})
    run_command(evaluate.main, ["--checkpoint", run.directory, "--json"])
    out = capsys.readouterr().out
    assert "NaN" not in out and json.loads(out)["loss"] is None
    run_command(evaluate.main, ["--checkpoint", run.directory])
    assert "nan" in capsys.readouterr().out


def test_scores_named_files(run, capsys):
    path = f"{run.directory}/*.txt"
    run_command(evaluate.main, ["--checkpoint", run.directory, "--data", path, "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["data"] == path
    assert scores["tokens"] == sum(len(text.encode()) + 1 for text in run.texts.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such directory"),
        (["--checkpoint", "RUN", "--batch-size", "0"], "--batch-size is 0"),
        (["--checkpoint", "RUN", "--data", "no.txt"], "no such file"),
        (["--checkpoint", "RUN", "--batchsize", "2"], "Unrecognized options: --batchsize"),
        (["--checkpoint", "RUN", "--batch-size", "two"], "batch-size"),
        ([], "--checkpoint"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(run, capsys, flags, message):
    flags = [run.directory if flag == "RUN" else flag for flag in flags]
    with pytest.raises(SystemExit) as exit_:
        run_command(evaluate.main, flags)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert "Traceback" not in err


def test_runs_as_a_module(run):
    command = [sys.executable, "-m", "deepseek_jax.evaluate", "--checkpoint", run.directory]
    done = subprocess.run([*command, "--data", "no.txt"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no such file" in done.stderr
    assert done.stderr.count("\n") == 1
