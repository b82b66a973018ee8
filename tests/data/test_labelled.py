"""Labelled media: rows are Pillow's, SciPy's and FFmpeg's own decoding; sides, damage, labels.

Reference: pixels, samples and frames. Invariance: a row depends on its number; formats, order of
reading and workers change nothing.
"""

import dataclasses
import io
import json
import tarfile

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.io.wavfile
import scipy.signal
from PIL import Image

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.digits import digit_numbers, load_digits
from deepseek_jax.data.labelled import Labelled, Text, open_labelled
from deepseek_jax.data.loader import batches
from deepseek_jax.data.media import MediaFolder, MediaParquet, MediaShards
from deepseek_jax.data.packing import epoch_order
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.data.video import ClipTransform
from deepseek_jax.data.vision import ImageTransform
from deepseek_jax.data.vqa import ANSWERS, DigitQuestions

LENGTH, COUNT, KINDS = 400, 12, {"image": "png", "audio": "wav", "video": "avi"}
CLASSES = ("cold", "flu", "fine")


def png(number):
    out, rng = io.BytesIO(), np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (10, 14, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def wav(number, rate=16_000, seconds=0.05):
    """A low tone; every third file is shorter than a row."""
    out, count = io.BytesIO(), round(rate * (seconds if number % 3 else 0.01))
    tone = 9000 * np.sin(2 * np.pi * (300 + 20 * number) * np.arange(count) / rate)
    scipy.io.wavfile.write(out, rate, tone.astype(np.int16))
    return out.getvalue()


def avi(number):
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as file:
        track = file.add_stream("rawvideo", rate=5)
        track.height, track.width, track.pix_fmt = 8, 8, "bgr24"
        for i in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((8, 8, 3), 20 * i + number, np.uint8))
            frame.pts = i
            file.mux(track.encode(frame))
        file.mux(track.encode(None))
    return out.getvalue()


MADE = {"image": png, "audio": wav, "video": avi}


def example(number):
    """Its files and its record; number 1 lacks an image, 2 a sound, 3 a video, 4 its text."""
    kinds = [kind for i, kind in enumerate(KINDS, 1) if i != number]
    said = {"group": f"g{number // 2}", "finding": [CLASSES[number % 3]] if number % 4 else []}
    if number % 5 == 0:
        said["finding"] = {"cold": True, "flu": False, "fine": None}
    if number != 4:
        said["text"] = f"case {number}"
    return {kind: MADE[kind](number) for kind in kinds}, said


def manifest(folder, records):
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, records)))
    return MediaFolder(path=str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, records = tmp_path_factory.mktemp("labelled"), []
    for number in range(COUNT):
        files, said = example(number)
        for kind, content in files.items():
            said[kind] = f"{number:02}.{KINDS[kind]}"
            (folder / said[kind]).write_bytes(content)
        records.append(said)
    manifest(folder, records)
    return folder


def config(source, **fields):
    base = {
        "classes": CLASSES, "label": "finding", "multi_label": True, "sound": True,
        "image": ImageTransform(size=6, fit="stretch"), "held_out": 0.6,
        "video": ClipTransform(num_frames=3, image=ImageTransform(size=8)),
        "text": Text(tokenizer=Bytes(), length=10),
    }  # fmt: skip
    return Labelled(source=source, **(base | fields))


def opened(source, seed=0, **fields):
    return open_labelled(config(source, **fields), sequence_length=LENGTH, seed=seed)


def same(one, other):
    for part in ("inputs", "present"):
        for name, x in one[part].items():
            np.testing.assert_array_equal(x, other[part][name], err_msg=name)
    np.testing.assert_array_equal(one["labels"], other["labels"])


def test_held_out_rows_are_what_others_decode(folder):
    dataset = opened(MediaFolder(path=str(folder)))
    held = next(dataset.held_batches(COUNT))
    shapes = dataset.config.shapes(COUNT, LENGTH)
    for part in ("inputs", "present"):
        assert {n: (x.shape, x.dtype) for n, x in held[part].items()} == shapes[part]
    assert (held["labels"].shape, held["labels"].dtype) == shapes["labels"]
    checked = []
    for place, number in enumerate(dataset.held.numbers):
        files, said = example(number)
        row = {name: x[place] for name, x in held["inputs"].items()}
        there = {name: bool(x[place]) for name, x in held["present"].items()}
        assert there == {
            "image": "image" in files, "sound": "audio" in files, "video": "video" in files,
            "text": "text" in said,
        }  # fmt: skip
        assert not any(row[name].any() for name, here in there.items() if not here)
        if there["image"]:
            picture = Image.open(io.BytesIO(files["image"])).resize((6, 6), Image.BICUBIC)
            np.testing.assert_array_equal(row["image"], np.asarray(picture))
        if there["sound"]:
            _, samples = scipy.io.wavfile.read(io.BytesIO(files["audio"]))
            start = max(len(samples) - LENGTH, 0) // 2
            kept = samples[start : start + LENGTH] / 2**15
            np.testing.assert_allclose(row["sound"][: len(kept)], kept, atol=1e-6)
            assert not row["sound"][len(kept) :].any()
        if there["video"]:
            with av.open(io.BytesIO(files["video"])) as film:
                frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
            np.testing.assert_array_equal(row["video"], np.stack(frames)[[1, 3, 5]])
        if there["text"]:
            ids = row["text"].tolist()
            assert ids == [256, *f"case {number}".encode(), 257, *[-1] * 10][:10]
        told = said["finding"]
        expected = [int(name in told) for name in CLASSES] if isinstance(told, list) else [1, 0, -1]
        assert held["labels"][place].tolist() == expected
        checked.append(number)
    assert {1, 2, 3, 4} & {*checked} and len(checked) > 3
    assert (held["labels"][len(checked) :] == -1).all(), "what fills up is no example"
    groups = [{number // 2 for number in side.numbers} for side in (dataset.train, dataset.held)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == COUNT // 2
    assert f"held out: {len(checked)} examples of {len(groups[1])} groups" in dataset.describe()


def test_other_rates_are_resampled(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.wav").write_bytes(wav(1, 8_000, 0.2))
    lines = [{"audio": f"{n}.wav", "text": "x", "finding": []} for n in range(2)]
    source, sounds = manifest(tmp_path, lines), {"image": None, "video": None}
    found = open_labelled(config(source, **sounds), sequence_length=1600, seed=0)
    wave = next(found.held_batches(1))["inputs"]["sound"][0]
    _, samples = scipy.io.wavfile.read(io.BytesIO(wav(1, 8_000, 0.2)))
    expected = scipy.signal.resample_poly(samples / 2**15, 2, 1)[800:2400]
    assert np.abs(wave - expected).max() < 0.01 * np.abs(expected).max()


def test_formats_hold_the_same_examples(folder, tmp_path):
    table = []
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(COUNT):
            files, said = example(number)
            members = {KINDS[kind]: content for kind, content in files.items()}
            members["json"] = json.dumps(said).encode()
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{number:02}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            if not isinstance(said["finding"], list):
                said["finding"] = [json.dumps(said["finding"])]  # a column has one type
            table.append(dict.fromkeys((*KINDS, "text")) | files | said)
    pyarrow.parquet.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    first = opened(MediaFolder(path=str(folder)))
    for source in (
        MediaShards(paths=(str(tmp_path / "a.tar"),)),
        MediaParquet(paths=(str(tmp_path / "a.parquet"),)),
    ):
        other = opened(source)
        same(next(first.held_batches(COUNT)), next(other.held_batches(COUNT)))
        same(first.train.batch(np.arange(9)), other.train.batch(np.arange(9)))


def test_a_training_row_is_a_function_of_its_number_and_the_seed(folder):
    source = MediaFolder(path=str(folder))
    one, again, other = (opened(source, seed, missing=0.5) for seed in (1, 1, 2))
    rows = np.arange(30)
    found = one.train.batch(rows)
    again.train.batch(rows[::-1])  # what was read before changes nothing
    same(found, again.train.batch(rows))
    assert (other.train.batch(rows)["inputs"]["sound"] != found["inputs"]["sound"]).any()
    there = np.stack([*found["present"].values()])
    assert there.any(0).all() and 0.3 < (there.sum(0) < 4).mean() < 0.95
    count = len(one.train.numbers)
    texts = opened(source, 1).train.batch(np.arange(count))["inputs"]["text"]
    order = one.train.numbers[epoch_order(count, 1, 0)]
    for number, ids in zip(order, texts, strict=True):
        assert number == 4 or bytes(ids[1:7].tolist()).startswith(
            b"case %d" % (number // 10 or number)
        )
    with_workers = batches(one, start=0, batch_size=30, num_workers=1)
    same(found, next(with_workers))
    with_workers.close()


def test_the_fingerprint_follows_what_rows_depend_on(folder):
    base = MediaFolder(path=str(folder))
    changes = {
        "missing": 0.2, "held_out": 0.5, "label": "text", "classes": (*CLASSES, "x"),
        "text": Text(tokenizer=Bytes(), length=11), "image": ImageTransform(size=7),
    }  # fmt: skip
    found = [opened(base, **{name: value}).fingerprint for name, value in changes.items()]
    found += [opened(base, 1).fingerprint, opened(base).fingerprint]
    assert len({*found}) == len(found)
    assert opened(base, num_workers=3, max_skipped=0.5).fingerprint == found[-1]


def test_what_is_damaged_is_named_and_replaced(tmp_path, capsys):
    lines = []
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"{number}.wav").write_bytes(wav(1))
        lines.append({"image": f"{number}.png", "audio": f"{number}.wav", "finding": ["flu"]})
    (tmp_path / "0.png").write_bytes(png(0)[:60])
    (tmp_path / "1.wav").write_bytes(wav(1, seconds=0))
    (tmp_path / "2.wav").write_bytes(wav(1, rate=500))
    del lines[3]["finding"], lines[4]["image"], lines[4]["audio"]
    source, seen = manifest(tmp_path, lines), {"video": None, "text": None, "max_skipped": 0.7}
    dataset = opened(source, **seen)
    trained = dataset.train.batch(np.arange(40))
    held = [*dataset.held_batches(3)]
    reasons = dataset.train.skips.reasons
    assert reasons.keys() == {0, 1, 2, 3, 4}
    for number, why in enumerate((
        "0.png: a broken or truncated image", "no samples", "500 samples a second; from 1000",
        "3.png: there is no label, field 'finding'", "has none of image, sound but nothing",
    )):  # fmt: skip
        assert why in reasons[number]
    assert "skipped (5 of 8)" in capsys.readouterr().err
    good = sum((batch["labels"][:, 1] == 1).sum() for batch in held)
    assert good == len({*dataset.held.numbers} - reasons.keys())
    assert trained["present"]["image"].all() and trained["present"]["sound"].all()
    same(trained, opened(source, **seen).train.batch(np.arange(40)))
    with pytest.raises(InputError, match="of 8 examples cannot be used, more than 1.00%"):
        opened(source, **(seen | {"max_skipped": 0.01})).train.batch(np.arange(40))


@pytest.mark.parametrize(
    ("finding", "several", "why"),
    [
        (
            ["flue"],
            True,
            r"0.png: label 'flue' is none of the 3 data.classes; the nearest is 'flu'",
        ),
        ({"colt": True}, True, "label 'colt' is none of .* nearest is 'cold'"),
        ({"flu": "maybe"}, True, "0.png: label 'flu' is 'maybe', not true, false or null"),
        ("Fine", False, "label 'Fine' is none of .* nearest is 'fine'"),
        (["cold", "flu"], False, r"has 2 labels \['cold', 'flu'\], and one is wanted"),
        ([], False, r"has 0 labels \[\], and one is wanted"),
    ],
)
def test_a_label_that_is_no_class_stops_the_run(tmp_path, finding, several, why):
    (tmp_path / "0.png").write_bytes(png(0))
    good = {"image": "0.png", "finding": "fine"}
    source = manifest(tmp_path, [good | {"finding": finding, "group": str(n)} for n in range(2)])
    kept = {"multi_label": several, "sound": False, "video": None, "text": None}
    dataset = opened(source, **kept, max_skipped=0.9)
    with pytest.raises(InputError, match=why):
        dataset.train.batch(np.arange(1))
    with pytest.raises(InputError, match=why):
        next(dataset.held_batches(1))


def test_questions_are_answered_by_both_and_by_neither_alone(tmp_path):
    seen = {"image": ImageTransform(size=8), "cache_dir": str(tmp_path)}
    text = Text(length=12)
    dataset = open_labelled(Labelled(text=text, **seen), sequence_length=12, seed=0)
    held = [*dataset.held_batches(100)]
    labels = np.concatenate([batch["labels"] for batch in held])
    images = np.concatenate([batch["inputs"]["image"] for batch in held])
    ids = np.concatenate([batch["inputs"]["text"] for batch in held])
    count = 3 * len(digit_numbers(0.2, training=False))
    assert (labels[:count] >= 0).all() and (labels[count:] == -1).all()
    order = {tuple(image.ravel()): i for i, image in enumerate(load_digits().images)}
    right = 0
    table = np.zeros((2, 10, 14))  # by question, by digit: how often each answer
    asked = {}
    answers = {
        "Which digit is this?": ANSWERS[:10],
        "Is it odd or even?": ["odd" if i in (1, 3, 5, 7, 9) else "even" for i in range(10)],
        "Is it large or small?": ["large" if i >= 5 else "small" for i in range(10)],
    }
    for image, row, label in zip(images[:count], ids[:count], labels[:count], strict=True):
        digit = load_digits().labels[order[tuple(image[:, :, 0].ravel())]]
        question = dataset.tokenizer.decode([t for t in row.tolist() if t >= 0][1:-1])
        place = asked.setdefault(question, len(asked))
        table[0, place, label] += 1
        table[1, digit, label] += 1
        right += ANSWERS[label] == answers[question][digit]
    assert right == count and len(asked) == 3
    best = table.max(-1).sum(-1) / count  # of what knows the question, or the digit, alone
    assert (best < 0.41).all()
    ways = {tuple(row) for row in dataset.train.batch(np.arange(200))["inputs"]["text"]}
    assert len(ways) == 6


def test_what_cannot_be_is_refused(folder):
    source = MediaFolder(path=str(folder))
    half = ClipTransform(image=ImageTransform(normalization="clip"))
    for fields, why in (
        ({"classes": ("a", "a")}, "data.classes"),
        ({"classes": ()}, "data.classes"),
        ({"missing": 1.5}, "data.missing"),
        ({"max_skipped": 1.0}, "data.max_skipped"),
        ({"held_out": 0.0}, "data.held_out"),
        ({"video": half}, "normalized alike"),
        (dict.fromkeys(("image", "video", "text")) | {"sound": False}, "one of image, sound"),
    ):
        with pytest.raises(ValueError, match=why):
            config(source, **fields)
    with pytest.raises(ValueError, match="DigitQuestions have the modalities"):
        config(DigitQuestions(), classes=ANSWERS, multi_label=False)
    with pytest.raises(ValueError, match=r"data\.text\.length"):
        Text(length=1)
    with pytest.raises(InputError, match="none.jsonl: No such file"):
        opened(dataclasses.replace(source, manifest="none.jsonl"))
