"""Rows of conversations about pictures, and of text, for decoders that see.

Row i is a pure function of (seed, config, i): its part of the mixture, the example of that part's
epoch, what is asked of it, how its picture is varied. A conversation is a row, filled up with
padding; only its answers' tokens are targets with a weight. Rows of text are packed as in
data/packing, and all of their tokens are learned.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import located
from deepseek_jax.data import media, sources
from deepseek_jax.data.augment import (
    Augmentation,
    color_jitter,
    generator,
    random_crop,
    random_flip,
)
from deepseek_jax.data.conversations import (
    MARK,
    MARKS,
    Dialog,
    EmojiQuestions,
    EmojiTalks,
    Files,
    FileTalks,
    Talk,
    written,
)
from deepseek_jax.data.corpus import (
    SAMPLE,
    cache_folder,
    cached,
    check_sides,
    digest,
    held_out,
    key_hash,
    open_corpus,
)
from deepseek_jax.data.packing import Batch, Mixed, Rows, drawn_order
from deepseek_jax.data.tiles import MAX_TILES, TEXT, Sight, tiled
from deepseek_jax.data.tokenizer import (
    BPE,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)
from deepseek_jax.data.vision import FITS, ImageTransform, Normalization

SeeingSource: TypeAlias = EmojiQuestions | Files | sources.Plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeeingPart(sources.Weighted):
    """Conversations, or text, and their share of the training rows."""

    source: SeeingSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeing:
    """What a decoder that sees is trained and evaluated on."""

    parts: tuple[SeeingPart, ...] = (SeeingPart(source=EmojiQuestions()),)
    tokenizer: TokenizerConfig = BPE(vocab_size=2048)
    """A BPE is trained on the training side, with a token <image>; others must have one."""
    dialog: Dialog = Dialog()
    views: int = 1
    """Of every row, used or not: one an image, or each image's whole and its tiles."""
    size: int | None = None
    """Pixels along a view's side, where positions are to be resized; None: the model's own."""
    normalization: Normalization = "half"
    augmentation: Augmentation | None = None
    """How far pictures may stray in training."""
    held_out: float = 0.2
    """The share of groups (of documents) kept for evaluation, by a hash of their names."""
    eval_rows: int | None = None
    """At most this many held-out conversations of a part are scored; None: all."""
    max_skipped: float = 0.01
    """The share of a source that may be damaged, or too long, before the run stops."""
    num_workers: int = 0
    """Processes that make batches; 0: a thread of this process."""
    cache_dir: str = ""
    """Where drawings and tokens are kept; empty: deepseek_jax in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self):
        check_sides(self.held_out, self.num_workers, self.cache_dir)
        asked = 1 if self.eval_rows is None else self.eval_rows
        if self.views < 1 or asked < 1 or not 0 <= self.max_skipped < 1:
            raise ValueError(
                f"data.views ({self.views}) and eval_rows ({self.eval_rows}) must be at least 1, "
                f"max_skipped ({self.max_skipped}) in [0, 1)."
            )
        if all(isinstance(part.source, sources.Plain) for part in self.parts):
            raise ValueError("data.parts must hold a source of conversations.")
        sources.check_weights(self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
    """One side of a source of conversations as rows by number."""

    talks: EmojiTalks | FileTalks
    numbers: np.ndarray
    """The examples of this side."""
    tokenizer: Tokenizer
    image_id: int
    sight: Sight
    config: Seeing
    length: int
    seed: int
    skips: media.Skips

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows by number [B], as `row` makes each."""
        rows = [self._drawn(int(number)) for number in numbers]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _drawn(self, row: int) -> Batch:
        epoch, place = divmod(row, len(self.numbers))
        numbers = self.numbers[_order(len(self.numbers), self.seed, epoch)]
        for step in range(len(numbers)):
            number = int(numbers[(place + step) % len(numbers)])
            try:  # also what was skipped before: whether there is room depends on the row
                return self._shown(row, number)
            except InputError as error:
                self.skips.add(number, str(error))
        raise InputError(f"none of {len(numbers)} conversations can be used")

    def _shown(self, row: int, number: int) -> Batch:
        draw = generator(self.seed, row, "talk")
        talks = self.talks.talks(number, draw)
        return self.row(talks[draw.integers(len(talks))], row)

    def row(self, talk: Talk, number: int | None = None) -> Batch:
        """A conversation as a row: with a number its pictures are varied, as that row's are.

        tokens, segments, positions, sources int32 [T], targets and weights [T, 1], images uint8
        [M, S, S, 3]. InputError where a picture is damaged or there is no room for it all.
        """
        pictures = [image() for image in talk.images]
        kept = self.config.augmentation
        if kept and number is not None:
            for change in (random_crop, random_flip, color_jitter):
                pictures = [change(x, self.seed, number, kept) for x in pictures]
        images, grids = self._views(pictures, talk.name)
        ids, origins, answers = written(
            talk, self.config.dialog, self.tokenizer, self.image_id, self.sight, grids
        )
        count, length = len(ids) - 1, self.length
        if count > length:
            begins = f"{talk.turns[0][1]!r:.60}"
            room = f"no room in {length} for a conversation of {count} tokens"
            raise InputError(f"{talk.name}: {room}: {begins}")

        def filled(values: list, empty: int = 0) -> np.ndarray:
            return np.array(values + [empty] * (length - count), np.int32)

        return {
            "tokens": filled(ids[:-1]),
            "targets": filled(ids[1:])[:, None],
            "weights": filled(answers[1:])[:, None].astype(np.float32),
            "segments": filled([1] * count),
            "positions": filled([*range(count)]),
            "sources": filled(origins[:-1], TEXT),
            "images": images,
        }

    def _views(
        self, pictures: list[np.ndarray], name: str
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The row's views uint8 [M, S, S, 3] and each image's grid."""
        sight, room, count = self.sight, self.config.views, len(pictures)
        size, way = sight.size, self.config.normalization
        if count * sight.num_views() > room:
            raise InputError(f"{name}: {count} images, and data.views is {room}")
        found, grids = np.zeros((room, size, size, 3), np.uint8), [(1, 1)] * count
        if sight.side is None:
            fit = ImageTransform(size=size, fit="pad", normalization=way)
            made = [FITS["pad"](picture, fit)[None] for picture in pictures]
        else:
            most = min(MAX_TILES, room // max(1, count) - 1)
            cut = [
                tiled(x, num_images=count, tile=size, max_tiles=most, normalization=way)
                for x in pictures
            ]
            made, grids = [one.views for one in cut], [one.grid for one in cut]
        if made:
            views = np.concatenate(made)
            found[: len(views)] = views
        return found, grids


@functools.lru_cache(8)
def _order(count: int, *key: int) -> np.ndarray:
    return drawn_order(count, *key)


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Packed text as rows of a batch with images, of which they have none."""

    rows: Rows
    views: int
    size: int

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows by ascending number [B]."""
        found = self.rows.batch(numbers)
        images = np.zeros((len(numbers), self.views, self.size, self.size, 3), np.uint8)
        return found | {"images": images, "sources": np.full_like(found["tokens"], TEXT)}


@dataclasses.dataclass(frozen=True, eq=False)
class SeeingDataset:
    """Training rows by number, and the held-out conversations."""

    tokenizer: Tokenizer
    train: Mixed
    held: list[Conversations]
    fingerprint: str
    """A hash that stays while the tokenizer, the examples and their order do."""

    def describe(self) -> str:
        """What both sides hold, in a line."""
        said = []
        for rows in self.train.rows:
            if isinstance(rows, Conversations):
                said.append(f"{len(rows.numbers):,} conversations")
            else:
                said.append(f"{rows.rows.num_tokens:,} tokens of text")
        held = sum(len(rows.numbers) for rows in self.held)
        return (
            f"training: {', '.join(said)}; held out: {held:,} conversations; "
            f"vocabulary: {self.tokenizer.vocab_size:,}"
        )

    def held_rows(self) -> Iterator[tuple[Talk, Batch]]:
        """The held-out conversations with their rows; damaged ones are counted and named."""
        for side in self.held:
            yield from itertools.islice(_usable(side), side.config.eval_rows)


def _usable(side: Conversations) -> Iterator[tuple[Talk, Batch]]:
    for number in map(int, side.numbers):
        try:
            found = [(talk, side.row(talk)) for talk in side.talks.talks(number, None)]
        except InputError as error:
            side.skips.add(number, str(error))
        else:
            yield from found


def image_token(tokenizer: Tokenizer | None, image_id: int | None) -> int:
    """The token that stands for images: as the model says, or by its usual names."""
    if image_id is not None:
        return image_id
    found = [tokenizer.token_id(name) for name in MARKS] if tokenizer else []
    if not (known := [number for number in found if number is not None]):
        raise InputError(
            "neither the model's config nor a tokenizer says which token is an image's"
        )
    return known[0]


def open_seeing(
    config: Seeing,
    *,
    sight: Sight,
    image_id: int | None,
    sequence_length: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
) -> SeeingDataset:
    """The rows of a config for a model that sees so; drawings and a BPE are made once and cached.

    A `tokenizer` (a checkpoint's own) reads the texts instead of the config's. Raises InputError
    when the data cannot be read, or nothing says which token stands for images.
    """
    cache = cache_folder(config.cache_dir)
    opened: list[Any] = [_opened(part.source, sight.size, cache) for part in config.parts]
    if tokenizer is None:
        tokenizer = _tokenizer(config, opened, cache)
    token = image_token(tokenizer, image_id)
    training: list[Any] = []
    held: list[Conversations] = []
    facts: list[Any] = []
    for number, (part, source) in enumerate(zip(config.parts, opened, strict=True)):
        if isinstance(source, EmojiTalks | FileTalks):
            out = held_out(source.hashes, config.held_out)
            skips = media.Skips(len(out), config.max_skipped)
            for side, kept in ((training, ~out), (held, out)):
                numbers, given = np.flatnonzero(kept), (tokenizer, token, sight, config)
                side.append(
                    Conversations(source, numbers, *given, sequence_length, seed + number, skips)
                )
        else:
            with sources.reported(f"{cache} (--data.cache-dir)"):
                if isinstance(source, sources.Records):
                    _check_records(source, tokenizer)
                source = open_corpus(source, tokenizer, cache)
            rows = Rows(source, config.held_out, sequence_length, 1, seed + number)
            training.append(Texts(rows, config.views, sight.size))
        facts.append([source.fingerprint, part.weight, part.schedule])
    changes = repr((config.augmentation, config.dialog, config.views, config.normalization, sight))
    order = [facts, config.held_out, sequence_length, seed, token, changes]
    mixed = Mixed(training, config.parts, seed)
    return SeeingDataset(tokenizer, mixed, held, digest([tokenizer.files(), order]))


def _check_records(source: sources.Records, tokenizer: Tokenizer) -> None:
    prepared = load_tokenizer(located(source.path).expanduser() / "tokenizer")
    if prepared.files() != tokenizer.files():
        raise InputError(f"{source.path}: prepared with another tokenizer than this run's")


def _opened(source: SeeingSource, size: int, cache: pathlib.Path) -> Any:
    if isinstance(source, EmojiQuestions):
        return EmojiTalks(source, size, cache)
    return FileTalks(source) if isinstance(source, Files) else source


def _tokenizer(config: Seeing, opened: list[Any], cache: pathlib.Path) -> Tokenizer:
    """The config's tokenizer; a BPE is trained on what the training sides say."""
    if not isinstance(bpe := config.tokenizer, BPE):
        return open_tokenizer(bpe)

    def texts() -> Iterator[str]:
        for source in opened:
            if isinstance(source, EmojiTalks | FileTalks):
                yield from _said(source, config)
            else:
                yield from _documents(source, config.held_out)

    def build(directory: pathlib.Path) -> None:
        train_bpe(bpe, texts(), [MARK]).save(directory)

    prints = [getattr(x, "fingerprint", None) or sources.fingerprint(x) for x in opened]
    facts = ["conversations bpe", repr(bpe), config.held_out, prints]
    return cached(cache, [*facts, repr(config.dialog)], build, load_tokenizer)


def _said(source: EmojiTalks | FileTalks, config: Seeing) -> Iterator[str]:
    d = config.dialog
    for number in np.flatnonzero(~held_out(source.hashes, config.held_out)):
        try:
            talks = source.talks(int(number), generator(0, int(number), "texts"))
        except InputError:  # named and counted when it is trained on
            continue
        for talk in talks:
            for role, text in talk.turns:
                before = {"user": d.user, "assistant": d.assistant}.get(role, "")
                behind = "" if role == "assistant" else d.end
                yield from f"{before} {text}{behind}".split(MARK)


def _documents(source: sources.Plain, fraction: float) -> Iterator[str]:
    """About SAMPLE bytes of what is trained on."""
    size, limit = 0, int(fraction * 2.0**64)
    for document in sources.documents(source):
        if key_hash(document.key) >= limit:
            yield document.text
            size += len(document.text.encode())
            if size > SAMPLE:
                return
