"""Rows of conversations about media, and of text, for decoders that see and may hear.

Row i is a pure function of (seed, config, i): its part of the mixture, the example of that part's
epoch, what is asked of it, how its pictures are varied. A conversation is a row, filled up with
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
from deepseek_jax.data.audio import Windows
from deepseek_jax.data.augment import Augmentation, generator, varied
from deepseek_jax.data.conversations import (
    KINDS,
    Dialog,
    EmojiQuestions,
    EmojiTalks,
    Files,
    FileTalks,
    Kind,
    Place,
    Talk,
    medium_token,
    said,
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
from deepseek_jax.data.questions import (
    MovingQuestions,
    MovingTalks,
    SpokenQuestions,
    SpokenTalks,
)
from deepseek_jax.data.senses import Senses
from deepseek_jax.data.tiles import TEXT, Budget, Sight
from deepseek_jax.data.tokenizer import (
    BPE,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)
from deepseek_jax.data.vision import Normalization

Questions: TypeAlias = EmojiQuestions | SpokenQuestions | MovingQuestions | Files
SeeingSource: TypeAlias = Questions | sources.Plain
Talks: TypeAlias = EmojiTalks | SpokenTalks | MovingTalks | FileTalks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeeingPart(sources.Weighted):
    """Conversations, or text, and their share of the training rows."""

    source: SeeingSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeing:
    """What a decoder that sees, and may hear, is trained and evaluated on."""

    parts: tuple[SeeingPart, ...] = (SeeingPart(source=EmojiQuestions()),)
    tokenizer: TokenizerConfig = BPE(vocab_size=2048)
    """A BPE is trained on the training side, with a token for each kind of medium (<image>) that
    there is room for; others must have them."""
    dialog: Dialog = Dialog()
    views: int = 1
    """Of every row, used or not: one an image, or each image's whole and its tiles, and one a frame
    of a film."""
    size: int | None = None
    """Pixels along a view's side, where positions are to be resized, or of a NaFlex along that of
    the largest square, which is its budget of patches; None: the model's own."""
    frames: int = 0
    """That are taken of a film; 0: there are no films."""
    windows: int = 0
    """Of sound, of every row, used or not, each as long as the model's ear hears at once; 0: there
    are no sounds."""
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
        if min(self.frames, self.windows) < 0 or self.frames > self.views:
            raise ValueError(
                f"data.frames ({self.frames}) and windows ({self.windows}) must be at least 0, and "
                f"the frames have room in data.views ({self.views})."
            )
        found = [part.source for part in self.parts]
        if all(isinstance(source, sources.Plain) for source in found):
            raise ValueError("data.parts must hold a source of conversations.")
        for kind, field in ((SpokenQuestions, "windows"), (MovingQuestions, "frames")):
            if any(isinstance(source, kind) for source in found) and not getattr(self, field):
                raise ValueError(f"data.{field} is 0: there is no room for {kind.__name__}.")
        sources.check_weights(self.parts)

    def senses(self, sight: Sight | Budget, hearing: Windows | None) -> Senses:
        """What a row brings to a model that sees and hears so."""
        return Senses(sight, hearing, self.views, self.windows, self.normalization)


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
    """One side of a source of conversations as rows by number."""

    talks: Talks
    numbers: np.ndarray
    """The examples of this side."""
    tokenizer: Tokenizer
    tokens: dict[Kind, int]
    """Those that stand for media, by kind."""
    senses: Senses
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
        return media.usable(numbers, place, functools.partial(self._shown, row), self.skips)

    def _shown(self, row: int, number: int) -> Batch:
        draw = generator(self.seed, row, "talk")
        talks = self.talks.talks(number, draw)
        return self.row(talks[draw.integers(len(talks))], row)

    def row(self, talk: Talk, number: int | None = None) -> Batch:
        """A conversation as a row: with a number its pictures are varied, as that row's are.

        tokens, segments, positions, sources int32 [T], targets and weights [T, 1], and the arrays
        of `Senses.shapes`. InputError where a medium is damaged, or there is no room for it all.
        """
        kinds, begins = [one.kind for one in talk.media], f"{talk.turns[0][1]!r:.60}"
        try:  # what is damaged names itself
            self.senses.check(kinds, self.config.frames)
        except InputError as error:
            raise InputError(f"{talk.name}: {error}: {begins}") from None
        read = [(one.kind, one.read()) for one in talk.media]
        if (kept := self.config.augmentation) and number is not None:
            read = [(kind, _varied(kind, x, self.seed, number, kept)) for kind, x in read]
        try:
            arrays, layouts = self.senses.taken(read)
        except InputError as error:
            raise InputError(f"{talk.name}: {error}: {begins}") from None
        places = [Place(self.tokens[kind], x) for kind, x in zip(kinds, layouts, strict=True)]
        ids, origins, answers = written(talk, self.config.dialog, self.tokenizer, places)
        count, length = len(ids) - 1, self.length
        if count > length:
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
            **arrays,
        }


def _varied(kind: Kind, medium: np.ndarray, *how: Any) -> np.ndarray:
    """A medium as (seed, row, augmentation) say, a film's frames alike."""
    if kind == "audio":
        return medium
    frames = varied([*medium] if kind == "video" else [medium], *how)
    return np.stack(frames) if kind == "video" else frames[0]


@functools.lru_cache(8)
def _order(count: int, *key: int) -> np.ndarray:
    return drawn_order(count, *key)


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Packed text as rows of a batch with media, of which they have none."""

    rows: Rows
    senses: Senses

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows by ascending number [B]."""
        found, count = self.rows.batch(numbers), len(numbers)
        media = {name: np.stack([x] * count) for name, x in self.senses.nothing().items()}
        return found | media | {"sources": np.full_like(found["tokens"], TEXT)}


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


def open_seeing(
    config: Seeing,
    *,
    sight: Sight | Budget,
    image_id: int | None,
    sequence_length: int,
    seed: int,
    hearing: Windows | None = None,
    audio_id: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> SeeingDataset:
    """The rows of a config for a model that sees and hears so; drawings and a BPE are cached.

    A `tokenizer` (a checkpoint's own) reads the texts instead of the config's. Raises InputError
    when the data cannot be read, nothing says which token stands for images or sounds, or there
    are `windows` for a model that does not hear.
    """
    if config.windows and hearing is None:
        raise InputError(f"data.windows is {config.windows}, and this model has no ear")
    cache = cache_folder(config.cache_dir)
    senses = config.senses(sight, hearing)
    opened: list[Any] = [_opened(part.source, senses, config, cache) for part in config.parts]
    if tokenizer is None:
        tokenizer = _tokenizer(config, opened, cache)
    image = medium_token("image", tokenizer, image_id)
    tokens: dict[Kind, int] = {"image": image, "video": image}  # a film's frames are images
    if config.windows:
        tokens["audio"] = medium_token("audio", tokenizer, audio_id)
    training: list[Any] = []
    held: list[Conversations] = []
    facts: list[Any] = []
    for number, (part, source) in enumerate(zip(config.parts, opened, strict=True)):
        if isinstance(source, Talks):
            out = held_out(source.hashes, config.held_out)
            skips = media.Skips(len(out), config.max_skipped)
            for side, kept in ((training, ~out), (held, out)):
                numbers, given = np.flatnonzero(kept), (tokenizer, tokens, senses, config)
                side.append(
                    Conversations(source, numbers, *given, sequence_length, seed + number, skips)
                )
        else:
            with sources.reported(f"{cache} (--data.cache-dir)"):
                if isinstance(source, sources.Records):
                    _check_records(source, tokenizer)
                source = open_corpus(source, tokenizer, cache)
            rows = Rows(source, config.held_out, sequence_length, 1, seed + number)
            training.append(Texts(rows, senses))
        facts.append([source.fingerprint, part.weight, part.schedule])
    changes = repr((config.augmentation, config.dialog, config.views, config.normalization, sight))
    order = [facts, config.held_out, sequence_length, seed, image, changes]
    if config.windows or config.frames:
        order.append(repr((config.frames, config.windows, hearing, tokens)))
    mixed = Mixed(training, config.parts, seed)
    return SeeingDataset(tokenizer, mixed, held, digest([tokenizer.files(), order]))


def _check_records(source: sources.Records, tokenizer: Tokenizer) -> None:
    prepared = load_tokenizer(located(source.path).expanduser() / "tokenizer")
    if prepared.files() != tokenizer.files():
        raise InputError(f"{source.path}: prepared with another tokenizer than this run's")


def _opened(source: SeeingSource, senses: Senses, config: Seeing, cache: pathlib.Path) -> Any:
    size, frames = senses.sight.size, config.frames
    rate = senses.ear.rate if senses.ear else 0
    match source:
        case EmojiQuestions():
            return EmojiTalks(source, size, cache)
        case SpokenQuestions():
            return SpokenTalks(source, rate)
        case MovingQuestions():
            return MovingTalks(source, frames, size)
        case media.MediaFolder() | media.MediaShards() | media.MediaParquet():
            return FileTalks(source, frames, rate)
    return source


def _tokenizer(config: Seeing, opened: list[Any], cache: pathlib.Path) -> Tokenizer:
    """The config's tokenizer; a BPE is trained on what the training sides say."""
    if not isinstance(bpe := config.tokenizer, BPE):
        return open_tokenizer(bpe)

    def texts() -> Iterator[str]:
        for source in opened:
            if isinstance(source, Talks):
                yield from _said(source, config)
            else:
                yield from _documents(source, config.held_out)

    def build(directory: pathlib.Path) -> None:
        train_bpe(bpe, texts(), marks).save(directory)

    rooms = {"image": config.views, "video": config.frames, "audio": config.windows}
    marks = [mark for mark, kind in KINDS.items() if rooms[kind]]
    prints = [getattr(x, "fingerprint", None) or sources.fingerprint(x) for x in opened]
    facts = ["conversations bpe", repr(bpe), config.held_out, prints, *marks[1:]]
    return cached(cache, [*facts, repr(config.dialog)], build, load_tokenizer)


def _said(source: Talks, config: Seeing) -> Iterator[str]:
    for number in np.flatnonzero(~held_out(source.hashes, config.held_out)):
        try:
            talks = source.talks(int(number), generator(0, int(number), "texts"))
        except InputError:  # named and counted when it is trained on
            continue
        for talk in talks:
            yield from said(talk, config.dialog)


def _documents(source: sources.Plain, fraction: float) -> Iterator[str]:
    """About SAMPLE bytes of what is trained on."""
    size, limit = 0, int(fraction * 2.0**64)
    for document in sources.documents(source):
        if key_hash(document.key) >= limit:
            yield document.text
            size += len(document.text.encode())
            if size > SAMPLE:
                return
