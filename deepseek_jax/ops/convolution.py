"""Convolutions over time as matrix products: windows of a row, and grouped ones with many taps.

Waves and frames are Float[Array, "B T C"], a kernel [taps, channels, outputs]. A product of windows
runs as fast as any other on every backend, and its slope too: of XLA's own convolution on CPU
the slope of a grouped kernel with 128 taps takes 10 times as long.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.core import target
from deepseek_jax.ops.matmul import dot

TAPS = 8  # of a long kernel, multiplied at once: a row's windows take that much more memory


def num_windows(length: int, size: int, stride: int) -> int:
    """How many windows lie in a row: floor((length - size) / stride) + 1, and none below 0."""
    return max((length - size) // stride + 1, 0)


def windows(x: Float[Array, "B T C"], size: int, stride: int = 1) -> Float[Array, "B W taps C"]:
    """The `size` places from each multiple of `stride` on, as far as they fit in."""
    count = num_windows(x.shape[1], size, stride)
    last = (count - 1) * stride + 1
    taps = [x[:, tap : tap + last : stride] if count else x[:, :0] for tap in range(size)]
    return jnp.stack(taps, axis=2)


def squares(x: Float[Array, "B H W C"], size: int, stride: int) -> Float[Array, "B R S I J C"]:
    """The size x size places around every stride-th one of a plane, zeros beyond it; odd sizes."""
    around = size // 2
    x = jnp.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
    batch, high, wide, channels = x.shape
    rows, columns = (num_windows(n, size, stride) for n in (high, wide))
    ends = [(n - 1) * stride + 1 for n in (rows, columns)]
    taps = [
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.stack(taps, axis=3).reshape(batch, rows, columns, size, size, channels)


def grouped(x: Float[Array, "B T D"], kernel: Float[Array, "K C D"]) -> Float[Array, "B T D"]:
    """y[t] = sum over k of x[t + k - K // 2] kernel[k], zeros around x: as long as x.

    Channels fall into D / C groups of neighbors, and outputs read those of their own group. Sums
    are float32, the result has x's dtype.
    """
    batch, length, width = x.shape
    taps, channels, _ = kernel.shape
    groups, steps = width // channels, -(-taps // TAPS)
    more = steps * TAPS - taps  # taps of zeros behind the last
    kind = x.dtype
    if target.platform() == "cpu":  # a group's products in half precision take twice the time
        x = x.astype(jnp.float32)
    kernel = jnp.pad(kernel.astype(x.dtype), ((0, more), (0, 0), (0, 0)))
    kernel = kernel.reshape(steps, TAPS * channels, groups, channels).swapaxes(1, 2)
    x = jnp.pad(x, ((0, 0), (taps // 2, taps + more), (0, 0)))
    x = x.reshape(batch, -1, groups, channels).transpose(2, 0, 1, 3)

    @jax.checkpoint  # or all windows would be kept: as many copies of x as there are taps
    def add(total: Array, some: tuple[Array, Array]) -> tuple[Array, None]:
        first, weights = some
        part = jax.lax.dynamic_slice_in_dim(x, first, length + TAPS - 1, axis=2)
        near = jnp.concatenate([part[:, :, tap : tap + length] for tap in range(TAPS)], axis=-1)
        near = near.reshape(groups, batch * length, TAPS * channels)
        return total + dot("gnk,gkc->gnc", near, weights), None

    total = jnp.zeros((groups, batch * length, channels), jnp.float32)
    total, _ = jax.lax.scan(add, total, (jnp.arange(steps) * TAPS, kernel))
    total = total.reshape(groups, batch, length, channels).transpose(1, 2, 0, 3)
    return total.reshape(batch, length, width).astype(kind)
