"""Written and spoken digits: rows depend on their number alone; sides share no hand, no voice."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audiovisual import LOUDNESS, PROPERTIES, AudioVisual, open_digits
from deepseek_jax.data.digits import load_digits
from deepseek_jax.data.packing import epoch_order

pytest.importorskip("espeakng_loader", reason="the extra `speech` (GPL) is not installed")

LENGTH = 11_200


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    voices = {"voices": ("m1", "f2"), "pitches": (30, 60), "speeds": (200,)}
    return AudioVisual(**voices, held_out=0.3, cache_dir=str(tmp_path_factory.mktemp("sounds")))


def opened(config, seed=0, length=LENGTH, **changes):
    changed = dataclasses.replace(config, **changes)
    return open_digits(changed, sequence_length=length, seed=seed)


def test_a_row_is_a_function_of_its_number_and_the_seed(config):
    rows = np.arange(7, 27)
    first, again, other = (
        tree.flatten(opened(config, seed, missing=0.5).train.batch(rows)) for seed in (1, 1, 2)
    )
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert (values != other[name]).any(), name
    shapes = {name: (x.shape, x.dtype) for name, x in first.items()}
    told = config.shapes(20, LENGTH)
    flat = {f"inputs/{n}": x for n, x in told["inputs"].items()} | {"labels": told["labels"]}
    assert shapes == flat | {f"present/{n}": x for n, x in told["present"].items()}
    alone = opened(config, 1, missing=0.5).train.batch(rows[5:6])
    np.testing.assert_array_equal(alone["inputs"]["sound"][0], first["inputs/sound"][5])


def test_every_epoch_has_every_digit_once_in_another_order(config):
    train = opened(config).train
    count = len(train.numbers)
    places = [[epoch_order(count, 0, epoch)[i] for i in range(count)] for epoch in (0, 1)]
    assert places[0] != places[1] and sorted(places[0]) == sorted(places[1]) == [*range(count)]
    labels = train.batch(np.arange(count - 3, count + 3))["labels"]
    order = np.concatenate([train.numbers[p] for p in places])[count - 3 : count + 3]
    np.testing.assert_array_equal(labels, load_digits().labels[order])


def test_sides_share_neither_pictures_nor_speakers(config):
    dataset = opened(config)
    assert not {*dataset.train.numbers} & {*dataset.held.numbers}
    assert not {*dataset.train.speakers} & {*dataset.held.speakers}
    assert len(dataset.train.speakers) + len(dataset.held.speakers) == 4
    count = len(dataset.held.numbers)
    batches = [*dataset.held_batches(100)]
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert len(labels) == 100 * len(batches) and (labels[count:] == -1).all()
    np.testing.assert_array_equal(labels[:count], load_digits().labels[dataset.held.numbers])
    assert f"held out: {count} digits" in dataset.describe()


def test_noise_is_as_loud_as_it_is_said_to_be(config):
    held = opened(config).held
    clean, loud = (held.row(3, level, level)["inputs"] for level in (0.0, 2.0))
    number = held.numbers[3]
    np.testing.assert_array_equal(clean["image"][:, :, 0], load_digits().images[number])
    voice = clean["sound"][clean["sound"] != 0]
    assert np.sqrt(np.mean(voice**2)) == pytest.approx(LOUDNESS, rel=0.02)
    noise = loud["sound"] - clean["sound"]
    assert noise.std() == pytest.approx(2 * LOUDNESS, rel=0.03)
    assert (loud["image"] != clean["image"]).mean() > 0.5
    drawn = [held.row(i)["inputs"]["sound"].std() for i in range(40)]
    assert min(drawn) < 2 * LOUDNESS and 5 * LOUDNESS < max(drawn) < 8.5 * LOUDNESS
    quiet = opened(config, clean=1.0, sound_noise=(0.5, 8.0)).train.row(4)["inputs"]["sound"]
    assert 0.5 * LOUDNESS < quiet.std() < 1.2 * LOUDNESS  # the voice is as loud as 1


def test_one_of_the_two_may_be_missing(config):
    batch = opened(config, missing=0.6).train.batch(np.arange(200))
    there = np.stack([*batch["present"].values()])
    assert there.any(0).all() and 0.5 < (~there).any(0).mean() < 0.7
    for name, x in batch["inputs"].items():
        empty = (x.reshape(200, -1) == 0).all(1)
        np.testing.assert_array_equal(empty, ~batch["present"][name])


def test_properties_are_those_of_the_digit(config):
    rows = np.arange(30)
    digits = opened(config).train.batch(rows)["labels"]
    dataset = opened(config, labels="properties")
    found = dataset.train.batch(rows)["labels"]
    assert dataset.config.classes == tuple(PROPERTIES)
    np.testing.assert_array_equal(found[:, 0], digits % 2)
    np.testing.assert_array_equal(found[:, 3], digits >= 5)
    last = [*dataset.held_batches(200)][-1]["labels"]
    assert (last[-1] == -1).all() and set(np.unique(last)) == {-1, 0, 1}


def test_the_fingerprint_follows_what_rows_depend_on(config, tmp_path):
    base = opened(config).fingerprint
    changes = {
        "image_noise": (0.0, 0.5),
        "missing": 0.1,
        "clean": 0.2,
        "held_out": 0.5,
        "labels": "properties",
    }
    found = [opened(config, **{name: value}).fingerprint for name, value in changes.items()]
    found += [opened(config, seed=1).fingerprint, opened(config, length=LENGTH + 1).fingerprint]
    assert len({base, *found}) == 8
    assert opened(config, num_workers=2).fingerprint == base


def test_what_cannot_be_is_refused(config, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"sequence_length \(2000\) has no room"):
        opened(config, length=2000)
    for field, value in (("image_noise", (1.0, 0.5)), ("missing", 2.0), ("voices", ())):
        with pytest.raises(ValueError, match=f"data.{field}"):
            dataclasses.replace(config, **{field: value})
    with pytest.raises(InputError, match="nobody in eSpeak NG is called 'nobody'"):
        opened(config, voices=("nobody",))
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(InputError, match=r"pip install 'deepseek_jax\[speech\]'"):
        opened(config, cache_dir=str(tmp_path))
