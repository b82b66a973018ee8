"""Pairs: rows depend on their number alone, sides share no group, damage is named and replaced."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.augment import Augmentation
from deepseek_jax.data.media import MediaFolder
from deepseek_jax.data.pairs import Pairs, open_pairs, text_row
from deepseek_jax.data.tokenizer import BPE, Bytes, open_tokenizer
from deepseek_jax.data.vision import ImageTransform

WORDS = ("red", "green", "blue", "grey", "pink")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty one-colored pictures of other sizes with captions in two languages, one damaged."""
    folder, rng, lines = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0), []
    for i in range(30):
        pixels = np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), (10 + i, 14, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i}.png")
        words = {"en": [f"{WORDS[i % 5]} {i}", f"number {i}"], "fr": f"numero {i}"}
        lines.append(
            json.dumps({"image": f"{i}.png", **words, "group": WORDS[i % 5] + str(i // 10)})
        )
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:40])
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def config(folder, **fields):
    source = MediaFolder(path=str(folder), texts=("en", "fr"))
    base = {"source": source, "tokenizer": Bytes(), "image": ImageTransform(size=8, fit="crop")}
    base |= {"held_out": 0.3, "max_skipped": 0.05, "cache_dir": str(folder / "cache")}
    return Pairs(**(base | fields))


def test_a_row_is_a_function_of_its_number_and_the_seed(folder):
    opened = [open_pairs(config(folder), sequence_length=12, seed=seed) for seed in (1, 1, 2)]
    numbers = np.arange(5, 60)
    first, again, other = (dataset.train.batch(numbers) for dataset in opened)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert (values != other[name]).any(), name
    shapes = {name: (x.dtype, x.shape) for name, x in first.items()}
    assert shapes == {
        "images": (np.uint8, (55, 8, 8, 3)),
        "tokens": (np.int32, (55, 12)),
        "groups": (np.int32, (55,)),
    }
    alone = opened[0].train.batch(numbers[7:8])
    np.testing.assert_array_equal(alone["images"][0], first["images"][7])
    same = first["groups"][:, None] == first["groups"][None]
    captions = (first["tokens"][:, None] == first["tokens"][None]).all(-1)
    np.testing.assert_array_equal(same, captions)
    assert captions.sum() > 55, "no caption came twice in two epochs"


def test_every_epoch_has_every_example_once_in_another_order(folder):
    plain = config(folder, augmentation=None, max_skipped=0.05)
    dataset = open_pairs(plain, sequence_length=12, seed=3)
    count = len(dataset.train.numbers)
    epochs = [dataset.train.batch(np.arange(e * count, (e + 1) * count)) for e in range(2)]
    colors = [sorted(map(tuple, epoch["images"][:, 4, 4])) for epoch in epochs]
    damaged = 7 in dataset.train.numbers
    assert colors[0] == colors[1] or damaged
    assert len(set(colors[0])) == count - damaged
    assert (epochs[0]["images"] != epochs[1]["images"]).any()


def test_sides_share_no_group_and_what_is_damaged_is_named(folder, capsys):
    dataset = open_pairs(config(folder), sequence_length=12, seed=0)
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    sides = [{lines[i]["group"] for i in side.numbers} for side in (dataset.train, dataset.held)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 15
    held = [row["numbers"] for row in dataset.held_images()]
    dataset.train.batch(np.arange(60))
    assert list(dataset.held.skips.reasons) == [7]
    assert "7.png" in capsys.readouterr().err
    assert [n for n in dataset.held.numbers if n != 7] == held
    texts = dataset.held_texts()
    assert {field: len(rows) for field, rows in texts.items()} == {
        "en": 2 * len(held), "fr": len(held)
    }  # fmt: skip
    ids = texts["fr"][0]["tokens"]
    assert dataset.tokenizer.decode_bytes(ids[1 : list(ids).index(257)]) == b"numero %d" % held[0]
    with pytest.raises(InputError, match="1 of 30 examples cannot be used"):
        strict = open_pairs(config(folder, max_skipped=0.0), sequence_length=12, seed=0)
        strict.train.batch(np.arange(60))
        list(strict.held_images())


def test_the_fingerprint_follows_what_rows_depend_on(folder):
    base = config(folder)
    other = {
        "held_out": 0.4,
        "augmentation": Augmentation(flip=0.0),
        "tokenizer": BPE(vocab_size=300),
        "image": ImageTransform(size=8, fit="stretch"),
    }
    found = [open_pairs(base, sequence_length=12, seed=0).fingerprint]
    found += [
        open_pairs(base, sequence_length=n, seed=s).fingerprint for n, s in ((13, 0), (12, 1))
    ]
    for name, value in other.items():
        changed = dataclasses.replace(base, **{name: value})
        found.append(open_pairs(changed, sequence_length=12, seed=0).fingerprint)
    assert len(set(found)) == len(found)
    assert open_pairs(base, sequence_length=12, seed=0).fingerprint == found[0]


def test_a_long_caption_is_cut_and_keeps_its_end(folder):
    row = text_row(open_tokenizer(Bytes()), "abcdefgh", 6)
    assert row.tolist() == [256, *b"abcd", 257]
    assert text_row(open_tokenizer(Bytes()), "a", 5).tolist() == [256, 97, 257, -1, -1]


def test_missing_captions_and_media_are_named(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "text": f"t{i}", "group": str(i)} for i in range(8)]
    del lines[3]["text"], lines[5]["image"]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "manifest.jsonl").write_text(text)
    base = config(tmp_path, source=MediaFolder(path=str(tmp_path)), max_skipped=0.5)
    dataset = open_pairs(base, sequence_length=8, seed=0)
    dataset.train.batch(np.arange(40))
    list(dataset.held_images())
    reasons = dataset.train.skips.reasons
    assert reasons.keys() == {3, 5}
    assert "there is no caption" in reasons[3] and "there is no image" in reasons[5]
