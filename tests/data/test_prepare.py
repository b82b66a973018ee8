"""The prepare command: its folder trains like its source, and damage to it is noticed."""

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deepseek_jax import prepare
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.loader import Data, open_data
from deepseek_jax.data.sources import Mixture, Part, Records, TextFiles
from deepseek_jax.data.tokenizer import BPE


def _run(folder, *more: str, pattern: str = "*.txt"):
    argv = ["--input", f"{folder}/{pattern}", "--output", f"{folder}/out", "--tokenizer", "bpe:300"]
    prepare.main([*argv, "--shard-size", "1KB", "--held-out", "0.6", *more])
    return folder / "out"


def _open(folder, source, **more):
    config = Data(source=source, held_out=0.6, cache_dir=f"{folder}/cache", **more)
    return open_data(config, sequence_length=32, num_targets=2, seed=1)


def _documents(dataset, side: str) -> list[list[int]]:
    rows = {"training": dataset.train.rows, "held out": dataset.held}[side][0]
    return sorted(rows.corpus.document(number).tokens.tolist() for number in rows.documents)


def test_records_hold_what_the_source_holds(folder, capsys):
    out = _run(folder)
    direct = _open(folder, TextFiles(paths=(f"{folder}/*.txt",)), tokenizer=BPE(vocab_size=300))
    through = _open(folder, Records(path=str(out)))
    assert through.tokenizer.files() == direct.tokenizer.files()
    for side in ("training", "held out"):
        assert len(_documents(direct, side)) > 2
        assert _documents(through, side) == _documents(direct, side)
    assert through.eval_bytes == direct.eval_bytes
    assert through.held_out_text() == direct.held_out_text()
    manifest = json.loads((out / "manifest.json").read_text())
    files = sorted(path.name for path in out.glob("*.array_record"))
    assert sorted(row["file"] for row in manifest["shards"]) == files
    assert len(files) > 2
    sizes = [path.stat().st_size for path in folder.glob("*.txt")]
    assert (manifest["documents"], manifest["bytes"]) == (len(sizes), sum(sizes))
    assert "documents" in capsys.readouterr().out
    assert not list(folder.glob(".out*"))


def test_formats_are_told_by_their_names(folder):
    (folder / "a.jsonl").write_text('{"body": "one"}\n{"body": "two two"}\n')
    table = pyarrow.table({"body": ["one", "two two"]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    for pattern in ("a.jsonl", "a.parquet"):
        out = _run(folder, "--field", "body", "--tokenizer", "bytes", pattern=pattern)
        assert json.loads((out / "manifest.json").read_text())["bytes"] == 10
        shutil.rmtree(out)
    with pytest.raises(InputError, match="JSONL and Parquet"):
        _run(folder, pattern="a.*")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard-size", "many"], "--shard-size many"),
        (["--held-out", "1.5"], "held_out"),
        (["--tokenizer", "bpe:20"], "at least 258"),
        (["--tokenizer", "no/such.json"], "no/such.json: No such file"),
        (["--field", "body", "--format", "jsonl"], "not JSON"),
    ],
)
def test_bad_options_leave_nothing_behind(folder, flags, message):
    with pytest.raises(InputError, match=message):
        _run(folder, *flags)
    assert not list(folder.glob("*out*"))


def test_an_existing_output_is_refused(folder):
    (folder / "out").mkdir()
    with pytest.raises(InputError, match="out: exists"):
        _run(folder)


def test_damage_is_noticed(folder):
    out = _run(folder)
    shard = sorted(out.glob("train*"))[0]
    good, manifest = shard.read_bytes(), (out / "manifest.json").read_text()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(InputError, match=rf"{shard.name}: .*SHA-256"):
        _open(folder, Records(path=str(out)))
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: No such file"):
        _open(folder, Records(path=str(out)))
    shard.write_bytes(good)
    (out / "manifest.json").write_text(manifest[:-30])
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        _open(folder, Records(path=str(out)))
    (out / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json"):
        _open(folder, Records(path=str(out)))


def test_records_in_a_mixture_bring_the_tokenizer(folder):
    out = _run(folder)
    parts = (
        Part(source=Records(path=str(out))),
        Part(source=TextFiles(paths=(f"{folder}/*.txt",))),
    )
    dataset = _open(folder, Mixture(parts=parts))
    assert dataset.tokenizer.vocab_size == 300
    assert np.unique(dataset.train.origin(np.arange(50))[0]).tolist() == [0, 1]
    (folder / "out").rename(folder / "first")
    other = _run(folder, "--tokenizer", "bytes")
    both = Mixture(
        parts=tuple(Part(source=Records(path=str(p))) for p in (other, folder / "first"))
    )
    with pytest.raises(InputError, match="different tokenizers"):
        _open(folder, both)
