"""Invariance: a run in a bucket writes what one in a folder does, also when stopped or killed.

The bucket is a stand-in on this machine with the semantics of Google's (tests/bucket.py), reached
over its HTTP protocol by the client that would reach the real one; the real one was not.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import cases
import jax
import numpy as np
import pytest

from deepseek_jax import convert, evaluate, generate, report
from deepseek_jax.checkpoint.manager import resolve
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.monitoring.metrics import read_lines
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import TrainConfig

MODEL = cases.decoder(
    "mla", "sigmoid", num_layers=2, num_dense_layers=1, num_mtp_layers=1,
    vocab_size=260, init_scale=0.05,
)  # fmt: skip
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
    texts = [
        json.loads(content)["position"]
        for content in (
            (whole / "checkpoints/8/meta.json").read_bytes(),
            gs["runs/team/a/checkpoints/8/meta.json"],
        )
    ]
    assert texts == [64, 64]
    prints = [(whole / "checkpoints/8/data.sha256").read_bytes()]
    assert prints == [gs["runs/team/a/checkpoints/8/data.sha256"]]
    assert all(name.startswith(("runs/", "data/")) for name in gs.names())
