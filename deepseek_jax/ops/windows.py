"""Attention within windows of a feature map, some of them shifted (Swin, arXiv 2103.14030).

Feature maps are [B, H, W, C]. A shift turns the map around itself, so that a window at the border
holds pieces from opposite sides: `shift_mask` keeps these apart.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.ops.attention import MASKED
from deepseek_jax.ops.matmul import dot


def windows(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B M S C"]:
    """The M windows of size x size, in reading order; H and W must be multiples of size."""
    batch, height, width, channels = x.shape
    cut = x.reshape(batch, height // size, size, width // size, size, channels)
    return cut.swapaxes(2, 3).reshape(batch, -1, size * size, channels)


def from_windows(x: Float[Array, "B M S C"], grid: tuple[int, int]) -> Float[Array, "B H W C"]:
    """The feature map of `grid` (height, width) that `windows` cut."""
    batch, _, area, channels = x.shape
    size = math.isqrt(area)
    rows, columns = grid[0] // size, grid[1] // size
    cut = x.reshape(batch, rows, columns, size, size, channels)
    return cut.swapaxes(2, 3).reshape(batch, *grid, channels)


def relative_index(size: int, largest: int) -> Int[np.ndarray, "S S"]:
    """For every pair of places in a window, the row of a table of relative positions.

    The table has (2 largest - 1)^2 rows, by dy then dx; a smaller window uses its middle.
    """
    places = np.stack(np.divmod(np.arange(size * size), size), axis=-1)
    apart = places[:, None] - places[None] + largest - 1
    return apart[..., 0] * (2 * largest - 1) + apart[..., 1]


def shift_mask(grid: tuple[int, int], size: int, shift: int) -> Bool[np.ndarray, "M S S"]:
    """Which pairs of places in each window are neighbours, after the shift.

    Only the last windows hold what came around the border: in their last `shift` rows or columns.
    """
    came = [np.arange(n) >= n - shift for n in grid]
    sides = came[0][:, None] * 2 + came[1][None]
    cut = sides.reshape(grid[0] // size, size, grid[1] // size, size).swapaxes(1, 2)
    cut = cut.reshape(-1, size * size)
    return cut[:, :, None] == cut[:, None]


def window_attention(
    q: Float[Array, "B M S N H"],
    k: Float[Array, "B M S N H"],
    v: Float[Array, "B M S N Hv"],
    bias: Float[Array, "S S N"] | None,
    mask: Bool[np.ndarray, "M S S"] | None,
    *,
    scale: float,
) -> Float[Array, "B M S N Hv"]:
    """softmax(q k^T scale + bias) v in every window, among the pairs of `mask`; None: all."""
    scores = dot("bmtnh,bmsnh->bmnts", q, k) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).transpose(2, 0, 1)[None, None]
    if mask is not None:
        scores = jnp.where(mask[None, :, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return dot("bmnts,bmsnh->bmtnh", weights, v).astype(v.dtype)
