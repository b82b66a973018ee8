"""Positions on a grid of patches: learned ones resized, fixed sines, rotations along two axes.

Resizing is torch.nn.functional.interpolate's arithmetic (align_corners=False, sizes given), which
published image encoders were trained with: a matrix for each direction. Grids are [H, W, D].
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.matmul import dot
from deepseek_jax.ops.rope import rotation

Method: TypeAlias = Literal["bilinear", "bicubic"]
RADIUS = {"bilinear": 1, "bicubic": 2}  # how many old places a new one sees to each side


def _kernel(distance: Array, method: Method, sharpness: float) -> Array:
    """A place's weight by its distance; bicubic: Keys' piecewise cubic (1981), zero beyond 2."""
    x, a = jnp.abs(distance), sharpness
    if method == "bilinear":
        return jnp.maximum(1 - x, 0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def resize_weights(
    at: Int[Array, "*places"],
    old: int,
    new: int | Int[Array, "#*places"],
    method: Method,
    antialias: bool,
) -> Float[Array, "*places {old}"]:
    """Of what of `old` places the new places `at`, of `new` in all, are made; each sums to 1.

    With `antialias` the kernel is as wide as a new place where that is wider than an old one; its
    cubic is another too (a of -0.5, Pillow's, not -0.75).
    """
    scale = jnp.broadcast_to(jnp.asarray(old / new, jnp.float32), at.shape)
    center = (at.astype(jnp.float32) + 0.5) * scale
    if antialias:
        center, wide = center[..., None], jnp.maximum(scale, 1.0)[..., None]
        place = jnp.arange(old, dtype=jnp.float32).reshape((1,) * at.ndim + (-1,))
        weights = _kernel((place + 0.5 - center) / wide, method, -0.5)
        return weights / weights.sum(-1, keepdims=True)
    source, radius = center - 0.5, RADIUS[method]
    reach = jnp.arange(1 - radius, 1 + radius, dtype=jnp.float32).reshape((1,) * at.ndim + (-1,))
    seen = jnp.floor(source)[..., None] + reach
    weights = _kernel(source[..., None] - seen, method, -0.75)
    seen = jnp.clip(seen, 0, old - 1).astype(jnp.int32)  # beyond an edge lies the edge again
    return (weights[..., None] * jax.nn.one_hot(seen, old)).sum(-2)


def resized(
    grid: Float[Array, "H W D"], size: tuple[int, int], method: Method, antialias: bool
) -> Float[Array, "H2 W2 D"]:
    """A grid of vectors at another size, in float32; at its own size it is unchanged."""
    rows, columns = (
        resize_weights(jnp.arange(new), old, new, method, antialias)
        for old, new in zip(grid.shape[:2], size, strict=True)
    )
    return dot("ac,bcd->abd", rows, dot("bw,cwd->bcd", columns, grid.astype(jnp.float32)))


def resized_each(
    grid: Float[Array, "H W D"], shapes: Int[Array, "B 2"], length: int, method: Method
) -> Float[Array, "B T D"]:
    """The grid antialiased to each row's own (height, width), in reading order, in float32.

    Rows are `length` long; behind height * width stands the first vector again, as SigLIP2 has it.
    Shapes may be traced: one program serves all.
    """
    height, width = shapes[:, :1], shapes[:, 1:]
    place = jnp.arange(length)[None, :]
    place = jnp.where(place < height * width, place, 0)
    rows = resize_weights(place // width, grid.shape[0], height, method, True)
    columns = resize_weights(place % width, grid.shape[1], width, method, True)
    along = dot("bth,hwd->btwd", rows, grid.astype(jnp.float32))
    return dot("btw,btwd->btd", columns, along)


def sines(size: tuple[int, int], dim: int, theta: float) -> Float[np.ndarray, "T {dim}"]:
    """Fixed positions of a grid's places in reading order: MAE's (arXiv 2111.06377) and DiT's.

    A place's vector is [sin(x w), cos(x w), sin(y w), cos(y w)], w_i = theta^(-i / (dim / 4)), x
    its column and y its row.
    """
    frequencies = theta ** (-np.arange(dim // 4) / (dim // 4))
    row, column = np.indices(size).reshape(2, -1, 1) * frequencies
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def axial_rotation(
    rows: Int[Array, "B T"], columns: Int[Array, "B T"], dim: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine for `ops.rope.rotate`: the first dim / 4 pairs turn by row, others by column.

    Each half's frequencies are theta^(-i / (dim / 4)), as in Qwen2-VL's image encoder.
    """
    by_row = rotation(rows, dim // 2, theta, None)
    by_column = rotation(columns, dim // 2, theta, None)
    cosine, sine = (jnp.concatenate(pair, axis=-1) for pair in zip(by_row, by_column, strict=True))
    return cosine, sine
