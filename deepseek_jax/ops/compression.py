"""Sums over a slow network in four bits: blocks of int4 with one scale each, and error feedback.

What rounding leaves out of a sum is returned and goes into the next one, so that over many steps
everything arrives (Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019, arXiv 1901.09847). A sum
is a reduce-scatter and an all-gather of the packed bytes, as in 1-bit Adam (arXiv 2102.02888): for
any number of devices each sends 4.25 bits where float32 would send 32.
"""

import math

import jax
import jax.numpy as jnp

BLOCK = 64  # values that share a scale
LARGEST = 7  # of four bits, symmetric
WIRE = BLOCK // 2 + 2  # bytes of a block: two values a byte, and the scale


def packed(x: jax.Array) -> jax.Array:
    """float32 [..., n], n a multiple of BLOCK, as uint8 [..., n / BLOCK, WIRE].

    Two values a byte, rounded to the nearest, and their block's scale in bfloat16. A block with a
    value that is not finite comes back as NaN.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scale = (jnp.abs(blocks).max(-1, keepdims=True) / LARGEST).astype(jnp.bfloat16)
    steps = blocks / jnp.maximum(scale.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)
    values = jnp.clip(jnp.round(steps), -LARGEST, LARGEST).astype(jnp.int8)
    low, high = values[..., : BLOCK // 2], values[..., BLOCK // 2 :]
    pairs = jax.lax.bitcast_convert_type((low & 15) | (high << 4), jnp.uint8)
    raw = jax.lax.bitcast_convert_type(scale, jnp.uint8).reshape(*scale.shape[:-1], 2)
    return jnp.concatenate([pairs, raw], -1)


def unpacked(wire: jax.Array) -> jax.Array:
    """What `packed` gave as float32 [..., n]."""
    pairs, raw = wire[..., : BLOCK // 2], wire[..., BLOCK // 2 :]
    pairs = jax.lax.bitcast_convert_type(pairs, jnp.int8)
    values = jnp.concatenate([(pairs << 4) >> 4, pairs >> 4], -1)  # arithmetic shifts: signed
    scale = jax.lax.bitcast_convert_type(raw, jnp.bfloat16)[..., None].astype(jnp.float32)
    return (values.astype(jnp.float32) * scale).reshape(*wire.shape[:-2], -1)


def wire_bytes(size: int, devices: int) -> int:
    """Bytes of `size` values on the wire, those that fill up the last blocks included."""
    return devices * math.ceil(size / (devices * BLOCK)) * WIRE


def summed(x: jax.Array, left_out: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Within a per-device function: the sum over an axis, the same bits everywhere, and what is
    left out of it; both are shaped like x, float32.

    `left_out` is what the last call returned, zeros at first: on all devices together, the sum and
    what is left out are together exactly what is added up, x and the old `left_out`.
    """
    size, devices, me = x.size, jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    given = (x.astype(jnp.float32) + left_out).reshape(-1)
    filled = -size % (devices * BLOCK)
    given = jnp.pad(given, (0, filled)).reshape(devices, -1)
    wire = packed(given)
    left = given - unpacked(wire)
    # Each device adds up one part. Its own share of it does not travel: nothing is left out.
    shares = unpacked(jax.lax.all_to_all(wire, axis, 0, 0, tiled=True)).at[me].set(given[me])
    part = shares.sum(0)
    wire = packed(part)
    left = left.at[me].set(part - unpacked(wire))
    total = unpacked(jax.lax.all_gather(wire, axis))
    return tuple(y.reshape(-1)[:size].reshape(x.shape) for y in (total, left))
