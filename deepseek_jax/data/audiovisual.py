"""Digits to see and to hear: scikit-learn's handwriting beside eSpeak NG's voices, with noise.

Row i is a pure function of (seed, config, i): which digit of its epoch's order, who says it, when,
and how loud the noise on each side is. Neither a digit's picture nor a speaker (a voice with a
pitch and a speed) stands on both sides. Needs the extras `media` and `speech`.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audio import fitted
from deepseek_jax.data.augment import generator
from deepseek_jax.data.corpus import cache_folder, cached, check_sides, digest, held_out, key_hash
from deepseek_jax.data.digits import digit_numbers, load_digits
from deepseek_jax.data.packing import epoch_order, stacked
from deepseek_jax.data.speech import spoken
from deepseek_jax.data.vision import Normalization

RATE = 16_000  # samples a second
LOUDNESS = 0.1  # the root mean square of what is said
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROPERTIES = {
    "odd": {1, 3, 5, 7, 9},
    "prime": {2, 3, 5, 7},
    "square": {0, 1, 4, 9},
    "five or more": {5, 6, 7, 8, 9},
}
MODALITIES = ("image", "sound")
SIZE = 8  # of an image
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioVisual:
    """Digits that are written and spoken."""

    image_noise: tuple[float, float] = (0.0, 1.0)
    """Least and most of what a row draws evenly: the deviation of noise on pixels in 0..1."""
    sound_noise: tuple[float, float] = (0.0, 8.0)
    """Likewise: noise, where 1 is as loud as the voice."""
    clean: float = 0.1
    """How often a side has its least noise instead: silence is unlike any noise."""
    missing: float = 0.0
    """How often a training row lacks one of the two."""
    labels: Literal["digit", "properties"] = "digit"
    """One class of ten, or several labels: odd, prime, square, five or more."""
    voices: tuple[str, ...] = ("m1", "m3", "m5", "m7", "f1", "f2", "f4")
    """eSpeak NG's, speaking American English."""
    pitches: tuple[int, ...] = (30, 50, 70)
    speeds: tuple[int, ...] = (160, 190, 220)
    """Words a minute."""
    normalization: Normalization = "half"
    """How the model's pixels are made of these."""
    held_out: float = 0.2
    """The share of images, and of speakers, kept for evaluation."""
    num_workers: int = 0
    """Processes that make batches; 0: a thread of this process."""
    cache_dir: str = ""
    """Where sounds are kept; empty: deepseek_jax in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self):
        check_sides(self.held_out, self.num_workers, self.cache_dir)
        for name in ("image_noise", "sound_noise"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"data.{name} {low, high} must ascend from 0 or above.")
        for name in ("clean", "missing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} ({getattr(self, name)}) must lie in [0, 1].")
        if not (self.voices and self.pitches and self.speeds):
            raise ValueError("data.voices, data.pitches and data.speeds must not be empty.")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of what a row shows."""
        return MODALITIES

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of what a row may be."""
        return tuple(PROPERTIES) if self.multi_label else WORDS

    @property
    def multi_label(self) -> bool:
        """Whether a row may be of several classes."""
        return self.labels == "properties"

    @property
    def speakers(self) -> list[tuple[str, int, int]]:
        """Voice, pitch and speed of each."""
        return [*itertools.product(self.voices, self.pitches, self.speeds)]

    def shapes(self, rows: int, length: int) -> Batch:
        """A batch's shapes and dtypes, sounds of `length` samples."""
        labels = (rows, len(self.classes)) if self.multi_label else (rows,)
        return {
            "inputs": {
                "image": ((rows, SIZE, SIZE, 3), np.dtype(np.uint8)),
                "sound": ((rows, length), np.dtype(np.float32)),
            },
            "present": dict.fromkeys(MODALITIES, ((rows,), np.dtype(bool))),
            "labels": (labels, np.dtype(np.int32)),
        }

    def still(self, name: str, medium: np.ndarray, length: int, tokenizer: Any) -> np.ndarray:
        """A row of a modality, its shape as in `shapes`: of a wave [T] of 16 kHz, or of pixels,
        which have their size already."""
        return fitted(medium, length) if name == "sound" else medium


class Sounds(NamedTuple):
    """Every digit as every speaker says it."""

    waves: np.ndarray
    """float32 [speakers, 10, T], of one loudness; zeros behind a word's end."""
    lengths: np.ndarray
    """int64 [speakers, 10]."""


def load_sounds(config: AudioVisual) -> Sounds:
    """The words of all speakers, from the cache or made now.

    InputError where the extra `speech` is missing, or there is no such voice.
    """

    def build(directory: pathlib.Path) -> None:
        said = [
            spoken(word, f"en-us+{voice}", speed, pitch, RATE)
            for voice, pitch, speed in config.speakers
            for word in WORDS
        ]
        lengths = np.array([len(wave) for wave in said]).reshape(-1, len(WORDS))
        waves = np.zeros((len(said), lengths.max()), np.float32)
        for row, wave in zip(waves, said, strict=True):
            row[: len(wave)] = wave * (LOUDNESS / np.sqrt(np.mean(np.square(wave))))
        np.save(directory / "waves.npy", waves.reshape(*lengths.shape, -1))
        np.save(directory / "lengths.npy", lengths)

    def load(directory: pathlib.Path) -> Sounds:
        waves = np.load(directory / "waves.npy", mmap_mode="r")
        return Sounds(waves, np.load(directory / "lengths.npy"))

    facts = ["spoken digits", RATE, LOUDNESS, config.speakers]
    return cached(cache_folder(config.cache_dir), facts, build, load)


@dataclasses.dataclass(frozen=True, eq=False)
class DigitRows:
    """Rows of one side by number."""

    config: AudioVisual
    sounds: Sounds
    numbers: np.ndarray
    """The images of this side."""
    speakers: np.ndarray
    """And its speakers."""
    length: int
    seed: int
    training: bool

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows by number [B]: `inputs` of image uint8 [B, 8, 8, 3] and sound float32 [B, T], which
        of them are `present` bool [B], and `labels` int32, [B] or, 0 or 1, [B, classes]."""
        return stacked([self.row(int(row)) for row in rows])

    def row(self, row: int, image_noise: float | None = None, sound_noise: float | None = None):
        """One row; with a level of noise given, that instead of the one it draws."""
        epoch, place = divmod(row, len(self.numbers))
        if self.training:
            place = epoch_order(len(self.numbers), self.seed, epoch)[place]
        number = self.numbers[place]
        draw = generator(self.seed, row, "digits" if self.training else "held-out digits")
        ranges = self.config.image_noise, self.config.sound_noise
        levels = [
            low if draw.random() < self.config.clean else draw.uniform(low, high)
            for low, high in ranges
        ]
        gone = draw.integers(len(MODALITIES)) if draw.random() < self.config.missing else None
        speaker = self.speakers[draw.integers(len(self.speakers))]
        label = int(load_digits().labels[number])
        size = self.sounds.lengths[speaker, label]
        start = draw.integers(self.length - size + 1)
        picture = load_digits().images[number] / np.float32(255)
        level = levels[0] if image_noise is None else image_noise
        picture = picture + level * draw.standard_normal(picture.shape)
        level = levels[1] if sound_noise is None else sound_noise
        wave = draw.standard_normal(self.length, np.float32) * np.float32(level * LOUDNESS)
        wave[start : start + size] += self.sounds.waves[speaker, label, :size]
        pixels = (picture.clip(0, 1) * 255).round().astype(np.uint8)
        found = {"image": np.repeat(pixels[:, :, None], 3, axis=2), "sound": wave}
        there = {name: self.training is False or i != gone for i, name in enumerate(MODALITIES)}
        return {
            "inputs": {name: x if there[name] else np.zeros_like(x) for name, x in found.items()},
            "present": {name: np.bool_(here) for name, here in there.items()},
            "labels": self._labels(label),
        }

    def _labels(self, digit: int) -> np.ndarray:
        if not self.config.multi_label:
            return np.array(digit, np.int32)
        return np.array([digit in some for some in PROPERTIES.values()], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class DigitDataset:
    """Training rows by number, and those held out."""

    train: DigitRows
    held: DigitRows
    fingerprint: str
    """A hash that stays while the examples and their order do."""

    tokenizer = None  # there is no text

    @property
    def config(self) -> AudioVisual:
        """What it was opened from."""
        return self.train.config

    def describe(self) -> str:
        """What both sides hold, in a line."""
        sides = {"training": self.train, "held out": self.held}
        return "; ".join(
            f"{name}: {len(side.numbers):,} digits, {len(side.speakers)} speakers"
            for name, side in sides.items()
        )

    def held_batches(
        self, batch_size: int, image_noise: float | None = None, sound_noise: float | None = None
    ) -> Iterator[Batch]:
        """Every held-out image once, heard too; what fills up the last batch has labels of -1.

        With levels of noise given, all rows have those.
        """
        count = len(self.held.numbers)
        for first in range(0, count, batch_size):
            numbers = np.arange(first, first + batch_size)
            given = image_noise, sound_noise
            batch = stacked([self.held.row(min(int(n), count - 1), *given) for n in numbers])
            batch["labels"][numbers >= count] = -1
            yield batch


def open_digits(config: AudioVisual, *, sequence_length: int, seed: int) -> DigitDataset:
    """The digits of a config, sounds in rows of `sequence_length` samples.

    Sounds are made on first use and cached. Raises InputError where an extra is missing, or a word
    is longer than a row.
    """
    sounds = load_sounds(config)
    if (longest := int(sounds.lengths.max())) > sequence_length:
        raise InputError(
            f"sequence_length ({sequence_length}) has no room for the longest word, {longest} "
            f"samples at {RATE} a second: raise it, or speak faster (data.speeds)"
        )
    hashes = np.array([key_hash(f"speaker {one}") for one in config.speakers], np.uint64)
    held = held_out(hashes, config.held_out)
    train, kept = (
        DigitRows(
            config, sounds, digit_numbers(config.held_out, training),
            np.flatnonzero(held != training), sequence_length, seed, training,
        )
        for training in (True, False)
    )  # fmt: skip
    told = dataclasses.replace(config, num_workers=0, cache_dir="")
    facts = [repr(told), sequence_length, seed, sounds.lengths.tolist()]
    return DigitDataset(train, kept, digest(facts))
