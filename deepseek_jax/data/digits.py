"""Handwritten digits that pip brings (scikit-learn's 1,797 of 8 x 8), still and moving.

Pixels are uint8, 0 the background: digits [n, 8, 8], clips [T, S, S]. The digits are the test set
of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak). A clip is a pure
function of (seed, row): video with captions and true positions, as much as one wants.
"""

import functools
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.augment import generator
from deepseek_jax.data.corpus import key_hash, side
from deepseek_jax.data.vision import resized

DIRECTIONS = {  # rows and columns a step; what it is called in English and Chinese
    "left": (0, -1, "左"),
    "right": (0, 1, "右"),
    "up": (-1, 0, "上"),
    "down": (1, 0, "下"),
}


class Digits(NamedTuple):
    """Handwritten digits."""

    images: np.ndarray
    """uint8 [n, 8, 8], 255 the ink."""
    labels: np.ndarray
    """int64 [n], 0 to 9."""


@functools.cache
def load_digits() -> Digits:
    """All 1,797 digits, in scikit-learn's order; InputError where the extra `media` is missing."""
    found = require("sklearn.datasets").load_digits()
    images = (found.images * (255 / 16)).round().astype(np.uint8)
    labels = np.asarray(found.target, np.int64)
    images.flags.writeable = labels.flags.writeable = False
    return Digits(images, labels)


def digit_numbers(fraction: float, training: bool) -> np.ndarray:
    """The numbers of the digits of one side, ascending; about `fraction` of them held out."""
    names = (f"digit {number}" for number in range(len(load_digits().labels)))
    hashes = np.array([*map(key_hash, names)], np.uint64)
    return side(hashes, fraction, training)


class Clip(NamedTuple):
    """A digit on its way."""

    frames: np.ndarray
    """uint8 [T, S, S]."""
    captions: dict[str, str]
    """{"en": "a 3 moving left", "zh": ...}."""
    label: int
    direction: str
    corners: np.ndarray
    """int64 [T, 2]: the row and column of the digit's upper left corner in each frame."""


def moving_digit(
    seed: int, row: int, numbers: np.ndarray, *, frames: int = 8, size: int = 32, digit: int = 16
) -> Clip:
    """Clip `row`: one of the digits `numbers`, `digit` pixels high, moves evenly in a direction.

    It stays in the picture and moves at least a pixel a frame. InputError where that has no room.
    """
    room, least = size - digit, frames - 1
    if min(frames, digit, len(numbers)) < 1 or room < max(1, least):
        raise InputError(
            f"{len(numbers)} digits, {frames} frames of {size} pixels, a digit of {digit}: "
            "a digit needs a pixel of room a frame; take larger or fewer frames"
        )
    draw = generator(seed, row, "moving digit")
    number = int(numbers[draw.integers(len(numbers))])
    direction = list(DIRECTIONS)[draw.integers(len(DIRECTIONS))]
    down, right, chinese = DIRECTIONS[direction]
    way = draw.integers(least, room + 1)  # pixels from the first frame to the last
    across, begin = draw.integers(room + 1), draw.integers(room - way + 1)
    along = begin + np.linspace(0, way, frames).round().astype(np.int64)
    along = along[::-1] if down + right < 0 else along
    fixed = np.full(frames, across)
    corners = np.stack([along, fixed] if down else [fixed, along], axis=-1)
    image = resized(load_digits().images[number], digit, digit, "bilinear")
    pictures = np.zeros((frames, size, size), np.uint8)
    for picture, (top, left) in zip(pictures, corners, strict=True):
        picture[top : top + digit, left : left + digit] = image
    label = int(load_digits().labels[number])
    article = "an" if label == 8 else "a"
    captions = {"en": f"{article} {label} moving {direction}", "zh": f"数字{label}向{chinese}移动"}
    return Clip(pictures, captions, label, direction, corners)
