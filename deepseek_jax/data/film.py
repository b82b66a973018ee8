"""Videos as frames: uint8 NumPy [T, H, W, 3], evenly spaced over the whole.

FFmpeg decodes MP4 and Matroska (PyAV, the extra `media`) what data/containers has looked at; moving
pictures (GIF, WebP, PNG) are data/vision's. A file is decoded twice, since only decoding says how
many frames it has. Left out: that a film is to be shown turned.
"""

import io
import pathlib
from typing import Any

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.containers import container_of
from deepseek_jax.data.sources import one_line, reported
from deepseek_jax.data.vision import LIMITS, Limits, decode_frames

STILL = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # pictures in MP4's boxes


def read_frames(path: str | pathlib.Path, count: int, limits: Limits = LIMITS) -> np.ndarray:
    """`decoded_film` of a file; InputError where it cannot be read."""
    with reported(str(path)), open(path, "rb") as stream:
        return decoded_film(stream.read(limits.max_bytes + 1), str(path), count, limits)


def decoded_film(data: bytes, name: str, count: int, limits: Limits = LIMITS) -> np.ndarray:
    """`count` frames, from the first to the last; a shorter film repeats some.

    InputError, which begins with `name`: no film, truncated or corrupt, outside the limits.
    """
    boxes = data[4:8] == b"ftyp" and data[8:12] not in STILL
    if not (boxes or data[:4] == b"\x1a\x45\xdf\xa3"):
        return decode_frames(data, name, count, limits=limits)
    if count < 1:
        raise InputError(f"{name}: {count} frames asked for; take at least 1")
    if len(data) > limits.max_bytes:
        raise InputError(f"{name}: more than max_bytes = {limits.max_bytes:,} bytes")
    av = require("av")
    try:
        kind = container_of(data)
        total = len(_frames(data, kind, limits, None))
        if not total:
            raise InputError("no frames in it")
        wanted = np.linspace(0, total - 1, count).round().astype(int).tolist()
        found = _frames(data, kind, limits, {*wanted})
        return np.stack([found[number] for number in wanted])
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{name}: truncated or corrupt ({reason})") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _frames(data: bytes, kind: str, limits: Limits, wanted: set[int] | None) -> dict[int, Any]:
    """The frames by number as pixels where they are `wanted`; None wants none."""
    found: dict[int, Any] = {}
    with require("av").open(io.BytesIO(data), format=kind, metadata_errors="ignore") as file:
        stream = next(iter(file.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise InputError("no film in it, or in a code that FFmpeg does not know")
        size, pixels = (stream.codec_context.width, stream.codec_context.height), 0
        if size[0] * size[1] > limits.max_pixels:
            raise InputError(f"{size[0]} x {size[1]}, more than max_pixels = {limits.max_pixels:,}")
        for number, frame in enumerate(file.decode(stream)):
            if (frame.width, frame.height) != size:
                raise InputError(f"frame {number} has another size than the first")
            pixels += size[0] * size[1]
            if pixels > limits.max_frame_pixels:
                raise InputError(f"more than max_frame_pixels = {limits.max_frame_pixels:,}")
            shown = wanted is not None and number in wanted
            found[number] = frame.to_ndarray(format="rgb24") if shown else None
    return found
