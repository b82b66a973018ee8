"""Contract: what is evaluated, and that the checkpoint's tokenizer reads it."""

import json

import numpy as np
import pytest

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.tokenizer import BPE, train_bpe
from deepseek_jax.evaluation.suite import open_task


def test_default_is_what_training_held_out(run):
    text = open_task(run.config, run.tokenizer, None).held_out_text().decode()
    held = [t for t in run.texts.values() if t in text]
    assert 0 < sum(len(t) for t in held) <= len(text)
    assert len(text) < sum(len(t) for t in run.texts.values())


def test_the_last_stages_data_come_first(run, tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    data = run.config["data"] | {"source": {"type": "TextFiles", "paths": [f"{tmp_path}/*.txt"]}}
    own, given = {"data": None, "sequence_length": None}, {"data": data, "sequence_length": 16}
    dataset = open_task(run.config | {"stages": [own, given]}, run.tokenizer, None)
    assert dataset.held_out_text() in (b"first", b"second")
    row = dataset.train.batch(np.arange(1))
    assert row["tokens"].shape == (1, 16)  # the loop evaluates at this length
    dataset = open_task(run.config | {"stages": [given, own]}, run.tokenizer, None)
    assert dataset.held_out_text() == open_task(run.config, run.tokenizer, None).held_out_text()
    row = dataset.train.batch(np.arange(1))
    assert row["tokens"].shape == (1, run.config["sequence_length"])


def test_named_files_are_evaluated_whole(run, tmp_path):
    (tmp_path / "one.txt").write_text("a text of its own")
    dataset = open_task(run.config, run.tokenizer, f"{tmp_path}/one.txt")
    assert dataset.held_out_text() == b"a text of its own"
    assert dataset.eval_bytes == 17
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert open_task(run.config, run.tokenizer, f"{tmp_path}/*.jsonl").held_out_text() == b"onetwo"
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["x", "y"]}), tmp_path / "three.parquet")
    assert open_task(run.config, run.tokenizer, f"{tmp_path}/*.parquet").held_out_text() == b"xy"
    assert len(open_task(run.config, run.tokenizer, f"{run.directory}/*.txt").held_out_text()) == (
        sum(len(text.encode()) for text in run.texts.values())
    )


def test_eval_tokens_hold_for_the_runs_own_data_only(run):
    limited = run.config | {"data": run.config["data"] | {"eval_tokens": 300}}
    whole = open_task(run.config, run.tokenizer, None).held_out_text()
    first = open_task(limited, run.tokenizer, None).held_out_text()
    assert whole.startswith(first)
    assert 0 < len(first) < len(whole)
    named = f"{run.directory}/*.txt"
    texts = [
        open_task(config, run.tokenizer, named).held_out_text() for config in (limited, run.config)
    ]
    assert texts[0] == texts[1]


def test_bad_names(run, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_task(run.config, run.tokenizer, "nothing/*.txt")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(InputError, match="different kinds"):
        open_task(run.config, run.tokenizer, f"{tmp_path}/*")
    with pytest.raises(InputError, match=r"b.jsonl:1: no field 'text'"):
        open_task(run.config, run.tokenizer, f"{tmp_path}/b.jsonl")
    with pytest.raises(InputError, match="give --data"):
        open_task(run.config | {"data": None}, run.tokenizer, None)


def test_prepared_data_of_another_tokenizer_are_refused(run, tmp_path, monkeypatch):
    train_bpe(BPE(vocab_size=260), iter(["some text"])).save(tmp_path / "tokenizer")
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="another tokenizer"):
        open_task(run.config, run.tokenizer, str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))  # training takes such paths as well
    with pytest.raises(InputError, match="another tokenizer"):
        open_task(run.config, run.tokenizer, "~")
    data = run.config["data"] | {"source": {"type": "Records", "path": "~"}}
    with pytest.raises(InputError, match="another tokenizer"):
        open_task(run.config | {"data": data}, run.tokenizer, None)
