"""Speech as training rows: a wave, how much of it is real, and the characters that it says.

Row i is a pure function of (seed, config, i): which example of its epoch's order, which voice or
which stretch of it. What cannot be used is named, counted and replaced, as in data/pairs.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import media
from deepseek_jax.data.audio import RATES, centered_crop, decoded_wave, random_crop
from deepseek_jax.data.augment import generator
from deepseek_jax.data.corpus import check_sides, digest, held_out, key_hash
from deepseek_jax.data.packing import epoch_order, stacked
from deepseek_jax.data.sources import reported
from deepseek_jax.data.speech import PITCHES, SPEEDS, spoken
from deepseek_jax.data.tokenizer import Characters, Tokenizer, character_tokenizer

Batch = dict[str, Any]  # arrays by name
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_ROWS = 1 << 30  # held-out rows are numbered from here on: their masks are no training row's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spoken:
    """Texts of some words, read aloud by eSpeak NG (extra `speech`): needs no download."""

    words: tuple[str, ...] = DIGITS
    length: tuple[int, int] = (1, 3)
    """The fewest and most words of a text."""
    count: int = 1000
    """Texts, all different; as many as there are where they are fewer."""
    voices: tuple[str, ...] = ("en-us+m1", "en-us+m3", "en-us+f2", "en-us+f4")
    speeds: tuple[int, int] = (150, 200)
    """Words a minute, drawn anew for every row."""
    pitches: tuple[int, int] = (30, 70)

    def __post_init__(self):
        if not (self.words and self.voices and self.count > 1 and self.length[0] >= 1):
            raise ValueError(
                f"data.source needs words, voices, a count ({self.count}) above 1 and texts of at "
                f"least one word (length is {self.length})."
            )
        for name, span, (low, high) in (
            ("length", self.length, (1, 1000)),
            ("speeds", self.speeds, SPEEDS),
            ("pitches", self.pitches, PITCHES),
        ):
            if not low <= span[0] <= span[1] <= high:
                raise ValueError(
                    f"data.source.{name} is {span}; it must ascend from {low} to {high}."
                )


UtteranceSource: TypeAlias = (
    Spoken | media.MediaFolder | media.MediaShards | media.MediaParquet | media.MediaRecords
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utterances:
    """What a speech encoder is trained and evaluated on."""

    source: UtteranceSource = Spoken()
    """Sides share no group: of Spoken a text is one; files may name a field (group="text")."""
    texts: bool = True
    """Whether what is said is needed, as CTC does; without, long sound is cropped, not refused."""
    alphabet: str = "abcdefghijklmnopqrstuvwxyz'"
    """Characters that texts are written in, beside the space."""
    vocabulary: str = ""
    """Instead: the vocab.json of a wav2vec 2.0 folder that is tuned further."""
    rate: int = 16_000
    """Samples a second that the model hears; files of other rates are resampled."""
    min_seconds: float = 0.25
    """Shorter sound is refused."""
    max_characters: int = 256
    """Longer texts are refused."""
    normalize: bool = True
    """Whether each wave gets mean 0 and deviation 1, as HF's `do_normalize` does."""
    held_out: float = 0.1
    """The share of groups kept for evaluation, by a hash of their names."""
    max_skipped: float = 0.01
    """The share of a source that may be unusable before the run stops."""
    num_workers: int = 0
    """Processes that make batches; 0: a thread of this process."""

    def __post_init__(self):
        check_sides(self.held_out, self.num_workers, "")
        if not 0 <= self.max_skipped < 1:
            raise ValueError(f"data.max_skipped ({self.max_skipped}) must lie in [0, 1).")
        if not RATES[0] <= self.rate <= RATES[1]:
            raise ValueError(f"data.rate ({self.rate}) must lie from {RATES[0]} to {RATES[1]}.")
        if self.max_characters < 1 or not self.min_seconds > 0:
            raise ValueError(
                f"data.max_characters ({self.max_characters}) must be at least 1, min_seconds "
                f"({self.min_seconds}) above 0."
            )
        if "|" in self.alphabet or any(sign.isspace() for sign in self.alphabet):
            raise ValueError("data.alphabet must not have | or spaces: a space is always there.")

    @property
    def least_samples(self) -> int:
        """What the shortest wave has."""
        return max(1, math.ceil(self.min_seconds * self.rate))


class Utterance(NamedTuple):
    """A sound and what it says."""

    name: str
    text: str | None
    wave: Callable[[], np.ndarray]
    """float32 [T], made when it is called; InputError where it is damaged."""


class _Spoken:
    """Texts to be read aloud, as `_Media` has what files hold."""

    def __init__(self, source: Spoken, rate: int):
        self.given = source, rate
        self.source, self.rate = source, rate
        low, high = source.length
        total = sum(len(source.words) ** n for n in range(low, high + 1))
        if total <= source.count:
            spans = (itertools.product(source.words, repeat=n) for n in range(low, high + 1))
            texts = [" ".join(words) for span in spans for words in span]
        else:
            draw, found = np.random.default_rng(0), dict[str, None]()
            for _ in range(50 * source.count):  # words may be alike
                if len(found) == source.count:
                    break
                picked = draw.integers(len(source.words), size=draw.integers(low, high + 1))
                found[" ".join(source.words[i] for i in picked)] = None
            texts = [*found]
        self.texts = [*dict.fromkeys(texts)]
        self.hashes = np.array([*map(key_hash, self.texts)], np.uint64)
        self.fingerprint = digest([repr(source), rate])

    def __reduce__(self):
        return _Spoken, self.given

    def example(self, number: int, draw: np.random.Generator) -> Utterance:
        """The text in a voice that is drawn."""
        source, text = self.source, self.texts[number]
        voice = source.voices[draw.integers(len(source.voices))]
        speed, pitch = (
            int(draw.integers(low, high + 1)) for low, high in (source.speeds, source.pitches)
        )
        return Utterance(repr(text), text, lambda: spoken(text, voice, speed, pitch, self.rate))


class _Media:
    """Files with sound; what is damaged raises InputError when it is used."""

    def __init__(self, source: media.MediaSource, rate: int):
        self.media, self.rate = media.Media(source), rate
        self.hashes, self.fingerprint = self.media.hashes, digest([self.media.fingerprint, rate])

    def __reduce__(self):
        return _Media, (self.media.source, self.rate)

    def example(self, number: int, draw: np.random.Generator) -> Utterance:
        """The sound, and one of its captions, drawn."""
        found = self.media.example(number)
        if "audio" not in found.media:
            held = ", ".join(found.media) or "nothing"
            raise InputError(f"{found.name}: there is no sound, which is what is heard, but {held}")
        said = [text for texts in found.captions.values() for text in texts]
        text = said[draw.integers(len(said))] if said else None
        return Utterance(
            found.name, text, lambda: decoded_wave(found.media["audio"], found.name, self.rate)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class UtteranceRows:
    """Rows by number."""

    examples: _Spoken | _Media
    numbers: np.ndarray
    """The examples of this side."""
    tokenizer: Tokenizer
    config: Utterances
    length: int
    """Samples of a row."""
    seed: int
    skips: media.Skips

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows by number [B]: wave float32 [B, T] with `counts` [B] real samples, labels int32
        [B, U] (-1 behind the end), rows int32 [B]: their numbers."""
        return stacked([self._row(int(row)) for row in rows])

    def _row(self, row: int) -> Batch:
        epoch, place = divmod(row, len(self.numbers))
        numbers = self.numbers[epoch_order(len(self.numbers), self.seed, epoch)]
        return media.usable(numbers, place, functools.partial(self.view, row), self.skips)

    def view(self, row: int, number: int, still: bool = False) -> Batch:
        """An example as row `row` hears it; `still`: cropped in its middle, to be evaluated."""
        draw = generator(self.seed, row, "utterance")
        found = self.examples.example(number, draw)
        labels = np.full(self.config.max_characters, -1, np.int32)
        if self.config.texts:
            ids = self._ids(found)
            labels[: len(ids)] = ids
        wave = found.wave()
        if len(wave) < self.config.least_samples:
            seconds = len(wave) / self.config.rate
            least = f"data.min_seconds = {self.config.min_seconds:g}"
            raise InputError(f"{found.name}: {seconds:.3f} seconds long, less than {least}")
        if len(wave) > self.length:
            if self.config.texts:
                raise InputError(
                    f"{found.name}: {len(wave)} samples long, more than sequence_length = "
                    f"{self.length}, and sound with a text is not cropped"
                )
            cut = centered_crop if still else random_crop
            wave = cut(wave, self.length, *(() if still else (self.seed, row)))
        count = len(wave)
        wave = standardized(wave) if self.config.normalize else wave
        wave = np.pad(wave, (0, self.length - count))
        counts, own = np.int32(count), np.int32(row % (1 << 31))
        return {"wave": wave, "counts": counts, "labels": labels, "rows": own}

    def _ids(self, found: Utterance) -> list[int]:
        if found.text is None:
            raise InputError(f"{found.name}: there is no caption: nothing says what is said")
        try:
            ids = self.tokenizer.encode(found.text)
        except InputError as error:
            raise InputError(f"{found.name}: {error}") from None
        most = self.config.max_characters
        if not 1 <= len(ids) <= most:
            raise InputError(f"{found.name}: a text of {len(ids)} characters; 1 to {most} are read")
        return ids


def standardized(wave: np.ndarray) -> np.ndarray:
    """A wave [T] with mean 0 and deviation 1, float32; silence stays silent."""
    wave = np.asarray(wave, np.float32)
    return ((wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class UtteranceDataset:
    """Training rows by number, and the held-out utterances."""

    tokenizer: Tokenizer
    train: UtteranceRows
    held: UtteranceRows
    fingerprint: str
    """A hash that stays while the tokenizer, the examples and their order do."""

    def describe(self) -> str:
        """What both sides hold, in a line."""
        parts = []
        for name, side in (("training", self.train), ("held out", self.held)):
            hashes = side.examples.hashes[side.numbers]
            groups = len(np.unique(hashes))
            parts.append(f"{name}: {len(hashes):,} utterances of {groups:,} groups")
        return "; ".join([*parts, f"vocabulary: {self.tokenizer.vocab_size:,}"])

    def held_batches(self, batch_size: int) -> Iterator[tuple[Batch, int]]:
        """Batches of the held-out utterances, and how many rows of each are real: the last one's
        others are repeated, with `counts` 0. InputError where none can be used."""
        rows, some = self._held(), False
        while own := [*itertools.islice(rows, batch_size)]:
            some = True
            filler = own[-1] | {"counts": np.int32(0)}
            yield stacked(own + [filler] * (batch_size - len(own))), len(own)
        if not some:
            raise InputError("nothing that was held out can be used")

    def _held(self) -> Iterator[Batch]:
        for number in map(int, self.held.numbers):
            if number not in self.held.skips.reasons:
                try:
                    yield self.held.view(HELD_ROWS + number, number, still=True)
                except InputError as error:
                    self.held.skips.add(number, str(error))


def open_utterances(
    config: Utterances, *, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None
) -> UtteranceDataset:
    """The utterances of a config, in rows of `sequence_length` samples.

    `seed` draws the order, the voices and the crops. A `tokenizer` (a checkpoint's own) reads the
    texts instead of the config's. Raises InputError when the data cannot be read.
    """
    examples: _Spoken | _Media
    if isinstance(config.source, Spoken):
        examples = _Spoken(config.source, config.rate)
    else:
        examples = _Media(config.source, config.rate)
    if tokenizer is None:
        tokenizer = open_alphabet(config)
    held = held_out(examples.hashes, config.held_out)
    sides = [np.flatnonzero(held == side) for side in (False, True)]  # neither is empty
    skips = media.Skips(len(examples.hashes), config.max_skipped)
    train, kept = (
        UtteranceRows(examples, numbers, tokenizer, config, sequence_length, own, skips)
        for numbers, own in zip(sides, (seed, 0), strict=True)
    )
    still = dataclasses.replace(config, source=Spoken(), max_skipped=0.0, num_workers=0)
    order = [examples.fingerprint, sequence_length, seed, repr(still)]
    return UtteranceDataset(tokenizer, train, kept, digest([tokenizer.files(), order]))


def open_alphabet(config: Utterances) -> Characters:
    """The tokenizer of a config; InputError where its file is no good."""
    if not config.vocabulary:
        return character_tokenizer(config.alphabet)
    file = pathlib.Path(config.vocabulary).expanduser()
    file = file / Characters.file if file.is_dir() else file
    with reported(str(file)):
        return Characters(file.read_bytes(), str(file))
