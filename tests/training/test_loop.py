"""Invariance: a run that is stopped, killed or resumed writes what an uninterrupted one writes."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import cases
import fast
import hf_cases
import jax
import numpy as np
import pytest
from launched import CONFIG

from deepseek_jax import convert
from deepseek_jax.checkpoint import huggingface
from deepseek_jax.checkpoint.manager import load_params, read_config, resolve
from deepseek_jax.checkpoint.safetensors import open_tensors
from deepseek_jax.core import tree
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.sparse_attention import Indexer
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.ops.exchange import Exchange
from deepseek_jax.training.language import Language
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import BatchStep, Stage, TrainConfig

MODEL = cases.decoder("mla", "sigmoid", num_layers=2, num_dense_layers=1, num_mtp_layers=1)
MODEL = dataclasses.replace(MODEL, vocab_size=260, init_scale=0.05)
SMALL = dataclasses.replace(cases.decoder("gqa", None), vocab_size=260)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        lines = (f"line {i * j} of file {i} says {(i + j) ** 3}\n" for j in range(40))
        (folder / f"{i}.txt").write_text("".join(lines))
    source = TextFiles(paths=(str(folder / "*.txt"),))
    return Data(source=source, tokenizer=Bytes(), held_out=0.2, cache_dir=str(folder / "cache"))


def recipe(data, run_dir, model=MODEL, **fields):
    base = {"steps": 11, "batch_size": 8, "sequence_length": 16, "log_every": 1}
    base |= {"save_every": 4, "eval_every": 5, "precision": Precision(compute="float32")}
    return TrainConfig(model=model, data=data, run_dir=str(run_dir), **(base | fields))


def held_out(model, params, dataset, batch_size):
    total = sum(float(np.abs(x).sum()) for x in jax.tree.leaves(params))
    return {"loss": total, "bits_per_byte": float(batch_size)}


LENT = Lent(held_out, lambda model, params, dataset, config: "the end")


def rows(run_dir, name):
    """The lines of a log without what depends on the clock."""
    lines = (pathlib.Path(run_dir) / name).read_text().splitlines()
    timed = ("tokens_per_second", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run directory that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(recipe(data, run_dir), LENT) == 0
    return run_dir


def test_a_run_writes_what_it_promises(whole, data):
    metrics = rows(whole, "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 12))
    assert [row["step"] for row in rows(whole, "eval.jsonl")] == [5, 10, 11]
    assert [row["step"] for row in rows(whole, "expert_load.jsonl")] == list(range(1, 12))
    names = {"loss", "total_loss", "mtp_loss", "learning_rate", "grad_norm", "skipped"}
    names |= {f"router/{n}" for n in ("max_violation", "entropy", "utilization_std")}
    names |= {f"router/{n}" for n in ("dead_experts", "dropped_fraction", "sequence_loss")}
    assert names <= set(metrics[0])
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens_per_second"] > 0
    assert last["mfu"] > 0
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["11", "4", "8"]
    assert read_config(whole)["batch_size"] == 8
    assert (whole / "report" / "report.html").exists()
    assert list((whole / "tensorboard").iterdir())


def test_a_signal_saves_and_the_rest_is_bit_identical(whole, data, tmp_path, capfd):
    def interrupting(model, params, dataset, batch_size):
        os.kill(os.getpid(), signal.SIGTERM)
        return held_out(model, params, dataset, batch_size)

    config = recipe(data, tmp_path)
    usual = signal.getsignal(signal.SIGTERM)
    assert train(config, LENT._replace(held_out=interrupting)) == 143
    assert signal.getsignal(signal.SIGTERM) is usual
    assert "stopped by SIGTERM after step 6" in capfd.readouterr().err
    assert resolve(tmp_path).name == "6"
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a later kill's leftovers
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert train(config, LENT) == 0
    for name in ("metrics.jsonl", "eval.jsonl", "expert_load.jsonl"):
        assert rows(tmp_path, name) == rows(whole, name), name
    assert train(config, LENT) == 0  # once more: nothing left to do
    assert "the end" in capfd.readouterr().out
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows(tmp_path, name) == rows(whole, name), name


def test_another_model_is_refused_and_other_changes_are_not(whole, data):
    other = dataclasses.replace(MODEL, norm_eps=1e-5)
    with pytest.raises(InputError, match=r"another model: model\.norm_eps was 1e-06, is 1e-05"):
        train(recipe(data, whole, other), LENT)
    before = len(rows(whole, "metrics.jsonl"))
    recorded = json.loads((whole / "config.json").read_text())
    del recorded["model"]["moe"]["exchange"]  # as runs of earlier versions were written down
    (whole / "config.json").write_text(json.dumps(recorded))
    moe = dataclasses.replace(MODEL.moe, exchange=Exchange(kind="padded"))
    changed = dataclasses.replace(MODEL, remat="full", moe=moe)
    assert train(recipe(data, whole, changed, log_every=7, steps=11), LENT) == 0
    assert json.loads((whole / "config.json").read_text())["log_every"] == 7
    assert len(rows(whole, "metrics.jsonl")) == before


def test_other_training_data_than_the_checkpoints_are_refused(data, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(pathlib.Path(data.source.paths[0]).parent, folder)
    source = TextFiles(paths=(str(folder / "*.txt"),))
    moved = dataclasses.replace(data, source=source, cache_dir=str(tmp_path / "cache"))
    config = recipe(moved, tmp_path / "run", SMALL, steps=2)
    assert train(config, LENT) == 0
    longer = dataclasses.replace(config, steps=3)
    (folder / "3.txt").write_text((folder / "3.txt").read_text().replace("line", "LINE"))
    with pytest.raises(
        InputError, match=r"the training data or their order changed.*checkpoints/2"
    ):
        train(longer, LENT)
    (folder / "3.txt").write_text((folder / "3.txt").read_text().replace("LINE", "line"))
    assert train(longer, LENT) == 0


def test_a_run_can_start_from_anothers_parameters(whole, data, tmp_path):
    frozen = AdamW(learning_rate=0.0)
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(
        MODEL.moe, balance=dataclasses.replace(MODEL.moe.balance, bias_rate=0.0)))  # fmt: skip
    config = recipe(data, tmp_path, model, steps=1, init_from=str(whole), optimizer=frozen)
    assert train(config, LENT) == 0
    shapes = build(MODEL).shapes
    loaded = [load_params(resolve(p), shapes, layer_table(MODEL)) for p in (whole, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *loaded)
    wider = dataclasses.replace(model, mlp_dim=56)
    with pytest.raises(InputError, match=r"mlp/gate/weight is \(32, 48\) where .* \(32, 56\)"):
        train(dataclasses.replace(config, model=wider, run_dir=str(tmp_path / "wider")), LENT)


def test_a_run_can_start_from_a_hugging_face_folder(data, tmp_path):
    """Nothing moves at a learning rate of 0: the run's checkpoint goes back byte for byte."""
    there = hf_cases.save(hf_cases.hf_model("v2-lite", vocab_size=300), tmp_path / "hf")
    model = huggingface.open_folder(there).config
    frozen = AdamW(learning_rate=0.0)
    fields = {"steps": 1, "init_from": str(there), "optimizer": frozen}
    assert train(recipe(data, tmp_path / "run", model, **fields), LENT) == 0
    convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "back")])
    before, after = (open_tensors(path) for path in (there, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor.read(), after[name].read())
    wider = dataclasses.replace(model, mlp_dim=56)
    with pytest.raises(InputError, match=r"gate_proj.weight has shape \(48, 32\), not \(56, 32\)"):
        train(recipe(data, tmp_path / "wider", wider, **fields), LENT)


def test_indexers_are_added_to_a_model_that_has_none(data, tmp_path):
    """To a folder's and to a run's: they warm up alone, then the model sees what they keep."""
    shape = {"vocab_size": 300, "num_hidden_layers": 2}
    there = hf_cases.save(hf_cases.hf_model("v3-dense-3", **shape), tmp_path / "hf")
    plain = huggingface.open_folder(there).config
    indexer = Indexer(num_heads=16, head_dim=8, top_k=5)
    sparse = dataclasses.replace(plain.attention, indexer=indexer)
    model = dataclasses.replace(plain, attention=sparse)
    warm = Stage(steps=2, objective=Language(indexer_warmup=True))
    stages = (warm, Stage(name="sparse", steps=2))
    fields = {"init_from": str(there), "stages": stages}
    assert train(recipe(data, tmp_path / "run", model, **fields, save_every=1), LENT) == 0
    shapes = build(model).shapes
    first, last = (
        tree.flatten(load_params(tmp_path / "run/checkpoints" / step, shapes, layer_table(model)))
        for step in "24"
    )
    before = huggingface.load_params(
        huggingface.open_folder(there), build(plain), build(plain).shapes
    )
    for path, leaf in tree.flatten(before).items():
        np.testing.assert_array_equal(leaf, first[path])
        assert (leaf != last[path]).any(), path
    assert sum("/indexer/" in path for path in first.keys() - tree.flatten(before)) == 5
    kept = [row["attention/kept"] for row in rows(tmp_path / "run", "metrics.jsonl")]
    assert kept[:2] == [1, 1] and max(kept[2:]) < 1
    assert train(recipe(data, tmp_path / "plain", plain, steps=1), LENT) == 0
    fields = {"init_from": str(tmp_path / "plain"), "steps": 1}
    assert train(recipe(data, tmp_path / "from_run", model, **fields), LENT) == 0


def test_stages_carry_the_data_position_on_until_the_data_change(data, tmp_path):
    ramp = (BatchStep(step=2, batch_size=16, accumulation_steps=2),)
    longer = Stage(name="longer", steps=1, sequence_length=24)
    stages = (Stage(steps=3, batch_ramp=ramp), Stage(name="more", steps=1), longer)
    config = recipe(data, tmp_path, SMALL, stages=stages, save_every=1, eval_every=0)
    keep = dataclasses.replace(config.checkpoint, keep_last=9)
    assert train(dataclasses.replace(config, checkpoint=keep), LENT) == 0
    meta = [
        json.loads((tmp_path / "checkpoints" / str(step) / "meta.json").read_text())["position"]
        for step in range(1, 6)
    ]
    assert meta == [8, 16, 32, 40, 8]
    rates = [row["learning_rate"] for row in rows(tmp_path, "metrics.jsonl")]
    assert rates[2] == pytest.approx(1e-4)  # the cosine's end, and each stage begins anew
    assert rates[3] == pytest.approx(1e-3)
    assert [row["step"] for row in rows(tmp_path, "eval.jsonl")] == [5]


def test_a_run_that_only_skips_stops_and_says_why(data, tmp_path):
    wild = AdamW(learning_rate=1e30, clip_norm=None, max_skipped=3)
    config = recipe(data, tmp_path, SMALL, optimizer=wild, steps=50, save_every=0)
    with pytest.raises(InputError, match=r"step \d+: loss or gradient were not finite 3 steps"):
        train(config, LENT)
    assert [row["skipped"] for row in rows(tmp_path, "metrics.jsonl")][-3:] == [1.0, 2.0, 3.0]
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 12}, r"batch_size \(12\) .* does not split over the mesh's 8 batch shards"),
        ({"accumulation_steps": 2}, r"accumulation_steps \(2\) does not split"),
        ({"model": dataclasses.replace(SMALL, vocab_size=100)}, "model.vocab_size is 100: raise"),
    ],
)
def test_what_cannot_be_run_is_refused(data, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        train(recipe(data, tmp_path, **({"model": SMALL} | fields)), LENT)


@pytest.mark.slow
def test_kill_9_before_during_and_after_a_save_leaves_no_trace(data, tmp_path):
    """The command itself: every kill is followed by the same command line."""
    file, run_dir = tmp_path / "killed.py", tmp_path / "run"
    config = recipe(data, "", steps=40, save_every=10, eval_every=15, batch_size=4)
    text = json.dumps(to_dict(config))
    file.write_text(CONFIG.format(text=text))
    environment = os.environ | {
        "XLA_FLAGS": fast.FLAGS,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }

    def start(directory):
        command = [sys.executable, "-m", "deepseek_jax.train", "--config", str(file)]
        return subprocess.Popen(
            [*command, "--run-dir", str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill_when(ready):
        process = start(run_dir)
        while not ready():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.002)
        process.kill()
        process.communicate()

    def steps():
        path = run_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def saved(pattern):
        return list((run_dir / "checkpoints").glob(pattern))

    whole = start(tmp_path / "whole")
    said = whole.communicate()[0]
    assert whole.returncode == 0, said
    kill_when(lambda: steps() >= 5)  # before any save
    assert not saved("[0-9]*")
    kill_when(lambda: saved("10.saving"))  # during one
    kill_when(lambda: saved("20"))  # after one
    kill_when(lambda: steps() >= 34)
    last = start(run_dir)
    said = last.communicate()[0]
    assert last.returncode == 0, said
    for name in ("metrics.jsonl", "eval.jsonl", "expert_load.jsonl"):
        assert rows(run_dir, name) == rows(tmp_path / "whole", name), name
    assert resolve(run_dir).name == "40"
    for line in ("held-out after 40 steps", "gzip -9", "xz -9e", "sample:", "report: "):
        assert line in said
