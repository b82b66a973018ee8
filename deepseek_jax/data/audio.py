"""Sound files as waves: float32 NumPy [T], one channel, at the rate that a model hears.

FFmpeg decodes (PyAV, the extra `media`: one package for every container, which video needs too)
what data/containers has looked at, and stops where the limit is passed. libsoxr resamples: from
44.1 to 16 kHz a tone at 8.3 kHz comes out 137 dB lower, where scipy.signal.resample_poly leaves
10 dB, and takes six times longer.
"""

import io
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.augment import generator
from deepseek_jax.data.containers import container_of
from deepseek_jax.data.shards import MAX_MEDIUM
from deepseek_jax.data.sources import one_line, reported

RATES = 1_000, 192_000  # samples a second that a file may have
MAX_CHANNELS = 8
LOUDEST = 2**32  # floats may be whole numbers of 32 bits
COUNTED = {"flac", "aiff"}  # their headers count the samples

FULL_SCALE = {  # FFmpeg's sample formats: what 1.0 is, and where 0.0 lies
    "u8": (2**7, 2**7), "s16": (2**15, 0), "s32": (2**31, 0), "s64": (2**63, 0),
    "flt": (1, 0), "dbl": (1, 0),
}  # fmt: skip


def decoded_wave(data: bytes, name: str, rate: int, max_seconds: float = 600.0) -> np.ndarray:
    """The sound in a WAV, AIFF, FLAC, Ogg, MP3, MP4 or Matroska file, float32 [T] at `rate`.

    The mean of its channels, full scale 1.0 (files of floats may pass it). InputError, which
    begins with `name`: empty, not sound, truncated or corrupt, longer than `max_seconds`, or of a
    rate or a number of channels that nobody records. All but corruption is seen in the header, or
    as soon as the limit is passed.
    """
    for package in ("av", "soxr"):  # lacking one is no fault of this file
        require(package)
    try:
        wave = resampled(*_decoded(data, max_seconds), rate)
        if not len(wave):
            raise InputError(f"too short to be heard at {rate} samples a second")
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return wave


def read_wave(path: str | pathlib.Path, rate: int, max_seconds: float = 600.0) -> np.ndarray:
    """`decoded_wave` of a file; InputError where it cannot be read."""
    with reported(str(path)), open(path, "rb") as stream:
        data = stream.read(MAX_MEDIUM + 1)
    if len(data) > MAX_MEDIUM:
        raise InputError(f"{path}: more than 1 GiB")
    return decoded_wave(data, str(path), rate, max_seconds)


def wave_of_samples(samples: Any, native: int, rate: int, name: str) -> np.ndarray:
    """Samples of `native` a second as a wave, float32 [T], at `rate`: what `decoded_wave` gives.

    [T], [channels, T] or [T, channels]: the shorter side are the channels, whose mean is taken.
    Whole numbers are divided by their type's full scale. InputError, which begins with `name`.
    """
    samples = np.asarray(samples)
    if samples.dtype.kind not in "fi":
        raise InputError(f"{name}: samples are floats or signed integers, not {samples.dtype}")
    channels = min(samples.shape) if samples.ndim == 2 else 1
    if samples.ndim not in (1, 2) or not samples.size:
        raise InputError(f"{name}: a sound of shape {samples.shape}; give samples [T], not none")
    try:
        _check_form(native, channels)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    full = 1.0 if samples.dtype.kind == "f" else -float(np.iinfo(samples.dtype).min)
    wave = samples.astype(np.float64)
    if wave.ndim == 2:
        wave = wave.mean(int(wave.shape[0] != channels))
    wave = wave / full
    try:
        _check_values(wave)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    wave = wave.astype(np.float32)
    if not len(wave := resampled(wave, native, rate)):
        raise InputError(f"{name}: too short to be heard at {rate} samples a second")
    return wave


def resampled(wave: np.ndarray, native: int, rate: int) -> np.ndarray:
    """The wave [T] of `native` samples a second with `rate`: float32, about [T rate / native].

    What lies above half of the lower rate is filtered out; nothing is delayed.
    """
    return wave if rate == native else require("soxr").resample(wave, native, rate)


def centered_crop(wave: np.ndarray, length: int) -> np.ndarray:
    """The middle `length` samples; the whole wave where it is shorter."""
    start = max(len(wave) - length, 0) // 2
    return wave[start : start + length]


def fitted(wave: np.ndarray, length: int) -> np.ndarray:
    """The middle `length` samples, or a shorter wave with silence behind it, [length]."""
    wave = centered_crop(wave, length)
    return np.pad(wave, (0, length - len(wave)))


def random_crop(wave: np.ndarray, length: int, seed: int, row: int) -> np.ndarray:
    """`length` samples from a place that depends on (seed, row) alone; all of a shorter wave."""
    start = generator(seed, row, "sound crop").integers(max(len(wave) - length, 0) + 1)
    return wave[start : start + length]


def _decoded(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """The wave and its rate."""
    av, container = require("av"), container_of(data)
    try:
        with av.open(io.BytesIO(data), format=container, metadata_errors="ignore") as file:
            stream = next(iter(file.streams.audio), None)
            if stream is None:
                raise InputError("no sound in it")
            if stream.codec_context is None:
                raise InputError("its sound is in a code that FFmpeg does not know")
            if container != "mp3":  # old encoders break its rules without harm
                stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
            rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
            _check_form(rate, channels)
            declared, limit = _declared(container, file, stream), math.floor(max_seconds * rate)
            if declared > limit:
                raise InputError(f"{declared / rate:.1f} seconds long, more than {max_seconds:g}")
            pieces, count = [], 0
            for piece in _pieces(file, stream, rate, channels):
                pieces.append(piece)
                count += len(piece)
                if count > limit:
                    raise InputError(f"more than {max_seconds:g} seconds long")
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"truncated or corrupt ({reason})") from None
    if not count:
        raise InputError("no samples")
    if container in COUNTED and count < declared:
        raise InputError(f"truncated: it holds {count} of {declared} samples")
    wave = np.concatenate(pieces)
    _check_values(wave)
    return wave, rate


def _check_form(rate: int, channels: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"{rate} samples a second; from {RATES[0]} to {RATES[1]} can be read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"{channels} channels; from 1 to {MAX_CHANNELS} can be read")


def _check_values(wave: np.ndarray) -> None:
    if not np.isfinite(wave).all():
        raise InputError("corrupt: a sample is infinite or not a number")
    if (peak := np.abs(wave).max(initial=0)) > LOUDEST:  # squares would not be finite
        raise InputError(f"corrupt: a sample of {peak:.3g}, where full scale is 1")


def _declared(container: str, file: Any, stream: Any) -> int:
    """How many samples the file says that it has; 0 where it does not say."""
    if container == "mp3":  # without a tag FFmpeg guesses, from the first frame's bit rate
        return 0
    if stream.duration is not None:
        return round(stream.duration * stream.time_base * stream.codec_context.sample_rate)
    # The container's own is that of its longest stream, in microseconds.
    microseconds = 0 if file.streams.video else file.duration or 0
    return round(microseconds * stream.codec_context.sample_rate / 1_000_000)


def _pieces(file: Any, stream: Any, rate: int, channels: int) -> Iterator[np.ndarray]:
    """Each decoded frame as float32 [samples], the mean of its channels."""
    for frame in file.decode(stream):
        if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
            raise InputError("its rate or number of channels changes within")
        full, zero = FULL_SCALE[frame.format.name.removesuffix("p")]
        samples = frame.to_ndarray().reshape(
            (channels, -1) if frame.format.is_planar else (-1, channels)
        )
        mean = samples.mean(0 if frame.format.is_planar else 1, dtype=np.float64)
        yield ((mean - zero) / full).astype(np.float32)


class Windows(NamedTuple):
    """How a model takes sounds in: in windows, the last one filled up with silence."""

    rate: int
    """Samples a second that it hears."""
    size: int
    """Samples of a window."""
    tokens: int
    """Of one window."""
    stride: int | None
    """Samples from one token to the next; None: a sound has all tokens of its windows."""

    def layout(self, num_samples: int) -> np.ndarray:
        """Where each token of a sound comes from, counted from its first window's first."""
        count = -(-num_samples // self.size) * self.tokens
        if self.stride is not None:
            count = min(count, -(-num_samples // self.stride))
        return np.arange(count, dtype=np.int32)

    def cut(self, wave: np.ndarray) -> np.ndarray:
        """A wave [T] as its windows, float32 [A, size]."""
        found = np.zeros((-(-len(wave) // self.size), self.size), np.float32)
        found.reshape(-1)[: len(wave)] = wave
        return found
