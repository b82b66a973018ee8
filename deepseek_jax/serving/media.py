"""What is shown and played to a model: pictures, films, sounds, their marks and their places.

A prompt's media come one list a kind. Where a prompt has marks for a kind, they stand for its media
in order; else the media come before the prompt.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from deepseek_jax.checkpoint import huggingface, multi_modality
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audio import read_wave, wave_of_samples
from deepseek_jax.data.conversations import MARKS, NOUNS
from deepseek_jax.data.tiles import TEXT, Grid, canvas, views_of
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.video import read_frames
from deepseek_jax.data.vision import (
    NORMALIZATIONS,
    Method,
    Normalization,
    channels_first,
    checked,
    normalized,
    read_image,
)
from deepseek_jax.models.ear import RATE, Ear
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.projectors import DownsampleProjector
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.serving.inputs import images_of, sam_images_of

AROUND = {"janus": ("<begin_of_image>", "<end_of_image>")}  # what a family puts around an image
ANSWER = "answer"  # in a chat's row: its first answer begins
FRAMES = 8  # of a film that is a file


def marks_of(tokenizer: Tokenizer | None) -> dict[str, str]:
    """The mark of each kind that a tokenizer has one for."""
    known = {
        kind: [name for name in names if tokenizer and tokenizer.token_id(name) is not None]
        for kind, names in MARKS.items()
    }
    return {kind: names[0] for kind, names in known.items() if names}


def around(family: str, tokenizer: Tokenizer | None) -> tuple[list[int], list[int]]:
    """The tokens that stand before an image's and behind them; InputError where they are missing.

    `family` is `SeeingModel.kind`.
    """
    names = AROUND.get(family, ())
    known = [tokenizer.token_id(name) for name in names] if tokenizer else []
    found = [number for number in known if number is not None]
    if len(found) < len(names):
        raise InputError(f"the tokenizer has no {' or no '.join(names)}")
    return found[:1], found[1:]


def opened(kind: str, medium: Any, num_frames: int = FRAMES) -> np.ndarray:
    """A picture uint8 [H, W, 3], a film [T, H, W, 3] or a wave [T] at `RATE`.

    `medium` is a file's path, or an array: of a sound its samples, at RATE, or (samples, their
    rate). `num_frames` are taken of a film that is a file. InputError for what is none.
    """
    if isinstance(medium, str | pathlib.Path):
        if kind == "audio":
            return read_wave(medium, RATE)
        return read_frames(medium, num_frames) if kind == "video" else read_image(medium)
    if kind == "audio":
        samples, native = medium if isinstance(medium, tuple) else (medium, RATE)
        return wave_of_samples(samples, native, RATE, "a sound")
    if kind == "image":
        return checked(medium)
    frames = np.asarray(medium)
    if frames.ndim != 4 or not len(frames):
        raise InputError(f"a video of shape {frames.shape}; give a file, or frames [T, H, W, 3]")
    return np.stack([checked(frame) for frame in frames])


def by_prompt(kind: str, given: Sequence[Any] | None, count: int) -> list[list[Any]]:
    """Each prompt's media of a kind; one medium alone is a list of one."""
    if given is None:
        return [[] for _ in range(count)]
    if len(given) != count:
        raise InputError(f"there are {count} prompts and {NOUNS[kind]} for {len(given)}")
    return [list(own) if isinstance(own, list) or _many(own) else [own] for own in given]


def _many(own: Any) -> bool:
    pair = isinstance(own, tuple) and len(own) == 2 and isinstance(own[1], int | np.integer)
    return isinstance(own, tuple) and not pair


class Look(NamedTuple):
    """How pictures become views."""

    normalization: Normalization
    """A key of data.vision.NORMALIZATIONS, or of a canvas two: the large view's and the small."""
    method: Method | None = None
    """How they are resized, of a canvas the small view; None: as published (`tiles.views_of`)."""


RESAMPLED: dict[Any, Method | None] = {None: None, 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def look_of(path: pathlib.Path, config: VisionLanguage) -> Look:
    """How a folder's processor prepares pictures for a model.

    Where it does not say, with mean and deviation 0.5, a Hybrid's large views with CLIP's. Raises
    InputError for a way that has no name here.
    """
    found = huggingface.read_optional(path, "preprocessor_config.json", "processor_config.json")
    found |= found.get("image_processor") or {}
    found |= multi_modality.pixels(huggingface.read_optional(path, "config.json"))

    def normalization(before: str, missing: str) -> str:
        given = (found.get(f"{before}image_{name}") for name in ("mean", "std"))
        usual = NORMALIZATIONS[missing]
        mean, deviation = (one or other for one, other in zip(given, usual, strict=True))
        for name, (known, other) in NORMALIZATIONS.items():
            if np.allclose(mean, known, atol=1e-6) and np.allclose(deviation, other, atol=1e-6):
                return name
        raise InputError(
            f"{path}: pictures of mean {mean} and deviation {deviation} are unknown here"
        )

    resample = found.get("resample")
    if resample not in RESAMPLED or found.get("high_res_resample", 3) != 3:
        raise InputError(f"{path}: resample is {resample}; understood are 1, 2, 3, and large: 3")
    name = normalization("", "half")
    if isinstance(config.vision, Hybrid) and (large := normalization("high_res_", "clip")) != name:
        name = f"{large}+{name}"
    known: dict[str, Normalization] = {one: one for one in get_args(Normalization)}
    if name not in known:
        raise InputError(f"{path}: pictures of normalizations {name} are unknown here")
    return Look(known[name], RESAMPLED[resample])


def views_of_pictures(
    config: VisionLanguage,
    look: Look,
    pictures: Sequence[np.ndarray],
    *,
    frames: bool = False,
) -> tuple[np.ndarray, list[Grid]]:
    """Pictures uint8 [H, W, 3] of one prompt as views [N, ...], normalized, and their grids.

    Films' `frames` are pictures of which none is cut into tiles.
    """
    way, method = look
    views, grids = views_of(pictures, config.sight, way, frames=frames, method=method)
    flexible = isinstance(config.vision, NaFlex)
    return views if flexible else channels_first(normalized(views, way)), grids


def views_of_films(
    config: VisionLanguage, look: Look, films: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[Grid]]:
    """Films' frames, one film after another, as views, and their grids."""
    frames = [frame for film in films for frame in film]
    return views_of_pictures(config, look, frames, frames=True)


def apart(
    config: VisionLanguage, views: np.ndarray, grids: Sequence[Grid]
) -> Iterator[tuple[np.ndarray, Grid]]:
    """Each image's views and its grid."""
    start = 0
    for grid in grids:
        end = start + config.sight.num_views(grid)
        yield views[start:end], grid
        start = end


class Item(NamedTuple):
    """An image or a sound of a row."""

    layout: np.ndarray
    """`sources` of its tokens, counted from its first view's or window's first."""
    units: int
    """Its views or windows."""


def placed(
    marked: np.ndarray, items: Sequence[Item], unit_tokens: int, noun: str
) -> tuple[np.ndarray, list[list[int]]]:
    """Where each marked token's embedding comes from, [B, T], and each row's units, by number.

    Each row takes as many of the items, in order, as its marked tokens hold. Raises InputError
    where they hold no whole number of them, or not all.
    """
    sources = np.full(marked.shape, TEXT, np.int32)
    by_row: list[list[int]] = []
    left, first = list(items), 0
    for row, its in enumerate(marked):
        needed, laid, own = int(its.sum()), [], 0
        while needed and left and len(left[0].layout) <= needed:
            layout, units = left.pop(0)
            laid.append(np.where(layout >= 0, layout + own * unit_tokens, layout))
            needed -= len(layout)
            own += units
        if needed:
            raise InputError(
                f"row {row} has {int(its.sum())} {noun} tokens; {needed} of them are no {noun}'s"
            )
        if laid:
            sources[row, its] = np.concatenate(laid)
        by_row.append(list(range(first, first + own)))
        first += own
    if left:
        raise InputError(f"the rows have {noun} tokens for all but {len(left)} {noun}s")
    return sources, by_row


def gathered(units: np.ndarray, by_row: list[list[int]]) -> np.ndarray:
    """Each row's units [N, ...] as [B, most of a row, ...], zeros behind them."""
    found = np.zeros((len(by_row), max(map(len, by_row)), *units.shape[1:]), units.dtype)
    for row, numbers in enumerate(by_row):
        found[row, : len(numbers)] = units[numbers]
    return found


def seen(
    config: VisionLanguage, marked: np.ndarray, images: Any, grids: Sequence[Grid] | None
) -> dict[str, np.ndarray]:
    """`images`, `sources` and, of a NaFlex, `shapes` of rows whose image tokens are `marked`.

    Images and grids are as `SeeingModel.logits` takes them. Raises InputError for what is not.
    """
    vision, several = config.vision, isinstance(config.projector, DownsampleProjector)
    flexible = isinstance(vision, NaFlex)
    if grids is None and (several or flexible):
        raise InputError("this model's images come as tiles or patches: give each one's grid, too")
    if isinstance(vision, NaFlex):
        views = _patches(config, images)
    elif isinstance(vision, Hybrid):
        views = _canvases(vision, images)
    else:
        views = images_of(vision, images)["images"]
    grids = [(int(wide), int(high)) for wide, high in grids or [(1, 1)] * len(views)]
    if sum(map(config.sight.num_views, grids)) != len(views):
        raise InputError(f"the grids {grids} are not those of {len(views)} views")
    most = config.max_patches
    if flexible and not all(min(grid) >= 1 and math.prod(grid) <= most for grid in grids):
        raise InputError(f"the grids {grids} must have from 1 to {most} patches each")
    items = [Item(config.sight.layout(grid), config.sight.num_views(grid)) for grid in grids]
    sources, by_row = placed(marked, items, config.view_tokens, "image")
    given = {"images": gathered(views, by_row), "sources": sources}
    if flexible:
        given["shapes"] = gathered(np.array(grids, np.int32)[:, ::-1], by_row)
    return given


def first_question(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The messages before the first answer; none where there is no answer yet."""
    told = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    return messages[: told[0]] if told else ()


def with_answer(row: list[int | str], question: list[int | str]) -> list[int | str]:
    """A chat's row with ANSWER behind its question, which it begins with; else InputError."""
    if row[: len(question)] != question:
        raise InputError(
            "this chat template writes a question otherwise where answers follow it, so nothing "
            "says which tokens the model's prefix 'question' has"
        )
    return [*question, ANSWER, *row[len(question) :]]


def answered(asked: Sequence[int], shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """Of which tokens [B, T] the follower is an answer's, the first `asked` being the question.

    Raises InputError where a row has fewer real ones, which `mask` says.
    """
    mask = np.ones(shape) if mask is None else mask
    counts, real = np.asarray(asked), mask.sum(1).astype(int)
    if counts.shape != real.shape or not ((counts >= 1) & (counts <= real)).all():
        raise InputError(f"asked is {counts.tolist()}, and the rows have {real.tolist()} tokens")
    return np.cumsum(mask, 1) >= counts[:, None]


def _patches(config: VisionLanguage, images: Any) -> np.ndarray:
    patches = np.asarray(images, np.float32)
    if patches.shape[1:] != config.view_shape:
        wanted = ", ".join(map(str, ("N", *config.view_shape)))
        raise InputError(f"images have shape {patches.shape}; this model takes [{wanted}]")
    return patches


def _canvases(vision: Hybrid, images: Any) -> np.ndarray:
    """Of views as the processor makes them, or of canvases [N, C, H + S, H]."""
    if isinstance(images, Mapping):
        names = {"pixel_values", "high_res_pixel_values"}
        if {*images} != names:
            raise InputError(f"images has {', '.join(images)}; give {', '.join(sorted(names))}")
        small = images_of(vision.low, images["pixel_values"])["images"]
        large = sam_images_of(vision.high, images["high_res_pixel_values"])["images"]
        if len(small) != len(large):
            raise InputError(f"there are {len(large)} large views and {len(small)} small ones")
        return canvas(large, small)
    views = np.asarray(images, np.float32)
    height, width, channels = vision.view_shape
    if views.ndim != 4 or views.shape[1:] != (channels, height, width):
        raise InputError(
            f"images have shape {views.shape}; this model takes [N, {channels}, {height}, {width}] "
            "as `prepared` makes them, or a dict of pixel_values and high_res_pixel_values"
        )
    return views.transpose(0, 2, 3, 1)


def heard(ear: Ear, marked: np.ndarray, audio: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """`sounds` and `sources`, counted from their first token, of rows with `marked` tokens.

    Raises InputError for what is no sound (`opened`), or does not fill the tokens.
    """
    waves = [opened("audio", sound) for sound in audio]
    cut = [ear.windows.cut(wave) for wave in waves]
    windows = np.concatenate([np.empty((0, ear.window), np.float32), *cut])
    items = [Item(ear.layout(len(wave)), len(own)) for wave, own in zip(waves, cut, strict=True)]
    sources, by_row = placed(marked, items, ear.window_tokens, "sound")
    return gathered(windows, by_row), sources


def without_media(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], dict[str, list[Any]]]:
    """Messages whose parts are marks alone, and the media that stood in them, by kind.

    A part is {"type": "image", "image": a medium}; its medium may be called "path" too, and may be
    missing: then it is an argument of `chat`. InputError where some have one and others none.
    """
    found: dict[str, list[Any]] = {}
    plain: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            plain.append(message)
            continue
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in MARKS:
                found.setdefault(kind, []).append(part.get(kind, part.get("path")))
                part = {"type": kind}
            parts.append(part)
        plain.append({**message, "content": parts})
    for kind, media in found.items():
        missing = sum(medium is None for medium in media)
        if 0 < missing < len(media):
            raise InputError(f"{missing} of {len(media)} {NOUNS[kind]} in the messages are missing")
    return plain, {kind: media for kind, media in found.items() if media[0] is not None}
