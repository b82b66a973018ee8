"""Invariance: data in a bucket give the rows and the fingerprint of the same files on a disk."""

import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deepseek_jax import prepare
from deepseek_jax.core import storage
from deepseek_jax.core.errors import InputError
from deepseek_jax.data import sources
from deepseek_jax.data.loader import Data, batches, open_data
from deepseek_jax.data.sources import JSONL, Mixture, Parquet, Part, Records, TextFiles
from deepseek_jax.data.tokenizer import BPE, Bytes, SentencePiece, TokenizerFile

SHAPE = {"sequence_length": 16, "num_targets": 1, "seed": 0}
LINES = [f"document {i} says {i**3} and {i**4} again" for i in range(60)]


@pytest.fixture(scope="module")
def folder(gs, tmp_path_factory):
    """Files of every kind, in a folder and under gs://data/in."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "x-y").mkdir()
    (folder / "x").mkdir()
    for i in range(12):
        (folder / f"{'x-y' if i % 2 else 'x'}/{i}.txt").write_text("\n".join(LINES[i::7]))
    (folder / "lone.txt").write_text("\n".join(LINES))
    for i in range(3):
        lines = (json.dumps({"text": line}) + "\n" for line in LINES[i::3])
        (folder / f"{i}.jsonl").write_text("".join(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": LINES}), folder / "t.parquet")
    flags = ["--input", f"{folder}/*.jsonl", "--tokenizer", "bytes", "--held-out", "0.2"]
    prepare.main([*flags, "--output", str(folder / "prepared")])
    for path in folder.rglob("*"):
        if path.is_file():
            gs[f"data/in/{path.relative_to(folder)}"] = path.read_bytes()
    return str(folder)


def kinds(root):
    texts, lines = TextFiles(paths=(f"{root}/**/*.txt",)), JSONL(paths=(f"{root}/*.jsonl",))
    return {
        "texts": texts,
        "lone": TextFiles(paths=(f"{root}/lone.txt",)),
        "two": TextFiles(paths=(f"{root}/x-y/*", f"{root}/x/*")),
        "lines": lines,
        "table": Parquet(paths=(f"{root}/t.parquet",)),
        "records": Records(path=f"{root}/prepared"),
        "mixture": Mixture(parts=(Part(source=texts), Part(source=lines, weight=2.0))),
    }


@pytest.mark.parametrize("kind", list(kinds("")))
@pytest.mark.parametrize("tokenizer", [Bytes(), BPE(vocab_size=300)], ids=["bytes", "bpe"])
def test_rows_and_fingerprint_are_those_of_files(folder, tmp_path, kind, tokenizer):
    made = []
    for root in (folder, "gs://data/in"):
        cache = str(tmp_path / root.replace("/", "-"))
        data = Data(source=kinds(root)[kind], tokenizer=tokenizer, held_out=0.2, cache_dir=cache)
        dataset = open_data(data, **SHAPE)
        rows = itertools.islice(batches(dataset, start=3, batch_size=8), 3)
        made.append((dataset, [*rows, *dataset.eval_batches(4)]))
    (ours, ours_rows), (theirs, theirs_rows) = made
    assert ours.fingerprint == theirs.fingerprint and ours.describe() == theirs.describe()
    assert ours.held_out_text() == theirs.held_out_text()
    for batch, other in zip(ours_rows, theirs_rows, strict=True):
        assert all(np.array_equal(batch[name], other[name]) for name in batch)


def test_files_come_in_the_order_of_paths(folder):
    """x before x-y, as paths compare, though "x-y/" sorts before "x/"."""
    here, there = (sources.files(kinds(root)["two"]) for root in (folder, "gs://data/in"))
    assert [file.path for file in here] == sorted(file.path for file in here)
    assert [file.path.parent.name for file in here] == ["x"] * 6 + ["x-y"] * 6
    assert [file.key for file in here] == [file.key for file in there]


def test_a_fingerprint_follows_contents_or_generations(gs, folder, monkeypatch):
    source = kinds("gs://data/in")["two"]
    small = sources.fingerprint(source)
    assert small == sources.fingerprint(kinds(folder)["two"])
    monkeypatch.setattr(sources, "SMALL", 100)
    large = sources.fingerprint(source)
    assert large != small and large == sources.fingerprint(source)
    gs["data/in/x/2.txt"] = gs["data/in/x/2.txt"]  # put again: a new generation
    assert sources.fingerprint(source) != large
    assert sources.fingerprint(kinds(folder)["two"]) == sources.fingerprint(kinds(folder)["two"])


def test_bad_objects_are_named(gs, folder, tmp_path):
    gs["data/bad/a.txt"] = b"fine\n\xff\n"
    gs["data/bad/b.jsonl"] = b'{"text": 3}\n'
    gs["data/bad/c.parquet"] = b"nothing"
    for message, source in {
        "'gs://data/none/.*.txt': no such object": TextFiles(paths=("gs://data/none/*.txt",)),
        "'gs://data/in': no such object": TextFiles(paths=("gs://data/in",)),
        r"gs://data/bad/a.txt:2: not UTF-8": TextFiles(paths=("gs://data/bad/a.txt",)),
        r"gs://data/bad/b.jsonl:1: field 'text'": JSONL(paths=("gs://data/bad/b.jsonl",)),
        r"gs://data/bad/c.parquet: not a Parquet": Parquet(paths=("gs://data/bad/c.parquet",)),
    }.items():
        with pytest.raises(InputError, match=message):
            list(sources.documents(source))
    for name in gs.names("data/in/prepared/"):
        gs[name.replace("/in/", "/bad/")] = gs[name]
    shard = next(name for name in gs.names("data/bad/prepared/") if name.endswith("array_record"))
    gs[shard] = gs[shard] + b"x"
    data = Data(source=Records(path="gs://data/bad/prepared"), cache_dir=str(tmp_path))
    with pytest.raises(InputError, match=rf"gs://{shard}: not the file that .* \(other SHA-256\)"):
        open_data(data, **SHAPE)


@pytest.mark.parametrize("kind", ["texts", "lines", "table", "records"])
def test_a_bucket_that_does_not_answer_is_no_bad_input(gs, folder, tmp_path, monkeypatch, kind):
    def lost(self, timeout=None):
        raise OSError(None, "UNAVAILABLE", self.url)

    data = Data(source=kinds("gs://data/in")[kind], tokenizer=Bytes(), cache_dir=str(tmp_path))
    monkeypatch.setattr(storage.Object, "read", lost)
    with pytest.raises(OSError, match="UNAVAILABLE: 'gs://data/in/"):
        open_data(data, **SHAPE)


def test_tokenizers_are_read_from_a_bucket(gs, tmp_path):
    for kind, name in ((TokenizerFile, "t.json"), (SentencePiece, "t.model")):
        gs[f"data/tokenizers/{name}"] = b"nothing"
        data = Data(tokenizer=kind(path=f"gs://data/tokenizers/{name}"), cache_dir=str(tmp_path))
        with pytest.raises(InputError, match=f"gs://data/tokenizers/{name}: not a "):
            open_data(data, **SHAPE)


def test_a_cache_is_on_a_disk():
    with pytest.raises(ValueError, match=r"data.cache_dir \(gs://b/c\) must be a folder"):
        Data(cache_dir="gs://b/c")
