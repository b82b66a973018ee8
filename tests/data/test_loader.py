"""The loader: invariance (workers, processes, batch size, restarts) and exact held-out counts."""

import dataclasses
import itertools
import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest

from deepseek_jax.core.config import from_dict, override, to_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.loader import Data, batches, open_data
from deepseek_jax.data.sources import JSONL, Mixture, Part, StandardLibrary, TextFiles
from deepseek_jax.data.tokenizer import BPE, Bytes


def _data(folder, **more) -> Data:
    source = TextFiles(paths=(f"{folder}/*.txt",))
    return Data(**{"source": source, "tokenizer": Bytes(), "held_out": 0.3, **more})


def _open(config, folder, **more):
    config = from_dict(Data, {**to_dict(config), "cache_dir": str(folder / "cache")})
    return open_data(config, **{"sequence_length": 16, "num_targets": 2, "seed": 3, **more})


def _mixture(folder) -> Data:
    (folder / "d.jsonl").write_text("".join(f'{{"text": "line {i} of many"}}\n' for i in range(40)))
    parts = (
        Part(source=TextFiles(paths=(f"{folder}/*.txt",))),
        Part(source=JSONL(paths=(f"{folder}/d.jsonl",)), schedule=((0, 0.2), (100, 2.0))),
    )
    return _data(folder, source=Mixture(parts=parts), tokenizer=BPE(vocab_size=280))


def _rows(dataset, count, **more) -> list[dict]:
    """The first `count` batches, closed properly."""
    stream = batches(dataset, **{"start": 5, "batch_size": 6, **more})
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def _row(dataset, number: int) -> dict:
    """Row `number` of the training data: a batch without its first dimension."""
    return {name: value[0] for name, value in dataset.train.batch(np.array([number])).items()}


def _assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_rows_are_the_same_for_every_batch_size_process_count_and_restart(folder):
    config = _mixture(folder)
    dataset, again = _open(config, folder), _open(config, folder)
    whole = _rows(dataset, 8)  # several epochs of the smaller source
    for k, batch in enumerate(whole):
        for b in range(6):
            _assert_same(_row(again, 5 + 6 * k + b), {n: v[b] for n, v in batch.items()})
    halves = [_rows(again, 8, process_index=i, process_count=2) for i in (0, 1)]
    for one, two, batch in zip(*halves, whole, strict=True):
        _assert_same({n: np.concatenate([one[n], two[n]]) for n in one}, batch)
    for batch, other in zip(_rows(again, 4, start=5 + 24), whole[4:], strict=True):
        _assert_same(batch, other)
    other = _rows(again, 16, batch_size=3)
    _assert_same({n: np.concatenate([other[0][n], other[1][n]]) for n in other[0]}, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_processes_change_nothing(folder, num_workers):
    dataset = _open(_mixture(folder), folder)
    made = _rows(dataset, 7, num_workers=num_workers)
    for batch, other in zip(made, _rows(dataset, 7), strict=True):
        _assert_same(batch, other)
    mine = {"process_index": 1, "process_count": 2}
    halves = _rows(dataset, 3, num_workers=num_workers, **mine), _rows(dataset, 3, **mine)
    for batch, other in zip(*halves, strict=True):
        _assert_same(batch, other)


def test_held_out_documents_are_whole_and_counted_exactly(folder):
    dataset = _open(_data(folder), folder)
    text = dataset.held_out_text()
    files = {path.read_bytes() for path in folder.glob("*.txt")}
    held = {content for content in files if content in text}
    assert 0 < len(held) < len(files)
    assert dataset.eval_bytes == len(text) == sum(map(len, held))
    found = list(dataset.eval_batches(4))
    assert {batch["tokens"].shape for batch in found} == {(4, 16)}
    assert sum(batch["weights"][..., 0].sum() for batch in found) == len(text) + len(held)
    tokens = np.concatenate([b["tokens"][b["segments"] > 0] for b in found])
    assert dataset.tokenizer.decode_bytes(tokens.tolist()) == text
    train = dataset.train.batch(np.arange(dataset.train.rows[0].num_rows))["tokens"]
    stream = dataset.tokenizer.decode_bytes(train.ravel().tolist())
    assert all(content[:9] not in stream for content in held)


def test_bpe_learns_from_the_training_side_only(tmp_path):
    words = {f" {i:06b}".replace("0", "a").replace("1", "b") for i in range(40)}
    for word in words:
        (tmp_path / f"{word}.txt").write_text(word * 30)
    dataset = _open(_data(tmp_path, tokenizer=BPE(vocab_size=2000)), tmp_path)
    held = {f" {word}" for word in dataset.held_out_text().decode().split()}
    assert 0 < len(held) < 40
    assert {word for word in words if len(dataset.tokenizer.encode(word)) > 1} == held


def test_a_mixture_holds_out_of_every_part_and_one_tokenizer_serves_all(folder):
    dataset = _open(_mixture(folder), folder)
    text = dataset.held_out_text()
    assert b"of many" in text
    assert b"quick" in text
    assert dataset.eval_bytes == len(text)
    assert "held out" in dataset.describe()


def test_a_corpus_shorter_than_a_row_is_one_padded_row(tmp_path):
    (tmp_path / "a.txt").write_text("some words\nand more\n")
    dataset = _open(_data(tmp_path), tmp_path, sequence_length=64, num_targets=1)
    row = _row(dataset, 0)
    assert 0 < (row["segments"] > 0).sum() < 64
    assert (
        dataset.train.batch(np.arange(7))["segments"].astype(bool).sum()
        == 7 * (row["segments"] > 0).sum()
    )
    assert dataset.eval_bytes > 0


def test_the_cache_follows_contents_and_survives_damage(folder):
    first = _open(_data(folder), folder)
    made = sorted((folder / "cache").glob("*/tokens.bin"))
    _open(_data(folder), folder)
    assert sorted((folder / "cache").glob("*/tokens.bin")) == made
    whole = made[0].read_bytes()
    made[0].write_bytes(whole[:-2])  # a torn file
    _assert_same(_row(_open(_data(folder), folder), 0), _row(first, 0))
    assert made[0].read_bytes() == whole
    changed = folder / "0.txt"
    changed.write_text(changed.read_text().replace("0", "9"))  # same size, perhaps same second
    _open(_data(folder), folder)
    assert len(list((folder / "cache").glob("*/tokens.bin"))) == 2
    assert not list((folder / "cache").glob("*.tmp"))


def test_the_fingerprint_follows_contents_order_and_tokenizer(folder):
    config = _data(folder)
    first = _open(config, folder).fingerprint
    assert int(first, 16)
    assert _open(config, folder).fingerprint == first
    moved = folder / "moved"
    shutil.copytree(folder, moved, ignore=shutil.ignore_patterns("cache", "moved"))
    assert _open(_data(moved), moved).fingerprint == first
    others = [
        _open(config, folder, seed=4),
        _open(config, folder, sequence_length=17),
        _open(_data(folder, held_out=0.4), folder),
        _open(_data(folder, tokenizer=BPE(vocab_size=300)), folder),
    ]
    parts = tuple(Part(source=config.source, weight=w) for w in (1, 2))
    for order in (parts, parts[::-1]):
        others.append(_open(_data(folder, source=Mixture(parts=order)), folder))
    changed = folder / "0.txt"
    changed.write_text(changed.read_text().replace("0", "9"))
    others.append(_open(config, folder))
    changed.rename(folder / "00.txt")  # another key: perhaps on the other side
    others.append(_open(config, folder))
    assert len({first, *(dataset.fingerprint for dataset in others)}) == 1 + len(others)


@pytest.mark.parametrize("mixed", [False, True])
def test_eval_tokens_scores_the_first_documents_that_fit(folder, mixed):
    config = _mixture(folder) if mixed else _data(folder, held_out=0.6)
    whole = _open(config, folder)
    num_parts = len(whole.held)
    assert num_parts == 1 + mixed
    for limit in (150, 400, 900, 10**9):
        dataset = _open(dataclasses.replace(config, eval_tokens=limit), folder)
        found = list(dataset.eval_batches(4))
        tokens = np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in found])
        text = dataset.held_out_text()
        assert dataset.tokenizer.decode_bytes(tokens.tolist()) == text
        assert dataset.eval_bytes == len(text) > 0
        assert len(tokens) <= limit
        for rows, every in zip(dataset.held, whole.held, strict=True):
            count = len(rows.documents)
            np.testing.assert_array_equal(rows.documents, every.documents[:count])
            following = every.documents[count : count + 1]  # the next one would be too much
            more = rows.num_tokens + every.corpus.lengths[following].sum()
            assert more > limit // num_parts or count == len(every.documents)
        _assert_same(_row(dataset, 3), _row(whole, 3))
        assert dataset.fingerprint == whole.fingerprint
    assert text == whole.held_out_text()
    with pytest.raises(InputError, match=r"eval_tokens \(2\) has room for no"):
        _open(dataclasses.replace(config, eval_tokens=2), folder)


def _opened(folder, barrier, results):
    barrier.wait()
    dataset = _open(_data(folder, tokenizer=BPE(vocab_size=300)), folder)
    results.put((_row(dataset, 3)["tokens"].tolist(), os.getpid()))


def test_two_processes_may_start_at_once(folder):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    started = [context.Process(target=_opened, args=(folder, barrier, results)) for _ in range(2)]
    for process in started:
        process.start()
    (one, first), (two, second) = (results.get(timeout=120) for _ in started)
    for process in started:
        process.join()
    assert one == two
    assert first != second


def test_standard_library_quickstart_data(tmp_path, monkeypatch):
    """A slice of it: the rules are tested in test_sources; here that the default config opens."""
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    for i in range(30):
        lines = "".join(f"value_{i}_{j} = {i * j}\n" for j in range(20))
        (root / f"m{i}.py").write_text(lines)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(root))
    assert _open(Data(held_out=0.1), tmp_path).eval_bytes > 0


def test_errors_name_the_fix(folder):
    (folder / "one.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(InputError, match="only one document"):
        _open(_data(folder, source=JSONL(paths=(f"{folder}/one.jsonl",))), folder)
    (folder / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*(Not a directory|File exists)"):
        open_data(
            _data(folder, cache_dir=f"{folder}/file"), sequence_length=8, num_targets=1, seed=0
        )
    with pytest.raises(InputError, match="does not divide over 4"):
        batches(_open(_data(folder), folder), start=0, batch_size=6, process_count=4)
    for wrong in ({"held_out": 0.0}, {"held_out": 1.0}, {"num_workers": -1}, {"eval_tokens": 0}):
        with pytest.raises(ValueError, match="must"):
            Data(**wrong)


def test_config_round_trip_and_overrides(folder):
    config = _mixture(folder)
    assert from_dict(Data, to_dict(config)) == config
    changed = override(Data(), ["--tokenizer.vocab-size", "512", "--held-out", "0.2"], "data")
    assert changed == Data(source=StandardLibrary(), tokenizer=BPE(vocab_size=512), held_out=0.2)
    changed = override(config, ["--source.parts.0.weight", "3"], "data")
    assert changed.source.parts[0].weight == 3


def test_row_making_is_not_the_bottleneck_of_a_step(folder):
    """Thousands of rows a second on any machine: a step of the quickstart takes 16."""
    dataset = _open(_data(folder), folder, sequence_length=256)
    _row(dataset, 0)
    start = time.perf_counter()
    dataset.train.batch(np.arange(256))
    assert time.perf_counter() - start < 2
