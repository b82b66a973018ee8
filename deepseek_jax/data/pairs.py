"""Images with captions as training rows, and the held-out pairs that retrieval is scored on.

Row i is a pure function of (seed, config, i): which example of its epoch's order, which of its
captions, which view of its image. Groups, not examples, are split into the two sides.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import in_bucket
from deepseek_jax.data import media
from deepseek_jax.data.augment import Augmentation, augmented, generator
from deepseek_jax.data.corpus import cached, digest, held_out, key_hash
from deepseek_jax.data.emoji import open_emoji
from deepseek_jax.data.tokenizer import (
    BPE,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)
from deepseek_jax.data.vision import FITS, ImageTransform, decode_image

T = TypeVar("T")
Batch = dict[str, Any]  # arrays by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emoji:
    """OpenMoji's drawings with Unicode's names (extra `media`): needs no download."""

    languages: tuple[Literal["en", "zh"], ...] = ("en", "zh")

    def __post_init__(self):
        if not self.languages:
            raise ValueError("data.source.languages must not be empty.")


PairSource: TypeAlias = (
    Emoji | media.MediaFolder | media.MediaShards | media.MediaParquet | media.MediaRecords
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """What two towers are trained and evaluated on: images and their captions."""

    source: PairSource = Emoji()
    tokenizer: TokenizerConfig = BPE(vocab_size=2048)
    image: ImageTransform = ImageTransform(size=64, fit="crop")
    """How an image becomes the image tower's square, and what its pixels are normalized by."""
    augmentation: Augmentation | None = Augmentation()
    """How far a view may stray in training; None: every epoch has the same views."""
    held_out: float = 0.2
    """The share of groups kept for evaluation, by a hash of their names."""
    max_skipped: float = 0.01
    """The share of a source that may be damaged before the run stops."""
    num_workers: int = 0
    """Processes that make batches; 0: a thread of this process."""
    cache_dir: str = ""
    """Where drawings and tokenizer are kept; empty: deepseek_jax in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self):
        if not (0 < self.held_out < 1 and 0 <= self.max_skipped < 1):
            raise ValueError(
                f"data.held_out ({self.held_out}) must lie between 0 and 1, data.max_skipped "
                f"({self.max_skipped}) in [0, 1)."
            )
        if in_bucket(self.cache_dir):
            raise ValueError(f"data.cache_dir ({self.cache_dir}) must be a folder on a disk.")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers ({self.num_workers}) must not be negative.")


class _Emoji:
    """Emoji of a size, as `_Media` has what files hold."""

    def __init__(self, source: Emoji, size: int, cache: pathlib.Path):
        self.given = source, size, cache
        found = open_emoji(size, cache)
        self.hashes = np.array([key_hash(group) for group in found.groups], np.uint64)
        self.found, self.languages = found, source.languages
        self.fingerprint = digest([found.names, found.captions, size, source.languages])

    def __reduce__(self):
        return _Emoji, self.given

    def captions(self, number: int) -> dict[str, tuple[str, ...]]:
        words = self.found.captions[number]
        return {name: (words[name],) for name in self.languages if name in words}

    def image(self, number: int) -> np.ndarray:
        return np.asarray(self.found.images[number])


class _Media:
    """Files with captions; what is damaged raises InputError when it is used."""

    def __init__(self, source: media.MediaSource):
        self.media = media.Media(source)
        self.hashes, self.fingerprint = self.media.hashes, self.media.fingerprint

    def __reduce__(self):
        return _Media, (self.media.source,)

    def captions(self, number: int) -> dict[str, tuple[str, ...]]:
        example = self.media.example(number)
        if not example.captions:
            raise InputError(f"{example.name}: there is no caption")
        return example.captions

    def image(self, number: int) -> np.ndarray:
        example = self.media.example(number)
        if "image" not in example.media:
            raise InputError(f"{example.name}: there is no image")
        return decode_image(example.media["image"], example.name)


@dataclasses.dataclass(frozen=True, eq=False)
class PairRows:
    """Training rows by number."""

    examples: _Emoji | _Media
    numbers: np.ndarray
    """The examples of this side."""
    tokenizer: Tokenizer
    config: Pairs
    length: int
    seed: int
    skips: media.Skips

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows by number [B]: images uint8 [B, S, S, 3], tokens int32 [B, T] (-1 behind the end),
        groups int32 [B]: equal where captions are."""
        return stacked([self._row(int(row)) for row in rows])

    def _row(self, row: int) -> Batch:
        epoch, place = divmod(row, len(self.numbers))
        order = _order(self.seed, epoch, len(self.numbers))
        for step in range(len(order)):  # what is damaged gives its place to the next
            number = int(self.numbers[order[(place + step) % len(order)]])
            if number in self.skips.reasons:
                continue
            try:
                return self._example(number, row)
            except InputError as error:
                self.skips.add(number, str(error))
        raise InputError(f"none of {len(self.numbers)} examples can be used")

    def _example(self, number: int, row: int) -> Batch:
        draw = generator(self.seed, row, "caption")
        fields = [*self.examples.captions(number).values()]
        captions = fields[draw.integers(len(fields))]
        caption = captions[draw.integers(len(captions))]
        pixels, size = self.examples.image(number), self.config.image.size
        if self.config.augmentation is None:
            pixels = FITS[self.config.image.fit](pixels, self.config.image)
        else:
            kept = self.config.augmentation
            pixels = augmented(pixels, self.seed, row, size, kept, self.config.image.method)
        tokens = text_row(self.tokenizer, caption, self.length)
        return {"images": pixels, "tokens": tokens, "groups": np.int32(key_hash(caption) >> 33)}

    def plain(self, number: int) -> np.ndarray:
        """An example's image as it is evaluated: uint8 [S, S, 3]."""
        transform = self.config.image
        return FITS[transform.fit](self.examples.image(number), transform)

    @property
    def num_rows(self) -> int:
        """Examples of this side."""
        return len(self.numbers)


@functools.lru_cache(4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def text_row(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    """[bos] ids [eos] of a text, int32 [length], -1 behind the end; a longer one is cut."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)][: length - 1]
    ids.append(tokenizer.eos_id)
    return np.array([*ids, *[-1] * (length - len(ids))], np.int32)


def stacked(rows: list[Batch]) -> Batch:
    """Rows as one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass(frozen=True, eq=False)
class PairDataset:
    """Training rows by number, and the held-out pairs."""

    tokenizer: Tokenizer
    train: PairRows
    held: PairRows
    fingerprint: str
    """A hash that stays while the tokenizer, the examples and their order do."""

    def describe(self) -> str:
        """What both sides hold, in a line."""
        parts = []
        for name, side in (("training", self.train), ("held out", self.held)):
            hashes = side.examples.hashes[side.numbers]
            groups = len(np.unique(hashes))
            parts.append(f"{name}: {len(hashes):,} images of {groups:,} groups")
        return "; ".join([*parts, f"vocabulary: {self.tokenizer.vocab_size:,}"])

    def held_images(self) -> Iterator[Batch]:
        """The held-out images one by one: `images` uint8 [S, S, 3], `numbers`."""

        def of_one(number: int) -> Batch:
            self.held.examples.captions(number)  # without any, there is nothing to find
            return {"images": self.held.plain(number), "numbers": np.int32(number)}

        yield from self._held(of_one)

    def held_texts(self) -> dict[str, Batch]:
        """By field (a language): every held-out caption's `tokens` [N, T] and `numbers`."""
        found: dict[str, list[Batch]] = {}

        def of_one(number: int) -> tuple[int, dict[str, tuple[str, ...]]]:
            return number, self.held.examples.captions(number)

        for number, fields in self._held(of_one):
            for field, captions in fields.items():
                for caption in captions:
                    tokens = text_row(self.tokenizer, caption, self.held.length)
                    row = {"tokens": tokens, "numbers": np.int32(number)}
                    found.setdefault(field, []).append(row)
        return {field: stacked(rows) for field, rows in found.items()}

    def _held(self, of_one: Callable[[int], T]) -> Iterator[T]:
        """of_one(number) of the held-out examples, damaged ones left out, counted and named."""
        for number in map(int, self.held.numbers):
            if number not in self.held.skips.reasons:
                try:
                    found = of_one(number)
                except InputError as error:
                    self.held.skips.add(number, str(error))
                else:
                    yield found


def open_pairs(
    config: Pairs, *, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None
) -> PairDataset:
    """The pairs of a config; drawings and a BPE are made on first use and cached.

    `seed` draws the order, the captions and the views. A `tokenizer` (a checkpoint's own) reads the
    captions instead of the config's. Raises InputError when the data cannot be read.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = pathlib.Path(config.cache_dir or f"{base}/deepseek_jax").expanduser()
    examples: _Emoji | _Media
    if isinstance(config.source, Emoji):
        examples = _Emoji(config.source, config.image.size, cache)
    else:
        examples = _Media(config.source)
    held = held_out(examples.hashes, config.held_out)
    sides = {"training": np.flatnonzero(~held), "held-out": np.flatnonzero(held)}
    for name, numbers in sides.items():
        if not len(numbers):
            raise InputError(f"the {name} side has no pairs: change data.held_out")
    if tokenizer is None:
        tokenizer = _tokenizer(config.tokenizer, examples, sides["training"], cache)
    skips = media.Skips(len(examples.hashes), config.max_skipped)
    train, kept = (
        PairRows(examples, numbers, tokenizer, config, sequence_length, seed, skips)
        for numbers in sides.values()
    )
    order = [examples.fingerprint, config.held_out, sequence_length, seed]
    fingerprint = digest([tokenizer.files(), order, repr(config.augmentation), repr(config.image)])
    return PairDataset(tokenizer, train, kept, fingerprint)


def _tokenizer(
    config: TokenizerConfig, examples: Any, numbers: np.ndarray, cache: pathlib.Path
) -> Tokenizer:
    """The config's tokenizer; a BPE is trained on the training side's captions."""
    if not isinstance(config, BPE):
        return open_tokenizer(config)

    def captions() -> Iterator[str]:
        for number in numbers:
            try:
                for texts in examples.captions(int(number)).values():
                    yield from texts
            except InputError:  # named and counted when it is trained on
                continue

    def build(directory: pathlib.Path) -> None:
        train_bpe(config, captions()).save(directory)

    facts = ["pairs bpe", config.vocab_size, examples.fingerprint, numbers.tolist()]
    return cached(cache, facts, build, load_tokenizer)
