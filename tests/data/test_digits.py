"""Digits: scikit-learn's own, the sides, and clips that do what their captions say."""

import collections

import numpy as np
import pytest
import sklearn.datasets
import sklearn.linear_model

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.digits import (
    DIRECTIONS,
    digit_numbers,
    load_digits,
    moving_digit,
)


def test_digits_are_scikit_learns():
    images, labels = load_digits()
    theirs = sklearn.datasets.load_digits()
    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8
    np.testing.assert_allclose(images / 255, theirs.images / 16, atol=0.5 / 255)
    np.testing.assert_array_equal(labels, theirs.target)
    train, out = digit_numbers(0.2, training=True), digit_numbers(0.2, training=False)
    assert sorted([*train, *out]) == list(range(1797)) and 0.16 < len(out) / 1797 < 0.24
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_a_clip_depends_on_seed_and_row_alone():
    numbers = digit_numbers(0.2, training=True)
    clips = [moving_digit(3, row, numbers) for row in range(200)]
    for row in (150, 7, 199):
        again = moving_digit(3, row, numbers)
        np.testing.assert_array_equal(again.frames, clips[row].frames)
        assert again.captions == clips[row].captions
    assert len({clip.frames.tobytes() for clip in clips}) == 200
    others = [moving_digit(4, row, numbers).frames.tobytes() for row in range(200)]
    assert not {clip.frames.tobytes() for clip in clips} & set(others)
    counts = collections.Counter(clip.direction for clip in clips)
    assert min(counts[direction] for direction in DIRECTIONS) > 25
    assert len({clip.label for clip in clips}) == 10


@pytest.mark.parametrize(
    ("frames", "size", "digit"), [(8, 32, 16), (1, 9, 8), (5, 12, 8), (3, 40, 8)]
)
def test_clips_show_what_they_say(frames, size, digit):
    """The center of the ink moves as the caption says, evenly, inside the picture."""
    numbers = np.arange(1797)
    for row in range(60):
        clip = moving_digit(0, row, numbers, frames=frames, size=size, digit=digit)
        assert clip.frames.shape == (frames, size, size) and clip.frames.dtype == np.uint8
        assert clip.captions["en"].split()[1:] == [str(clip.label), "moving", clip.direction]
        assert clip.captions["en"].startswith("an 8" if clip.label == 8 else "a ")
        assert str(clip.label) in clip.captions["zh"]
        ink = clip.frames.astype(np.int64)
        weight = ink.sum((1, 2))
        assert np.ptp(weight) == 0  # nothing is cut off
        moments = np.stack([ink.sum(axis) @ np.arange(size) for axis in (2, 1)], axis=-1)
        moved = weight[0] * np.diff(clip.corners, axis=0)
        np.testing.assert_array_equal(np.diff(moments, axis=0), moved)
        down, right, _ = DIRECTIONS[clip.direction]
        steps = np.diff(clip.corners, axis=0)
        moving = steps @ np.array([down, right])
        assert (moving >= 1).all() and np.abs(steps).sum() == moving.sum()
        assert np.ptp(moving) <= 1 if len(moving) else True


def test_labels_belong_to_their_pictures():
    """A classifier of scikit-learn's knows the digits in the clips."""
    train, out = digit_numbers(0.3, training=True), digit_numbers(0.3, training=False)
    images, labels = load_digits()
    model = sklearn.linear_model.RidgeClassifier()
    model.fit(images[train].reshape(len(train), -1) / 255, labels[train])
    seen = [moving_digit(1, row, out, digit=8) for row in range(100)]
    crops = [clip.frames[3][top : top + 8, left : left + 8] for clip in seen
             for top, left in [clip.corners[3]]]  # fmt: skip
    found = model.predict(np.stack(crops).reshape(100, -1) / 255)
    assert np.mean(found == [clip.label for clip in seen]) > 0.85


@pytest.mark.parametrize(
    ("frames", "size", "digit"), [(0, 32, 16), (8, 16, 16), (20, 32, 16), (2, 9, 0)]
)
def test_no_room(frames, size, digit):
    with pytest.raises(InputError, match="a digit needs a pixel of room a frame"):
        moving_digit(0, 0, np.arange(9), frames=frames, size=size, digit=digit)
