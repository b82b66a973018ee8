"""Sound as spectra: windows, the short-time Fourier transform, mel filters, Whisper's features.

Wave files: `B` rows of `T` samples; spectra have `S` frames of `F` frequencies or `M` mels. A frame
times a table of cosines and sines is its transform: one matrix product, which shards as any other
does. Window, table and filters are float64 NumPy while tracing, and float32 in the program.

A row may be shorter than the batch: `lengths` says how many of its samples count. Nothing after
them has any effect, and frames that the row does not reach are zeros.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

from deepseek_jax.core.errors import InputError
from deepseek_jax.ops.matmul import dot

FLOOR = 1e-10  # the least power whose logarithm is taken (Whisper)
SMALL = 1e-7  # added to a variance (wav2vec 2.0)


def hann(size: int) -> np.ndarray:
    """The periodic Hann window, float64 [size]: sin(pi n / size)^2."""
    return np.sin(np.pi * np.arange(size) / size) ** 2


def valid(lengths: Int[Array, " B"], size: int) -> Bool[Array, "B size"]:
    """Which of `size` places lie before each row's length."""
    return jnp.arange(size)[None, :] < lengths[:, None]


def frame_counts(
    lengths: Int[Array, " B"], size: int, hop: int, centered: bool = True
) -> Int[Array, " B"]:
    """How many frames of `size` samples, `hop` apart, rows of these lengths have.

    Centered frames have their middles at 0, hop, 2 hop, ..., length; others lie inside the row.
    """
    inside = lengths // hop + 1 if centered else (lengths - size) // hop + 1
    return jnp.where(lengths > 0, jnp.maximum(inside, 0), 0)


def stft(
    wave: Float[Array, "B T"],
    window: np.ndarray,
    hop: int,
    lengths: Int[Array, " B"] | None = None,
    centered: bool = True,
) -> Complex[Array, "B S F"]:
    """The short-time Fourier transform, complex64, F = len(window) // 2 + 1 frequencies.

    X[s, f] = sum_n window[n] x[s hop + n] exp(-2 pi i f n / size), as torch.stft and
    scipy.signal.stft have it but for scipy's scale. Centered frames see the row reflected at its
    ends, over again where it is shorter than half a window.
    """
    parts = _transform(wave, window, hop, lengths, centered)
    real, imaginary = jnp.split(parts, 2, -1)
    return real + 1j * imaginary


def power_spectrum(
    wave: Float[Array, "B T"],
    window: np.ndarray,
    hop: int,
    lengths: Int[Array, " B"] | None = None,
    centered: bool = True,
) -> Float[Array, "B S F"]:
    """|stft|^2, float32."""
    real, imaginary = jnp.split(_transform(wave, window, hop, lengths, centered), 2, -1)
    return real**2 + imaginary**2


def mel_filters(
    num_mels: int,
    size: int,
    rate: int,
    low: float = 0.0,
    high: float | None = None,
    scale: Literal["slaney", "htk"] = "slaney",
    area: bool = True,
) -> np.ndarray:
    """Triangles evenly spaced in mels, float64 [F, M], over the frequencies of `size` samples.

    `scale` slaney: linear to 1 kHz, logarithmic above; htk: 2595 log10(1 + f / 700). With `area`
    each is scaled to unit area (Slaney's norm), else to unit height. `high` is rate / 2 if None.
    Whisper's: mel_filters(80, 400, 16_000), with 128 mels for large-v3.
    """
    high = rate / 2 if high is None else high
    if not (num_mels > 0 and 0 <= low < high <= rate / 2):
        raise InputError(
            f"{num_mels} mels from {low} to {high} Hz at {rate} samples a second: give at least "
            f"one mel and 0 <= low < high <= {rate / 2}"
        )
    if scale not in SCALES:
        raise InputError(f"no mel scale {scale!r}, only {' and '.join(SCALES)}")
    to_mels, to_hertz = SCALES[scale]
    edges = to_hertz(np.linspace(*to_mels(np.array([low, high])), num_mels + 2))
    below, middle, above = edges[:-2], edges[1:-1], edges[2:]
    frequencies = np.arange(size // 2 + 1)[:, None] * (rate / size)
    rising = (frequencies - below) / (middle - below)
    falling = (above - frequencies) / (above - middle)
    filters = np.maximum(0, np.minimum(rising, falling))
    return filters * (2 / (above - below)) if area else filters


def log_mel(
    wave: Float[Array, "B T"],
    filters: np.ndarray,
    hop: int = 160,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B S M"]:
    """Whisper's features (arXiv 2212.04356), float32: (max(log10 mel, its maximum - 8) + 4) / 4.

    S = T // hop: the last centered frame is dropped. The maximum is over a row's own frames. Rows
    of Whisper are padded to 30 seconds of samples by the caller, and then have no `lengths`: their
    silence is part of what the model hears.
    """
    size = 2 * (filters.shape[0] - 1)
    power = power_spectrum(wave, hann(size), hop, lengths)[:, :-1]
    mel = dot("bsf,fm->bsm", power, jnp.asarray(filters, jnp.float32))
    logarithm = jnp.log10(jnp.maximum(mel, FLOOR))
    # Frames that a row does not reach have no power, so they are never its maximum.
    loudest = logarithm.max((1, 2), keepdims=True)
    features = (jnp.maximum(logarithm, loudest - 8) + 4) / 4
    if lengths is None:
        return features
    return jnp.where(valid(lengths // hop, features.shape[1])[:, :, None], features, 0.0)


def normalized(
    wave: Float[Array, "B T"], known: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """Each row with mean 0 and variance 1 over its known samples, float32, zeros elsewhere.

    (x - mean) / sqrt(variance + 1e-7), as wav2vec 2.0's models with `do_normalize` were trained.
    """
    wave = wave.astype(jnp.float32)
    known = jnp.ones(wave.shape, bool) if known is None else known
    count = jnp.maximum(known.sum(1, keepdims=True), 1)
    wave = jnp.where(known, wave, 0.0)
    centered = jnp.where(known, wave - wave.sum(1, keepdims=True) / count, 0.0)
    variance = (centered**2).sum(1, keepdims=True) / count
    return centered / jnp.sqrt(variance + SMALL)


def _slaney(hertz: np.ndarray) -> np.ndarray:
    logarithmic = 15 + np.log(np.maximum(hertz, 1000) / 1000) * 27 / np.log(6.4)
    return np.where(hertz < 1000, hertz * 3 / 200, logarithmic)


def _slaney_inverse(mels: np.ndarray) -> np.ndarray:
    logarithmic = 1000 * 6.4 ** ((np.maximum(mels, 15) - 15) / 27)
    return np.where(mels < 15, mels * 200 / 3, logarithmic)


SCALES = {  # from hertz to mels, and back
    "slaney": (_slaney, _slaney_inverse),
    "htk": (lambda hertz: 2595 * np.log10(1 + hertz / 700), lambda m: 700 * (10 ** (m / 2595) - 1)),
}


def _transform(wave, window, hop, lengths, centered) -> Float[Array, "B S twice"]:
    """The frames' cosine parts, then their sine parts."""
    size = len(window)
    if size < 1 or hop < 1:
        raise InputError(f"a window of {size} samples every {hop}: both must be at least 1")
    angles = np.outer(np.arange(size), np.arange(size // 2 + 1)) % size * (2 * np.pi / size)
    table = window[:, None] * np.concatenate([np.cos(angles), -np.sin(angles)], axis=1)
    frames = _frames(_padded(wave, size // 2, lengths, centered), size, hop)
    parts = dot("bsn,nf->bsf", frames, jnp.asarray(table, jnp.float32))
    if lengths is None:
        return parts
    counts = frame_counts(lengths, size, hop, centered)
    return jnp.where(valid(counts, parts.shape[1])[:, :, None], parts, 0.0)


def _padded(wave, pad, lengths, centered) -> Float[Array, "B padded"]:
    """The rows, float32, with `pad` reflected samples at both of each one's ends if centered."""
    wave = wave.astype(jnp.float32)
    if lengths is None:
        if not centered:
            return wave
        if wave.shape[1] == 0:
            raise InputError("a wave of no samples: give at least one")
        return jnp.pad(wave, ((0, 0), (pad, pad)), mode="reflect")
    wave = jnp.where(valid(lengths, wave.shape[1]), wave, 0.0)
    if not centered:
        return wave
    # A walk to the row's last sample and back takes 2 (length - 1) steps.
    place = jnp.arange(-pad, wave.shape[1] + pad)[None, :]
    around = jnp.maximum(2 * (lengths[:, None] - 1), 1)
    step = place % around
    return jnp.take_along_axis(wave, jnp.minimum(step, around - step), axis=1)


def _frames(wave, size, hop) -> Float[Array, "B S size"]:
    """Each stretch of `size` samples that begins at a multiple of `hop` and fits."""
    count = (wave.shape[1] - size) // hop + 1
    if count < 1:
        raise InputError(f"a wave of {wave.shape[1]} samples is shorter than a window of {size}")
    # Slices of rows of `hop` samples: the gradient of a gather would be a scatter.
    pieces = -(-size // hop)
    wanted = (count + pieces - 1) * hop
    wave = jnp.pad(wave[:, :wanted], ((0, 0), (0, max(wanted - wave.shape[1], 0))))
    rows = wave.reshape(wave.shape[0], -1, hop)
    return jnp.concatenate([rows[:, i : i + count] for i in range(pieces)], axis=2)[:, :, :size]
