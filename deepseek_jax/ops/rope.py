"""Rotary position embedding (arXiv 2104.09864), stretched by YaRN (2309.00071) or as Llama 3 is."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.matmul import apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension, as DeepSeek-V2 and V3 use it."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        if self.factor < 1 or self.original_length < 1 or self.beta_fast < self.beta_slow:
            raise ValueError(
                f"yarn.factor ({self.factor}) and original_length ({self.original_length}) must "
                f"be at least 1, and beta_fast ({self.beta_fast}) at least beta_slow "
                f"({self.beta_slow})."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's context extension (arXiv 2407.21783): slow pairs are slowed further."""

    factor: float
    original_length: int
    low_frequency: float = 1.0
    """Pairs that turn less often than this in the original length turn `factor` times slower."""
    high_frequency: float = 4.0
    """Pairs that turn more often than this stay; those between are blended."""

    def __post_init__(self):
        if not (
            self.factor >= 1 <= self.original_length and self.low_frequency < self.high_frequency
        ):
            raise ValueError(
                f"Llama3.factor ({self.factor}) and original_length ({self.original_length}) must "
                f"be at least 1, and low_frequency ({self.low_frequency}) below high_frequency "
                f"({self.high_frequency})."
            )


def inverse_frequencies(dim: int, theta: float, yarn: Yarn | Llama3 | None) -> np.ndarray:
    """Radians a position that each of the dim / 2 rotary pairs turns by, float64."""
    frequencies = theta ** (-np.arange(0, dim, 2) / dim)
    if yarn is None:
        return frequencies
    if isinstance(yarn, Llama3):
        turns = yarn.original_length * frequencies / (2 * math.pi)
        low, high = yarn.low_frequency, yarn.high_frequency
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / yarn.factor)

    def pair(turns: float) -> float:  # the pair that makes `turns` turns in the original length
        return dim * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_factor(yarn: Yarn | Llama3 | None) -> float:
    """What YaRN multiplies the softmax scale by (DeepSeek: mscale squared)."""
    if not isinstance(yarn, Yarn) or not yarn.mscale_all_dim:
        return 1.0
    return _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def rotation(
    positions: Int[Array, "B T"], dim: int, theta: float, yarn: Yarn | Llama3 | None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine, float32, of every position's angle for each of the dim / 2 pairs."""
    frequencies = jnp.asarray(inverse_frequencies(dim, theta, yarn), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    size = 1.0
    if isinstance(yarn, Yarn):
        size = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    # Apart, or XLA on CPU evaluates them anew for every head that they turn.
    return apart(lambda x: (jnp.cos(x) * size, jnp.sin(x) * size), angles)


def rotate(
    x: Float[Array, "B T N P"],
    cosine: Float[Array, "B T half"],
    sine: Float[Array, "B T half"],
    interleaved: bool = False,
) -> Float[Array, "B T N P"]:
    """Turn each pair of x by its angle, in float32; the result's pairs are halves either way.

    Interleaved pairs (2j, 2j+1) come out as (j, j + P/2): queries and keys are permuted alike, so
    their products are those of the stored order.
    """
    x32, half = x.astype(jnp.float32), x.shape[-1] // 2
    pairs, axis = ((*x.shape[:-1], half, 2), -1) if interleaved else ((*x.shape[:-1], 2, half), -2)
    # Split, not sliced: its transpose is one concatenation.
    first, second = (part.squeeze(axis) for part in jnp.split(x32.reshape(pairs), 2, axis))
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return turned.astype(x.dtype)
