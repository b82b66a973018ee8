"""Utterances: rows depend on their number alone, sides share no text, damage is named, replaced."""

import dataclasses
import io
import json
import tarfile
import wave

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audio import decoded_wave
from deepseek_jax.data.media import MediaFolder, MediaParquet, MediaShards
from deepseek_jax.data.tokenizer import Characters, character_tokenizer, load_tokenizer
from deepseek_jax.data.utterances import DIGITS, Spoken, Utterances, open_utterances, standardized

WORDS = ("one", "two three", "four", "five's", "six")


def wav(samples, rate=8000, channels=1):
    """Noise of so many samples, or 16-bit numbers [T, channels], as a file."""
    if isinstance(samples, int):
        samples = np.random.default_rng(samples).integers(-9000, 9000, (samples, channels))
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return stream.getvalue()


@pytest.fixture(scope="module")
def files():
    """{name: (bytes, caption)}: thirty sounds of 0.1 to 0.2 s, and ten that are special."""
    found = {f"{i}.wav": (wav(800 + 23 * i), f"{WORDS[i % 5]} {'ab'[i % 2]}") for i in range(30)}
    whole = wav(1200)
    return found | {
        "30.wav": (whole[:700], "truncated"),
        "31.wav": (wav(np.zeros((0, 1))), "nothing in it"),
        "32.wav": (wav(2400, rate=16_000), "another rate"),
        "33.wav": (wav(1300, channels=2), "two channels"),
        "34.wav": (wav(300), "too short"),
        "35.wav": (wav(3000), "too long"),
        "36.wav": (wav(1400), None),
        "37.wav": (wav(1400), "snow \u2603"),
        "38.wav": (wav(1400), "x" * 30),
        "39.png": (b"\x89PNG", "a picture"),
    }


BAD = {
    30: "truncated", 31: "no samples", 34: "0.037 seconds long, less than data.min_seconds",
    35: "3000 samples long, more than sequence_length = 1600", 36: "there is no caption",
    37: "which is not in the vocabulary", 38: "a text of 30 characters; 1 to 24",
    39: "there is no sound, which is what is heard, but image",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("utterances"), []
    for name, (data, text) in files.items():
        (folder / name).write_bytes(data)
        kind = "image" if name.endswith("png") else "audio"
        lines.append({kind: name} | ({"text": text} if text else {}))
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def config(source, **fields):
    base = {"rate": 8000, "min_seconds": 0.05, "max_characters": 24, "held_out": 0.3}
    return Utterances(source=source, **(base | {"max_skipped": 0.25} | fields))


def opened(folder, seed=0, length=1600, **fields):
    source = MediaFolder(path=str(folder), group="text")
    return open_utterances(config(source, **fields), sequence_length=length, seed=seed)


def test_a_row_is_a_function_of_its_number_and_the_seed(folder, capsys):
    first, again, other = (opened(folder, seed) for seed in (1, 1, 2))
    rows = first.train.batch(np.arange(5, 90))
    shapes = {name: (x.dtype, x.shape) for name, x in rows.items()}
    assert shapes == {
        "wave": (np.float32, (85, 1600)),
        "counts": (np.int32, (85,)),
        "labels": (np.int32, (85, 24)),
        "rows": (np.int32, (85,)),
    }
    late = again.train.batch(np.arange(60, 90))  # after a restart
    for name, values in late.items():
        np.testing.assert_array_equal(values, rows[name][55:])
    assert any((rows["labels"] != other.train.batch(np.arange(5, 90))["labels"]).ravel())
    for row, count in zip(rows["wave"], rows["counts"], strict=True):
        assert not row[count:].any()
        np.testing.assert_allclose([row[:count].mean(), row[:count].std()], [0, 1], atol=1e-4)
    count = len(first.train.numbers)
    epoch = first.train.batch(np.arange(count))
    assert len({wave.tobytes() for wave in epoch["wave"]}) == count - len(
        BAD.keys() & set(first.train.numbers.tolist())
    )
    capsys.readouterr()


def test_sides_share_no_text_and_what_is_unusable_is_named(folder, files, capsys):
    dataset = opened(folder)
    texts = [text for _, text in files.values()]
    sides = [{texts[i] for i in side.numbers} - {None} for side in (dataset.train, dataset.held)]
    assert not sides[0] & sides[1] and min(map(len, sides)) > 2
    dataset.train.batch(np.arange(80))
    held = [*dataset.held_batches(4)]
    reasons = dataset.train.skips.reasons
    assert reasons.keys() == BAD.keys()
    for number, why in BAD.items():
        assert why in reasons[number] and reasons[number].startswith((f"{number}.", str(folder)))
    assert capsys.readouterr().err.count("skipped (") == len(BAD)
    said = [
        dataset.tokenizer.decode(row) for batch, count in held for row in batch["labels"][:count]
    ]
    assert set(said) == sides[1] - {texts[i] for i in BAD}
    last, count = held[-1]
    assert (last["counts"][count:] == 0).all() and all(len(b["wave"]) == 4 for b, _ in held)
    again = [*opened(folder, seed=5).held_batches(4)]
    np.testing.assert_array_equal(again[0][0]["wave"], held[0][0]["wave"])
    with pytest.raises(InputError, match="examples cannot be used, more than"):
        opened(folder, max_skipped=0.01).train.batch(np.arange(80))
    capsys.readouterr()


def test_other_rates_and_channels_are_heard(folder, files, capsys):
    dataset = opened(folder)
    for number, samples in ((32, 1200), (33, 1300)):
        row = dataset.train.view(0, number)
        assert row["counts"] == samples
        expected = decoded_wave(files[f"{number}.wav"][0], "a", 8000)
        np.testing.assert_allclose(row["wave"][:samples], standardized(expected), atol=1e-6)
    capsys.readouterr()


def test_sound_without_texts_is_cropped_not_refused(folder, capsys):
    dataset = opened(folder, texts=False)
    rows = [dataset.train.view(row, 35) for row in range(20)]
    assert {int(row["counts"]) for row in rows} == {1600}
    assert len({row["wave"].tobytes() for row in rows}) > 10
    still = {dataset.held.view(row, 35, still=True)["wave"].tobytes() for row in range(5)}
    assert len(still) == 1 and (rows[0]["labels"] == -1).all()
    assert dataset.train.view(0, 36)["counts"] == 1400  # no caption, no matter
    capsys.readouterr()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_hold_the_same_rows(files, folder, tmp_path, kind):
    some = dict([*files.items()][:20])
    if kind == "tar":
        source = MediaShards(paths=(str(tmp_path / "a.tar"),), group="text")
        with tarfile.open(tmp_path / "a.tar", "w") as file:
            for name, (data, text) in some.items():
                about = json.dumps({"text": text}).encode()
                for member, content in ((name, data), (name[:-3] + "json", about)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    else:
        source = MediaParquet(paths=(str(tmp_path / "a.parquet"),), group="text")
        columns = {"audio": [d for d, _ in some.values()], "text": [t for _, t in some.values()]}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    dataset = open_utterances(config(source), sequence_length=1600, seed=0)
    other = opened(folder)
    for number in (3, 11):
        mine, theirs = (d.train.view(4, number) for d in (dataset, other))
        for name, value in mine.items():
            np.testing.assert_array_equal(value, theirs[name])


def test_the_fingerprint_follows_what_rows_depend_on(folder):
    found = [opened(folder).fingerprint, opened(folder, 1).fingerprint]
    found += [opened(folder, length=1700).fingerprint]
    for name, value in {
        "alphabet": "abc", "rate": 16_000, "min_seconds": 0.06, "held_out": 0.4, "texts": False,
        "normalize": False, "max_characters": 25,
    }.items():  # fmt: skip
        found.append(opened(folder, **{name: value}).fingerprint)
    assert len(set(found)) == len(found)
    assert opened(folder, num_workers=2, max_skipped=0.1).fingerprint == found[0]


def test_characters_there_and_back(tmp_path):
    letters = character_tokenizer("abcé'")
    assert letters.vocab_size == 7 and letters.token_id("|") == 1 and letters.eos_id == 0
    ids = letters.encode(" Ab,  c\u0301' e\u0301.".replace("c\u0301", "c"))
    assert [letters.token(i) for i in ids] == ["a", "b", "|", "c", "'", "|", "é"]
    assert letters.decode([0, *ids, 0, -1]) == "ab c' é"
    letters.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, Characters) and again.encode("cab") == letters.encode("cab")
    assert again.files() == letters.files()
    upper = Characters(b'{"<pad>": 3, "|": 0, "A": 1, "B": 2}', "here")
    assert upper.encode("a b") == [1, 0, 2] and upper.eos_id == 3 and upper.decode([3, 1]) == "A"
    with pytest.raises(InputError, match=r"'dab' has 'd', which is not in the vocabulary"):
        letters.encode("dab")
    for wrong in (b"[1]", b"{", b'{"a": "b"}', b'{"a": -1}', b"{}"):
        with pytest.raises(InputError, match="there: "):
            Characters(wrong, "there")
    file = tmp_path / "vocab.json"
    dataset = open_utterances(
        Utterances(source=Spoken(count=5), vocabulary=str(file), alphabet="z"),
        sequence_length=100,
        seed=0,
    )
    assert dataset.tokenizer.files() == letters.files()


@pytest.mark.parametrize("fields, message", [
    ({"min_seconds": 0.0}, "min_seconds"), ({"max_characters": 0}, "max_characters"),
    ({"rate": 10}, "data.rate"), ({"alphabet": "a|b"}, "alphabet"), ({"held_out": 0.0}, "held_out"),
    ({"max_skipped": 1.0}, "max_skipped"),
])  # fmt: skip
def test_wrong_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Utterances(**fields)


@pytest.mark.parametrize("fields", [
    {"words": ()}, {"voices": ()}, {"length": (2, 1)}, {"length": (0, 1)}, {"speeds": (10, 200)},
    {"pitches": (0, 120)}, {"count": 1},
])  # fmt: skip
def test_wrong_voices_are_refused(fields):
    with pytest.raises(ValueError, match=r"data.source"):
        Spoken(**fields)


def test_spoken_texts_are_heard_in_voices_that_are_drawn():
    pytest.importorskip("espeakng_loader", reason="the extra `speech` (GPL) is not installed")
    source = Spoken(words=DIGITS[:4], length=(1, 2), count=100)
    data = Utterances(source=source, rate=8000, max_characters=16)
    first, again = (open_utterances(data, sequence_length=9000, seed=3) for _ in range(2))
    assert len(first.train.examples.texts) == 4 + 16  # all that there are
    rows = first.train.batch(np.arange(6))
    for name, values in again.train.batch(np.arange(3, 6)).items():
        np.testing.assert_array_equal(values, rows[name][3:])
    number = int(first.train.numbers[0])
    heard = [first.train.view(row, number) for row in range(5)]
    assert len({row["wave"].tobytes() for row in heard}) == 5
    said = {first.tokenizer.decode(row["labels"]) for row in heard}
    assert said == {first.train.examples.texts[number]}
    # A row that is too long in one voice leaves the others as they are.
    tight = open_utterances(
        dataclasses.replace(data, max_skipped=0.9), sequence_length=5600, seed=3
    )
    batch = tight.train.batch(np.arange(12))
    fresh = open_utterances(
        dataclasses.replace(data, max_skipped=0.9), sequence_length=5600, seed=3
    )
    np.testing.assert_array_equal(fresh.train.batch(np.arange(8, 12))["wave"], batch["wave"][8:])
    assert tight.train.skips.reasons
