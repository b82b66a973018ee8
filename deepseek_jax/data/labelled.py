"""Labelled media: images, sounds, videos and texts, some of them absent, and what each example is.

Row i is a pure function of (seed, config, i): which example of its epoch's order, which stretch of
its sound, which of its texts. Groups, not examples, are split into the two sides. What is damaged
is named, counted and replaced; a label that is no class stops the run, for nobody meant it.

A text may be a question about the image, and the classes its answers (VQA): data/vqa.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import media
from deepseek_jax.data.audio import decoded_wave, fitted, random_crop
from deepseek_jax.data.audiovisual import RATE
from deepseek_jax.data.augment import Augmentation, augmented, generator
from deepseek_jax.data.corpus import cache_folder, check_sides, digest, side
from deepseek_jax.data.packing import epoch_order, stacked
from deepseek_jax.data.pairs import fitted_tokenizer, text_row
from deepseek_jax.data.shards import Example
from deepseek_jax.data.tokenizer import BPE, Tokenizer, TokenizerConfig
from deepseek_jax.data.video import ClipTransform, clip_of
from deepseek_jax.data.vision import FITS, ImageTransform, Normalization, decode_image
from deepseek_jax.data.vqa import ANSWERS, DigitExamples, DigitQuestions, Shown

Batch = dict[str, Any]  # arrays by name
FILES = {"image": "image", "sound": "audio", "video": "video"}  # modalities, and a manifest's kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """How an example's text, such as a question, becomes tokens."""

    field: str = "text"
    """The manifest's; a text or a list of them, one of which is drawn for a training row."""
    tokenizer: TokenizerConfig = BPE(vocab_size=512)
    """A BPE is trained on the training side's texts."""
    length: int = 32
    """Tokens of a row, begin and end among them; a longer text is cut."""

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(f"data.text.length ({self.length}) must be at least 2.")


LabelledSource: TypeAlias = (
    DigitQuestions | media.MediaFolder | media.MediaShards | media.MediaParquet | media.MediaRecords
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """What a classifier of several modalities is trained and evaluated on; None: no such modality.

    A manifest's line: {"image": "a.png", "audio": "a.wav", "text": "Is it odd?", "label": "yes"}.
    """

    source: LabelledSource = DigitQuestions()
    classes: tuple[str, ...] = ANSWERS
    label: str = "label"
    """The manifest's field. Of one class its name. Of several labels a list of those that hold (the
    others do not), or an object {name: true or false; null or -1, or left out, is unknown}."""
    multi_label: bool = False
    """Whether an example may be of several classes, or of none (diagnosis)."""
    image: ImageTransform | None = None
    sound: bool = False
    """Whether sounds are heard: sequence_length samples of 16 kHz, a stretch of longer ones."""
    video: ClipTransform | None = None
    text: Text | None = None
    augmentation: Augmentation | None = None
    """How far images may stray in training; None: not at all."""
    missing: float = 0.0
    """How often a training row with several modalities lacks one of them."""
    held_out: float = 0.2
    """The share of groups kept for evaluation, by a hash of their names."""
    max_skipped: float = 0.01
    """The share of a source that may be damaged before the run stops."""
    num_workers: int = 0
    """Processes that make batches; 0: a thread of this process."""
    cache_dir: str = ""
    """Where a tokenizer is kept; empty: deepseek_jax in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self):
        check_sides(self.held_out, self.num_workers, self.cache_dir)
        if not 0 <= self.max_skipped < 1 or not 0 <= self.missing <= 1:
            raise ValueError(
                f"data.max_skipped ({self.max_skipped}) must lie in [0, 1), data.missing "
                f"({self.missing}) in [0, 1]."
            )
        names = self.classes
        if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise ValueError(f"data.classes {names} must be different names, at least one.")
        if not self.modalities:
            raise ValueError("data needs one of image, sound, video and text.")
        presets = {x.normalization for x in self._transforms()}
        if len(presets) > 1:
            raise ValueError(f"data.image and data.video must be normalized alike, not {presets}.")
        if isinstance(self.source, DigitQuestions):
            own = {"modalities": ("image", "text"), "classes": ANSWERS, "multi_label": False}
            for name, value in own.items():
                if (given := getattr(self, name)) != value:
                    raise ValueError(f"DigitQuestions have the {name} {value}; data has {given}.")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of what a row may show."""
        return tuple(name for name in (*FILES, "text") if getattr(self, name))

    @property
    def tokenizer(self) -> TokenizerConfig | None:
        """Of its texts."""
        return self.text.tokenizer if self.text else None

    @property
    def normalization(self) -> Normalization:
        """How the model's pixels are made of these."""
        return next((x.normalization for x in self._transforms()), "half")

    def _transforms(self) -> list[ImageTransform]:
        clip = self.video.image if self.video else None
        return [transform for transform in (self.image, clip) if transform]

    def shapes(self, rows: int, length: int) -> Batch:
        """A batch's shapes and dtypes, sounds of `length` samples."""
        uint8 = np.dtype(np.uint8)
        found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        if self.image:
            found["image"] = (rows, self.image.size, self.image.size, 3), uint8
        if self.sound:
            found["sound"] = (rows, length), np.dtype(np.float32)
        if self.video:
            size = self.video.image.size
            found["video"] = (rows, self.video.num_frames, size, size, 3), uint8
        if self.text:
            found["text"] = (rows, self.text.length), np.dtype(np.int32)
        labels = (rows, len(self.classes)) if self.multi_label else (rows,)
        return {
            "inputs": found,
            "present": dict.fromkeys(found, ((rows,), np.dtype(bool))),
            "labels": (labels, np.dtype(np.int32)),
        }

    def still(self, name: str, medium: Any, length: int, tokenizer: Tokenizer | None) -> np.ndarray:
        """A row of a modality as it is evaluated, its shape as in `shapes`.

        Of an image uint8 [H, W, 3], frames [T, H, W, 3], a wave [T] of 16 kHz, or a text.
        """
        if name == "image" and self.image:
            return FITS[self.image.fit](medium, self.image)
        if name == "video" and self.video:
            transform = self.video.image
            return np.stack([FITS[transform.fit](frame, transform) for frame in medium])
        if name == "text" and self.text and tokenizer:
            if not isinstance(medium, str):
                raise InputError(f"a text is a string, not {medium!r:.60}")
            return text_row(tokenizer, medium, self.text.length)
        return fitted(medium, length)


class _Media:
    """Files with labels; what is damaged raises InputError when it is used."""

    def __init__(self, source: media.MediaSource, label: str, text: str | None):
        self.given, fields = (source, label, text), (label, text) if text else (label,)
        self.media, self.label, self.text = (
            media.Media(dataclasses.replace(source, texts=fields)), label, text,
        )  # fmt: skip
        self.hashes, self.fingerprint = self.media.hashes, self.media.fingerprint

    def __reduce__(self):
        return _Media, self.given

    def example(self, number: int) -> Shown:
        found = self.media.example(number)
        shown: dict[str, Any] = {
            name: found.media[kind] for name, kind in FILES.items() if kind in found.media
        }
        if texts := found.captions.get(self.text or ""):
            shown["text"] = texts
        return Shown(found.name, shown, found.captions.get(self.label))


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledRows:
    """Rows of one side by number."""

    examples: DigitExamples | _Media
    numbers: np.ndarray
    """The examples of this side."""
    tokenizer: Tokenizer | None
    config: Labelled
    length: int
    """Samples of a sound."""
    seed: int
    skips: media.Skips

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows by number [B]: `inputs` by modality (`Labelled.shapes`), which of them are `present`
        bool [B], and `labels` int32: [B] or, 0 or 1 or -1 (unknown), [B, classes]."""
        return stacked([self._row(int(row)) for row in rows])

    def _row(self, row: int) -> Batch:
        epoch, place = divmod(row, len(self.numbers))
        numbers = self.numbers[epoch_order(len(self.numbers), self.seed, epoch)]
        return media.usable(numbers, place, functools.partial(self.view, row), self.skips)

    def view(self, row: int | None, number: int) -> Batch:
        """An example as training row `row` shows it; None: as it is evaluated.

        InputError where it is damaged, or has no label or none of the modalities.
        """
        shown, config = self.examples.example(number), self.config
        labels = labels_of(shown, config)
        there = [name for name in config.modalities if name in shown.media]
        if not there:
            held = ", ".join(shown.media) or "nothing"
            raise InputError(f"{shown.name}: has none of {', '.join(config.modalities)} but {held}")
        draw = None if row is None else generator(self.seed, row, "labelled")
        if draw and len(there) > 1 and draw.random() < config.missing:
            del there[draw.integers(len(there))]
        shapes = config.shapes(1, self.length)["inputs"]
        inputs = {name: np.zeros(shape[1:], dtype) for name, (shape, dtype) in shapes.items()}
        inputs |= {name: self._input(name, shown, row, draw) for name in there}
        present = {name: np.bool_(name in there) for name in config.modalities}
        return {"inputs": inputs, "present": present, "labels": labels}

    def _input(
        self, name: str, shown: Shown, row: int | None, draw: np.random.Generator | None
    ) -> np.ndarray:
        c, medium = self.config, shown.media[name]
        if name == "video" and c.video:
            return clip_of(Example(shown.name, "", {"video": medium}, {}), c.video, draw)
        if name == "text":
            medium = medium[draw.integers(len(medium)) if draw else 0]
        elif name == "sound":
            medium = decoded_wave(medium, shown.name, RATE)
            if row is not None:
                medium = random_crop(medium, self.length, self.seed, row)
        elif isinstance(medium, bytes):
            medium = decode_image(medium, shown.name)
        if name == "image" and c.image and c.augmentation and row is not None:
            given = self.seed, row, c.image.size, c.augmentation, c.image.method
            return augmented(medium, *given)
        return c.still(name, medium, self.length, self.tokenizer)


def labels_of(shown: Shown, config: Labelled) -> np.ndarray:
    """What an example is, int32: its class's number or, of several labels, [classes] of 1, 0, -1.

    InputError without a label; media.Mistake for one that is no class, and several where one is
    wanted.
    """
    if shown.labels is None:
        raise InputError(f"{shown.name}: there is no label, field {config.label!r}")
    known = {name: number for number, name in enumerate(config.classes)}
    told: dict[str, Any] = dict.fromkeys(shown.labels, 1)
    row = np.zeros(len(known), np.int32)
    if config.multi_label and len(told) == 1 and shown.labels[0].startswith("{"):
        with contextlib.suppress(ValueError):  # then it is a name, and no class
            told = json.loads(shown.labels[0])
            row[:] = -1
    for name, value in told.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise media.Mistake(
                f"{shown.name}: label {name!r} is none of the {len(known)} data.classes; the "
                f"nearest is {near!r}"
            )
        if value not in (0, 1, -1, None):
            raise media.Mistake(
                f"{shown.name}: label {name!r} is {value!r}, not true, false or null"
            )
        row[known[name]] = -1 if value is None else int(value)
    if config.multi_label:
        return row
    if len(told) != 1:
        raise media.Mistake(
            f"{shown.name}: has {len(told)} labels {[*told]}, and one is wanted: set "
            "data.multi_label, or keep one"
        )
    return np.array(row.argmax(), np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledDataset:
    """Training rows by number, and the examples held out."""

    tokenizer: Tokenizer | None
    """None: there is no text."""
    train: LabelledRows
    held: LabelledRows
    fingerprint: str
    """A hash that stays while the tokenizer, the examples and their order do."""

    @property
    def config(self) -> Labelled:
        """What it was opened from."""
        return self.train.config

    def describe(self) -> str:
        """What both sides hold, in a line."""
        parts = []
        for name, rows in (("training", self.train), ("held out", self.held)):
            hashes = rows.examples.hashes[rows.numbers]
            parts.append(f"{name}: {len(hashes):,} examples of {len(np.unique(hashes)):,} groups")
        return "; ".join([*parts, f"{len(self.config.classes):,} classes"])

    def held_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every held-out example once; what fills up the last batch has labels of -1.

        Damaged ones are named and counted. InputError where none can be used.
        """
        rows: list[Batch] = []
        some = False
        for number in map(int, self.held.numbers):
            try:
                rows.append(self.held.view(None, number))
            except media.Mistake:
                raise
            except InputError as error:
                self.held.skips.add(number, str(error))
            if len(rows) == batch_size:
                some = True
                yield stacked(rows)
                rows = []
        if not (rows or some):
            raise InputError("nothing that was held out can be used")
        if rows:
            filler = rows[-1] | {"labels": np.full_like(rows[-1]["labels"], -1)}
            yield stacked(rows + [filler] * (batch_size - len(rows)))


def open_labelled(
    config: Labelled, *, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None
) -> LabelledDataset:
    """The examples of a config, sounds in rows of `sequence_length` samples.

    `seed` draws the order, the crops and the texts. A `tokenizer` (a checkpoint's own) reads texts
    instead of the config's. Raises InputError when the data cannot be read.
    """
    examples: DigitExamples | _Media
    if isinstance(config.source, DigitQuestions):
        examples = DigitExamples(config.source)
    else:
        examples = _Media(config.source, config.label, config.text.field if config.text else None)
    sides = [side(examples.hashes, config.held_out, training) for training in (True, False)]
    if config.text and tokenizer is None:
        facts = ["labelled bpe", examples.fingerprint, sides[0].tolist()]
        said = _texts(examples, sides[0])
        cache = cache_folder(config.cache_dir)
        tokenizer = fitted_tokenizer(config.text.tokenizer, said, facts, cache)
    skips = media.Skips(len(examples.hashes), config.max_skipped)
    train, kept = (
        LabelledRows(examples, numbers, tokenizer, config, sequence_length, seed, skips)
        for numbers in sides
    )
    still = {"max_skipped": 0.0, "num_workers": 0, "cache_dir": ""}
    told = {x.name: repr(getattr(config, x.name)) for x in dataclasses.fields(config)} | still
    del told["source"]  # of which the examples' fingerprint tells, wherever they lie
    read = tokenizer.files() if tokenizer else {}
    fingerprint = digest([read, examples.fingerprint, sequence_length, seed, told])
    return LabelledDataset(tokenizer, train, kept, fingerprint)


def _texts(examples: DigitExamples | _Media, numbers: np.ndarray) -> Iterator[str]:
    for number in numbers:
        with contextlib.suppress(InputError):  # named and counted when it is trained on
            yield from examples.example(int(number)).media.get("text", ())
