"""Images with captions as training rows, and the held-out pairs that retrieval is scored on.

Row i is a pure function of (seed, config, i): which example of its epoch's order, which of its
captions, which view of its image. Groups, not examples, are split into the two sides.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import media
from deepseek_jax.data.augment import Augmentation, augmented, generator
from deepseek_jax.data.corpus import (
    cache_folder,
    cached,
    check_sides,
    digest,
    key_hash,
    side,
)
from deepseek_jax.data.emoji import open_emoji
from deepseek_jax.data.packing import epoch_order, stacked
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
        check_sides(self.held_out, self.num_workers, self.cache_dir)
        if not 0 <= self.max_skipped < 1:
            raise ValueError(f"data.max_skipped ({self.max_skipped}) must lie in [0, 1).")


class Example(NamedTuple):
    """One image and what is said of it."""

    captions: dict[str, tuple[str, ...]]
    """By field, such as a language; at least one."""
    image: Callable[[], np.ndarray]
    """uint8 [H, W, 3], decoded when it is called; InputError where it is damaged."""


class _Emoji:
    """Emoji of a size, as `_Media` has what files hold."""

    def __init__(self, source: Emoji, size: int, cache: pathlib.Path):
        self.given = source, size, cache
        self.found, self.languages = open_emoji(size, cache), source.languages
        self.hashes = np.array([*map(key_hash, self.found.groups)], np.uint64)
        facts = self.found.names, self.found.captions, size, source.languages
        self.fingerprint = digest(facts)

    def __reduce__(self):
        return _Emoji, self.given

    def example(self, number: int) -> Example:
        words = self.found.captions[number]
        captions: dict[str, tuple[str, ...]] = {
            name: (words[name],) for name in self.languages if name in words
        }
        if not captions:
            raise InputError(f"{self.found.names[number]}: has no name in {self.languages}")
        return Example(captions, lambda: np.asarray(self.found.images[number]))


class _Media:
    """Files with captions; what is damaged raises InputError when it is used."""

    def __init__(self, source: media.MediaSource):
        self.media = media.Media(source)
        self.hashes, self.fingerprint = self.media.hashes, self.media.fingerprint

    def __reduce__(self):
        return _Media, (self.media.source,)

    def example(self, number: int) -> Example:
        found = self.media.example(number)
        said = {field: texts for field, texts in found.captions.items() if texts}
        for name, there in (("caption", said), ("image", "image" in found.media)):
            if not there:
                raise InputError(f"{found.name}: there is no {name}")
        return Example(said, lambda: decode_image(found.media["image"], found.name))


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
        numbers = self.numbers[epoch_order(len(self.numbers), self.seed, epoch)]
        return media.usable(numbers, place, functools.partial(self._view, row), self.skips)

    def _view(self, row: int, number: int) -> Batch:
        """An example as row `row` shows it: one of its captions, a view of its image."""
        example, draw = self.examples.example(number), generator(self.seed, row, "caption")
        fields = [*example.captions.values()]
        captions = fields[draw.integers(len(fields))]
        caption = captions[draw.integers(len(captions))]
        transform, kept = self.config.image, self.config.augmentation
        if kept is None:
            pixels = FITS[transform.fit](example.image(), transform)
        else:
            given = self.seed, row, transform.size, kept, transform.method
            pixels = augmented(example.image(), *given)
        tokens = text_row(self.tokenizer, caption, self.length)
        return {"images": pixels, "tokens": tokens, "groups": np.int32(key_hash(caption) >> 33)}


def text_row(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    """[bos] ids [eos] of a text, int32 [length], -1 behind the end; a longer one is cut."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)][: length - 1]
    ids.append(tokenizer.eos_id)
    return np.array([*ids, *[-1] * (length - len(ids))], np.int32)


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
        for name, rows in (("training", self.train), ("held out", self.held)):
            hashes = rows.examples.hashes[rows.numbers]
            groups = len(np.unique(hashes))
            parts.append(f"{name}: {len(hashes):,} images of {groups:,} groups")
        return "; ".join([*parts, f"vocabulary: {self.tokenizer.vocab_size:,}"])

    def held_images(self) -> Iterator[Batch]:
        """The held-out images one by one: `images` uint8 [S, S, 3], `numbers`."""
        for number, (image, _) in self._held(self.picture):
            yield {"images": image, "numbers": np.int32(number)}

    def held_texts(self) -> dict[str, list[Batch]]:
        """By field (a language): every held-out caption's `tokens` [T] and `numbers`."""
        found: dict[str, list[Batch]] = {}
        for number, example in self._held(self.held.examples.example):
            for field, captions in example.captions.items():
                for caption in captions:
                    tokens = text_row(self.tokenizer, caption, self.held.length)
                    row = {"tokens": tokens, "numbers": np.int32(number)}
                    found.setdefault(field, []).append(row)
        return found

    def picture(self, number: int) -> tuple[np.ndarray, dict[str, tuple[str, ...]]]:
        """An example's image as it is evaluated, uint8 [S, S, 3], and its captions by field."""
        example, transform = self.held.examples.example(number), self.held.config.image
        return FITS[transform.fit](example.image(), transform), example.captions

    def _held(self, use: Callable[[int], T]) -> Iterator[tuple[int, T]]:
        """Numbers and use(number) of the held-out examples; damaged ones are counted and named."""
        for number in map(int, self.held.numbers):
            if number not in self.held.skips.reasons:
                try:
                    found = use(number)
                except InputError as error:
                    self.held.skips.add(number, str(error))
                else:
                    yield number, found


def open_pairs(
    config: Pairs, *, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None
) -> PairDataset:
    """The pairs of a config; drawings and a BPE are made on first use and cached.

    `seed` draws the order, the captions and the views. A `tokenizer` (a checkpoint's own) reads the
    captions instead of the config's. Raises InputError when the data cannot be read.
    """
    cache = cache_folder(config.cache_dir)
    examples: _Emoji | _Media
    if isinstance(config.source, Emoji):
        examples = _Emoji(config.source, config.image.size, cache)
    else:
        examples = _Media(config.source)
    sides = [side(examples.hashes, config.held_out, training) for training in (True, False)]
    if tokenizer is None:
        said = captions(examples, sides[0])
        texts = (text for found in said for row in found.values() for text in row)
        facts = ["pairs bpe", examples.fingerprint, sides[0].tolist()]
        tokenizer = fitted_tokenizer(config.tokenizer, texts, facts, cache)
    skips = media.Skips(len(examples.hashes), config.max_skipped)
    train, kept = (
        PairRows(examples, numbers, tokenizer, config, sequence_length, seed, skips)
        for numbers in sides
    )
    order = [examples.fingerprint, config.held_out, sequence_length, seed]
    fingerprint = digest([tokenizer.files(), order, repr(config.augmentation), repr(config.image)])
    return PairDataset(tokenizer, train, kept, fingerprint)


def captions(examples: _Emoji | _Media, numbers: np.ndarray) -> Iterator[dict[str, Any]]:
    """By field what is said of each of these examples, the damaged ones left out."""
    for number in numbers:
        with contextlib.suppress(InputError):  # named and counted when it is trained on
            yield examples.example(int(number)).captions


def fitted_tokenizer(
    config: TokenizerConfig, texts: Iterator[str], facts: list, cache: pathlib.Path
) -> Tokenizer:
    """The config's tokenizer; a BPE is trained on `texts`, which are those that `facts` tell of.

    They are read where no BPE of these facts lies in the cache.
    """
    if not isinstance(config, BPE):
        return open_tokenizer(config)

    def build(directory: pathlib.Path) -> None:
        train_bpe(config, texts).save(directory)

    return cached(cache, [*facts, repr(config)], build, load_tokenizer)
