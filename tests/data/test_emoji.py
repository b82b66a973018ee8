"""Emoji: every drawing's picture, captions in two languages, and groups that hold concepts."""

import collections
import re

import numpy as np
import pytest

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import emoji
from deepseek_jax.data.corpus import key_hash, side
from deepseek_jax.data.emoji import captions, group, open_emoji

TONE = re.compile(r",( (light|medium-light|medium|medium-dark|dark) skin tone,?)+")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("emoji")


@pytest.fixture(scope="module")
def drawings(cache):
    return open_emoji(12, cache)


def test_there_are_as_many_as_openmoji_names(drawings):
    images, words, groups, names = drawings
    assert images.shape == (4128, 12, 12, 3) and images.dtype == np.uint8
    assert len(words) == len(groups) == len(names) == 4128
    assert sum("zh" in each for each in words) == 3953
    assert all(each["en"].strip() and "_" not in each["en"] for each in words)
    for language in emoji.LANGUAGES:
        said = [each[language] for each in words if language in each]
        assert len(set(said)) == len(said)


def test_pictures_are_what_they_are_called(drawings):
    place = {each["en"]: number for number, each in enumerate(drawings.captions)}
    middles = {"red circle": (0, 2), "green circle": (1, 2), "blue circle": (2, 0)}
    for name, (high, low) in middles.items():
        image = drawings.images[place[name]].astype(int)
        assert image[0, 0].tolist() == [255, 255, 255]  # transparent: white
        assert image[5, 5, high] > image[5, 5, low] + 50
    assert len({image.tobytes() for image in drawings.images}) > 3500  # tiny ones may be equal


def test_a_second_call_reads_the_cache(drawings, cache, monkeypatch):
    def draws(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(emoji, "_raster", draws)
    again = open_emoji(12, cache)
    assert isinstance(again.images, np.memmap)
    np.testing.assert_array_equal(again.images, drawings.images)
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    (folder / "images.npy").unlink()  # not in place: it is mapped
    np.save(folder / "images.npy", np.zeros((2, 2), np.uint8))
    with pytest.raises(AssertionError, match="drawn again"):  # a damaged cache is made anew
        open_emoji(12, cache)


@pytest.mark.parametrize(
    ("name", "base", "english", "chinese"),
    [
        ("1F60A", "1F60A", "smiling face with smiling eyes", "羞涩微笑"),
        ("2764", "2764", "red heart", "红心"),
        ("1F469-1F3FD-200D-1F680", "1F9D1-1F680", "woman astronaut, medium skin tone", None),
        ("1F9D1-200D-1F680", "1F9D1-1F680", "astronaut", None),
        ("1F9D4-1F3FF-200D-2642-FE0F", "1F9D4", "man beard, dark skin tone", None),
        ("1F1EB-1F1F7", "flags", "flag of France", "法国旗帜"),
        ("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "flags", "flag of England", "英格兰旗帜"),
        ("1F3F4-E0075-E0073-E0063-E0061-E007F", "flags", "flag of US-CA", None),
        ("1F3F3-FE0F-200D-1F308", "flags", "rainbow flag", "彩虹旗"),
        ("1F1E6", "1F1E6", "regional indicator symbol letter a", None),
        ("1FAD9-200D-1F7E5", "1FAD9", "jar with large red square", None),
        ("1F7E5", "1F7E5", "red square", None),
        ("1F468-200D-1F467-200D-1F466", "1F46A", "family man girl boy", None),
        ("1F469-1F3FB-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FC", "1F48F", None, None),
        ("1F9D1-1F3FC-200D-1F91D-200D-1F9D1-1F3FB", "1F46B", None, None),
        ("1F469-1F3FC-200D-1F430-200D-1F469-1F3FB", "1F46F", None, None),
        ("1FAF1-1F3FC-200D-1FAF2-1F3FE", "1F91D", None, None),
        ("1F469-200D-1F9B0", "1F9D1", "woman red hair", None),
        ("1F6B6-1F3FE-200D-2640-FE0F-200D-27A1-FE0F", "1F6B6", None, None),
        ("27A1", "27A1", "right arrow", None),
        ("2640", "2640", "female sign", None),
        ("1F3FB", "1F3FB", "light skin tone", None),
        ("2654", "2654", "white chess king", None),
    ],
)
def test_names_and_bases(name, base, english, chinese):
    assert group(name) == base
    found = captions(name)
    assert english is None or found["en"] == english
    assert chinese is None or found["zh"] == chinese


def test_private_characters_have_no_name():
    assert captions("E0AC-200D-2640-FE0F") == {}


def test_what_differs_in_tone_or_gender_is_split_together(drawings):
    """By captions, which know nothing of code points."""
    groups = collections.defaultdict(set)
    for words, base in zip(drawings.captions, drawings.groups, strict=True):
        plain = TONE.sub("", words["en"])
        groups[re.sub(r"^(woman|man|women|men|person|people) ", "", plain)].add(base)
    apart = {what for what, bases in groups.items() if len(bases) > 1}
    assert apart == {"red hair", "curly hair", "white hair", "bald"}  # hair alone, and on a person
    assert 1400 < len(set(drawings.groups)) < 1600


def test_a_fifth_of_the_concepts_is_held_out(drawings):
    hashes = np.array([*map(key_hash, drawings.groups)], np.uint64)
    train, out = (side(hashes, 0.2, training) for training in (True, False))
    assert sorted([*train, *out]) == list(range(4128))
    seen, unseen = ({drawings.groups[number] for number in side} for side in (train, out))
    assert not seen & unseen
    assert 0.15 < len(unseen) / len(seen | unseen) < 0.25


def test_bad_drawings_and_sizes(tmp_path, cache):
    with pytest.raises(InputError, match="2 x 2 pixels"):
        open_emoji(2, cache)
    for text, message in {"<svg": "cannot be drawn", "": "cannot be drawn"}.items():
        (tmp_path / "a.svg").write_text(text)
        with pytest.raises(InputError, match=f"a.svg: {message}"):
            emoji._raster(tmp_path / "a.svg", 8)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
    (tmp_path / "a.svg").write_text(f'{head}<rect width="4" height="8" fill="#00f"/></svg>')
    pixels = emoji._raster(tmp_path / "a.svg", 8)
    assert pixels.tolist() == [[[0, 0, 255]] * 4 + [[255, 255, 255]] * 4] * 8
