"""Conversations: what is learned, by hand; rows depend on their number alone; refusals by name."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.augment import Augmentation
from deepseek_jax.data.conversations import (
    Dialog,
    EmojiQuestions,
    Place,
    group_of,
    medium_token,
    written,
)
from deepseek_jax.data.media import MediaFolder, MediaParquet, MediaShards
from deepseek_jax.data.seeing import Seeing, SeeingPart, open_seeing
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tiles import TEXT, Sight, laid_out
from deepseek_jax.data.tokenizer import BPE, Bytes, open_tokenizer

FOUR, TILED = Sight(size=8, tokens=4), Sight(size=8, tokens=4, side=2)
IMAGE = 300  # no byte


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty pictures with a question each; 7 is truncated, 8 has two images, 9 none; a text."""
    folder, lines = tmp_path_factory.mktemp("talks"), []
    for i in range(20):
        Image.new("RGB", (10 + i, 12), (10 * i, 5, 200)).save(folder / f"{i}.png")
        record = {"image": f"{i}.png", "messages": turns("<image> What?", f"n{i}")}
        if i == 8:
            record = {"images": ["8.png", "7.png".replace("7", "6")], "group": "two"}
            record["messages"] = turns("<image> or <image>?", "both")
        if i == 9:
            record = {"messages": turns("Hello?", "hi")}
        lines.append(json.dumps(record))
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:40])
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"some words of text {i}, " * 40)
    return folder


def config(folder, *parts, **fields):
    parts = parts or (SeeingPart(source=MediaFolder(path=str(folder))),)
    base = {"parts": parts, "tokenizer": Bytes(), "views": 2, "held_out": 0.3}
    base |= {"max_skipped": 0.2, "cache_dir": str(folder / "cache")}
    return Seeing(**(base | fields))


def opened(config, sight=FOUR, length=48, seed=0, image_id=IMAGE):
    given = {"sight": sight, "image_id": image_id, "sequence_length": length, "seed": seed}
    return open_seeing(config, **given)


def test_answers_alone_are_learned(folder):
    """A row written by hand."""
    (rows,) = opened(config(folder)).train.rows
    talk = rows.talks.talks(3, None)[0]
    row = rows.row(talk)
    ids = [256, *b"User: ", *[IMAGE] * 4, *b" What?\n\n", *b"Assistant:", *b" n3", 257]
    count = len(ids) - 1
    np.testing.assert_array_equal(row["tokens"][:count], ids[:-1])
    np.testing.assert_array_equal(row["targets"][:count, 0], ids[1:])
    learned = np.flatnonzero(row["weights"][:, 0])
    np.testing.assert_array_equal(row["targets"][learned, 0], [*b" n3", 257])
    assert learned[-1] == count - 1 and set(row["weights"][learned, 0]) == {1.0}
    np.testing.assert_array_equal(row["sources"][7:11], range(4))
    assert (np.delete(row["sources"], range(7, 11)) == TEXT).all()
    np.testing.assert_array_equal(row["segments"], np.arange(48) < count)
    np.testing.assert_array_equal(row["positions"][:count], range(count))
    assert row["images"].shape == (2, 8, 8, 3) and not row["images"][1].any()
    assert row["images"][0, 4, 4].tolist() == [30, 5, 200]


def test_tiles_and_several_turns():
    tokenizer = open_tokenizer(Bytes())
    rows = (("system", "Be"), ("user", "a<image>b<image>"), ("assistant", "c"), ("user", "d"))
    rows += (("assistant", "e"),)
    talk = type("Talk", (), {"turns": rows})
    first, second = TILED.layout((1, 1)), TILED.layout((2, 1))
    moved = np.where(second >= 0, second + 2 * 4, second)  # behind the first one's two views
    places = [Place(IMAGE, first), Place(IMAGE, moved)]
    np.testing.assert_array_equal(laid_out(TILED, [(1, 1), (2, 1)]), [*first, *moved])
    found = written(talk, Dialog(user="U", assistant="A", end="|"), tokenizer, places)
    text = [*b"Be|U a"], [*b"b"], [*b"|A"]
    assert found.ids == [
        256, *text[0], *[IMAGE] * len(first), *text[1], *[IMAGE] * len(second), *text[2],
        *b" c", 257, *b"U d|A", *b" e", 257,
    ]  # fmt: skip
    seen = [source for source in found.sources if source != TEXT]
    assert seen == [*first, *moved]
    answered = [i for i, learned in zip(found.ids, found.answers, strict=True) if learned]
    assert answered == [*b" c", 257, *b" e", 257]


def test_a_row_is_a_function_of_its_number_and_the_seed(folder, capsys):
    text = SeeingPart(source=TextFiles(paths=(f"{folder}/*.txt",)), schedule=((0, 0.0), (60, 1.0)))
    talks = SeeingPart(source=MediaFolder(path=str(folder)), weight=0.5)
    both = config(folder, talks, text, augmentation=Augmentation(brightness=0.2))
    sets = [opened(both, seed=seed) for seed in (1, 1, 2)]
    numbers = np.arange(0, 80)
    first, again, other = (dataset.train.batch(numbers) for dataset in sets)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name], err_msg=name)
    assert (first["images"] != other["images"]).any()
    late = sets[2].train.batch(numbers[50:])  # as a resumed run would
    for name, values in other.items():
        np.testing.assert_array_equal(values[50:], late[name], err_msg=name)
    part, _ = sets[0].train.origin(numbers)
    assert part[:20].mean() < part[60:].mean(), "the text comes in"
    whole = first["weights"][part == 1, :, 0]
    assert whole.mean() > 0.9 and not first["images"][part == 1].any()
    assert sets[0].fingerprint == sets[1].fingerprint != sets[2].fingerprint
    held = [talk.answer for talk, _ in sets[0].held_rows()]
    assert "7.png" in capsys.readouterr().err
    targets, weights = (first[name][part == 0, :, 0] for name in ("targets", "weights"))
    learned = zip(targets, weights, strict=True)
    trained = {bytes(row[weight > 0].tolist()[:-1]).decode() for row, weight in learned}
    assert held and not trained & {f" {answer}" for answer in held}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_and_tables(folder, tmp_path, kind):
    said = [{"messages": turns("<image>?", f"n{i}")} for i in range(4)]
    content = (folder / "1.png").read_bytes()
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for i, record in enumerate(said):
                for name, data in (
                    (f"{i}.png", content),
                    (f"{i}.json", json.dumps(record).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        source = MediaShards(paths=(str(tmp_path / "a.tar"),))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.Table.from_pylist([record | {"image": content} for record in said])
        parquet.write_table(table, tmp_path / "a.parquet")
        source = MediaParquet(paths=(str(tmp_path / "a.parquet"),))
    dataset = opened(config(folder, SeeingPart(source=source)))
    batch = dataset.train.batch(np.arange(3))
    assert (batch["weights"].sum((1, 2)) == 4).all() and batch["images"][:, 0].any()


@pytest.mark.parametrize("record, why", [
    ({"messages": turns("<image>?", "a")}, "1 times <image>, and 0 images"),
    ({"image": "1.png", "messages": turns("no mark", "a")}, "0 times <image>, and 1 images"),
    ({"image": "1.png", "messages": []}, "no answer"),
    ({"image": "1.png", "messages": [{"role": "bot", "content": "x"}]}, "role is 'bot'"),
    ({"image": "1.png", "messages": ["text"]}, "not a message"),
    ({"image": "1.png", "messages": turns("<image>?", "<image>")}, "an answer holds"),
    ({"image": "1.png", "messages": turns("<image>?", "long" * 30)}, "1.png: no room in 48"),
    ({"images": ["1.png"] * 3, "messages": turns("<image>" * 3, "a")}, "1.png: 3 images, and data"),
])  # fmt: skip
def test_what_cannot_be_used_is_named(folder, record, why):
    good = {"image": "1.png", "messages": turns("<image>?", "a"), "group": "good"}
    lines = [json.dumps(record | {"group": "bad"}), json.dumps(good)]
    (folder / "one.jsonl").write_text("\n".join(lines))
    source = MediaFolder(path=str(folder), manifest="one.jsonl")
    dataset = opened(config(folder, SeeingPart(source=source), max_skipped=0.0))
    sides = [*dataset.train.rows, *dataset.held]
    (bad,) = [side for side in sides if 0 in side.numbers]
    with pytest.raises(InputError, match=why):
        bad.batch(np.arange(1))


def test_fields_are_checked(folder):
    with pytest.raises(ValueError, match="a source of conversations"):
        config(folder, SeeingPart(source=TextFiles(paths=("a",))))
    with pytest.raises(ValueError, match="never all 0"):
        config(folder, SeeingPart(source=EmojiQuestions(), weight=0.0))
    for wrong in ({"views": 0}, {"eval_rows": 0}):
        with pytest.raises(ValueError, match="data.views"):
            config(folder, **wrong)
    with pytest.raises(InputError, match="which token is an image's"):
        opened(config(folder), image_id=None)
    bpe = opened(config(folder, tokenizer=BPE(vocab_size=300)), image_id=None)
    assert medium_token("image", bpe.tokenizer, None) == 2


def test_emoji_are_asked_for_by_concept():
    seeing = Seeing(
        parts=(SeeingPart(source=EmojiQuestions(asks=("group", "name"))),), tokenizer=Bytes()
    )
    dataset = opened(seeing, sight=Sight(size=24, tokens=4), length=160)
    (rows,) = dataset.train.rows
    talks = rows.talks
    names = [[talks.found.names[i] for i in numbers] for numbers in talks.members]
    (cook,) = [n for n, members in enumerate(names) if "1F468-200D-1F373" in members]
    assert len(talks.members[cook]) == 18, "tones and genders of one concept"
    said = {talk.kind: (talk.turns[0][1], talk.answer) for talk in talks.talks(cook, None)}
    assert said["group/en"] == ("<image>\nWhat is this?", "people")
    assert said["name/zh"][1] == "男厨师"
    assert group_of("1F1E9-1F1EA", "flags") == "Flags" and group_of("002D", "002D") == ""
    kinds = {talk.kind for talk, _ in dataset.held_rows()}
    assert kinds == {"group/en", "group/zh", "name/en", "name/zh"}
    limited = dataclasses.replace(seeing, eval_rows=5)
    assert len([*opened(limited, sight=Sight(size=24, tokens=4), length=160).held_rows()]) == 5
