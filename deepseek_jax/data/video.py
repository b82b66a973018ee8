"""Video files as frames: T of them, evenly spread or jittered, uint8 [T, H, W, 3].

FFmpeg decodes (PyAV, the extra `media`) what data/containers has looked at. Packets are counted
before any is decoded, which costs little and shows how long a file really is; then frames are
decoded up to the last that is wanted, and only those are kept. MP4, MOV, WebM, Matroska and AVI.
"""

import dataclasses
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.containers import container_of
from deepseek_jax.data.shards import Example
from deepseek_jax.data.sources import one_line, reported
from deepseek_jax.data.vision import FITS, ImageTransform, decode_frames

CONTAINERS = ("mov", "matroska", "avi")
STILL = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # pictures in MP4's boxes


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """What is refused before a frame is decoded."""

    max_bytes: int = 1 << 28
    max_pixels: int = 1 << 24
    """Width times height of a frame."""
    max_seconds: float = 600.0
    max_frames: int = 1 << 16
    max_frame_pixels: int = 1 << 34
    """Width times height times frames: an hour of 640 x 360, a minute and a half of 4K."""


LIMITS = VideoLimits()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTransform:
    """How a video becomes an encoder's clip."""

    num_frames: int = 16
    image: ImageTransform = ImageTransform(size=224, fit="crop")
    limits: VideoLimits = LIMITS

    def __post_init__(self):
        if self.num_frames < 1:
            raise ValueError(f"num_frames ({self.num_frames}) must be at least 1.")


def read_frames(path: str | pathlib.Path, count: int, limits: VideoLimits = LIMITS) -> np.ndarray:
    """`film_frames` of a file; InputError where it cannot be read."""
    with reported(str(path)), open(path, "rb") as stream:
        data = stream.read(limits.max_bytes + 1)
    return film_frames(data, str(path), count, limits=limits)


def film_frames(
    data: bytes,
    name: str,
    count: int,
    draw: np.random.Generator | None = None,
    limits: VideoLimits = LIMITS,
) -> np.ndarray:
    """`count` frames of a film, uint8 [T, H, W, 3]: `sampled_frames`, or of a moving picture (GIF,
    WebP, PNG) `vision.decode_frames`."""
    boxes = data[4:8] == b"ftyp" and data[8:12] not in STILL
    matroska, avi = data[:4] == b"\x1a\x45\xdf\xa3", data[8:12] == b"AVI "
    if boxes or matroska or avi:
        return sampled_frames(data, name, count, draw, limits=limits)
    return decode_frames(data, name, count)


def clip_of(
    example: Example, config: ClipTransform, draw: np.random.Generator | None = None
) -> np.ndarray:
    """The clip of a medium's example, uint8 [T, S, S, 3]; with `draw` jittered, for training.

    InputError where it has no video or a damaged one: `media.usable` then counts and names it.
    """
    if "video" not in example.media:
        held = ", ".join(example.media) or "nothing"
        raise InputError(f"{example.name}: there is no video but {held}")
    given = config.num_frames, draw, config.image, config.limits
    return sampled_frames(example.media["video"], example.name, *given)


def frame_numbers(total: int, count: int, draw: np.random.Generator | None = None) -> np.ndarray:
    """Which of `total` frames are taken, int64 [count], ascending; fewer frames are repeated.

    The middle of each of `count` equal parts; with `draw`, one and the same place of all parts.
    """
    place = 0.5 if draw is None else draw.random()
    numbers = np.floor((np.arange(count) + place) * (total / count)).astype(np.int64)
    return np.minimum(numbers, total - 1)


def sampled_frames(
    data: bytes,
    name: str,
    count: int,
    draw: np.random.Generator | None = None,
    transform: ImageTransform | None = None,
    limits: VideoLimits = LIMITS,
) -> np.ndarray:
    """`count` frames of a video file, uint8 [T, H, W, 3], upright; with a transform [T, S, S, 3].

    `frame_numbers` says which. InputError, which begins with `name`: empty, no video, truncated or
    corrupt (as far as it is read), or past the limits, all of which are checked before decoding.
    """
    av = require("av")
    if count < 1:
        raise InputError(f"{name}: {count} frames asked for; take at least 1")
    try:
        if len(data) > limits.max_bytes:
            raise InputError(f"{len(data):,} bytes, more than max_bytes = {limits.max_bytes:,}")
        container = container_of(data, "video")
        if container not in CONTAINERS:
            raise InputError(f"no video in it, for it is {container}")
        times = _times(av, data, container, limits)
        numbers = frame_numbers(len(times), count, draw)
        wanted = dict.fromkeys(int(times[number]) for number in numbers)
        found: dict[int, np.ndarray] = {}
        waiting = list(wanted)
        for time, pixels in _frames(av, data, container, waiting, limits):
            pixels = FITS[transform.fit](pixels, transform) if transform else pixels
            while waiting and waiting[0] <= time:
                found[waiting.pop(0)] = pixels
        if waiting:
            raise InputError(f"truncated or corrupt: {len(waiting)} frames cannot be decoded")
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{name}: truncated or corrupt ({reason})") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return np.stack([found[int(times[number])] for number in numbers])


def _opened(av: Any, data: bytes, container: str) -> Any:
    return av.open(io.BytesIO(data), format=container, metadata_errors="ignore")


def _stream(file: Any, limits: VideoLimits) -> Any:
    """The file's video stream, its header's sizes within the limits."""
    stream = next(iter(file.streams.video), None)
    if stream is None:
        raise InputError("no video in it")
    if stream.codec_context is None:
        raise InputError("its video is in a code that FFmpeg does not know")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width < 1 or height < 1:
        raise InputError(f"truncated or corrupt: frames of {width} x {height}")
    if width * height > limits.max_pixels:
        size = f"frames of {width} x {height} = {width * height:,} pixels"
        raise InputError(f"{size}, more than max_pixels = {limits.max_pixels:,}")
    return stream


def _times(av: Any, data: bytes, container: str, limits: VideoLimits) -> np.ndarray:
    """When each frame is shown, ascending, in the stream's own units: by its packets alone."""
    with _opened(av, data, container) as file:
        stream = _stream(file, limits)
        size, unit = stream.codec_context.width * stream.codec_context.height, stream.time_base
        if (length := stream.duration) and float(length * unit) > limits.max_seconds:
            raise InputError(
                f"{float(length * unit):.1f} seconds long, more than {limits.max_seconds:g}"
            )
        declared, times = stream.frames, []
        most = min(limits.max_frames, limits.max_frame_pixels // size)
        if declared > most:
            raise InputError(f"{declared:,} frames of {size:,} pixels, more than the {most:,} read")
        for packet in file.demux(stream):
            if (packet.pts is None and packet.dts is None) or packet.is_discard:
                continue  # the end; what an edit list leaves out
            times.append(packet.dts if packet.pts is None else packet.pts)
            if len(times) > most:
                raise InputError(f"more than the {most:,} frames of {size:,} pixels that are read")
            if packet.is_corrupt:
                raise InputError("truncated or corrupt: a packet is marked so")
        if not times:
            raise InputError("no frames")
        if len(times) < declared:
            raise InputError(f"truncated: it holds {len(times)} of {declared} frames")
        span = float((max(times) - min(times)) * unit)
        if span > limits.max_seconds:
            raise InputError(f"{span:.1f} seconds long, more than {limits.max_seconds:g}")
        return np.unique(np.array(times))


def _frames(
    av: Any, data: bytes, container: str, waiting: list[int], limits: VideoLimits
) -> Iterator[tuple[int, np.ndarray]]:
    """Times and pixels of the frames that are waited for, uint8 [H, W, 3], upright."""
    with _opened(av, data, container) as file:
        stream = _stream(file, limits)
        context = stream.codec_context
        context.options = {"max_pixels": str(limits.max_pixels), "err_detect": "explode"}
        size = context.width, context.height
        for frame in file.decode(stream):
            if not waiting:
                return
            time = frame.dts if frame.pts is None else frame.pts
            if (frame.width, frame.height) != size:
                raise InputError("its frames change their size within")
            if frame.is_corrupt:
                raise InputError("truncated or corrupt: its decoder calls a frame so")
            if time is not None and time >= waiting[0]:
                yield time, _upright(frame.to_ndarray(format="rgb24"), frame)


def _upright(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """The pixels as the file says that they are shown: turned by right angles, mirrored.

    Its matrix takes column x and row y to x a + y c and x b + y d.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).astype(float).reshape(3, 3)
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= 0.02 * straight:
        return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    if max(abs(a), abs(d)) <= 0.02 * crossed:
        return pixels.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]
    raise InputError("its frames are shown turned by no right angle: store them upright")
