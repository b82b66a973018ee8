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
LANES = 128  # of a TPU: arrays with fewer values in their last dimension are padded to as many
GROUP = 2 * LANES  # values whose bytes lie together: of two rows, one has the low bits
WIRE = GROUP // 2 + 2 * GROUP // BLOCK  # bytes of a group: two values a byte, and the scales


def packed(x: jax.Array) -> jax.Array:
    """float32 [..., n], n a multiple of GROUP, as uint8 [..., n / GROUP * WIRE].

    Two values a byte, rounded to the nearest, and then every block's scale in bfloat16. A block
    with a value that is not finite comes back as NaN.
    """
    rows = x.reshape(*x.shape[:-1], -1, 2, LANES)
    sizes, left = jnp.abs(rows), _in_left_block(rows.ndim)
    tops = [jnp.where(own, sizes, 0.0).max(-1) for own in (left, ~left)]
    scale = (jnp.stack(tops, -1) / LARGEST).astype(jnp.bfloat16)
    steps = rows / jnp.maximum(_spread(scale), jnp.finfo(jnp.float32).tiny)
    values = jnp.clip(jnp.round(steps), -LARGEST, LARGEST).astype(jnp.int8)
    pairs = (values[..., 0, :] & 15) | (values[..., 1, :] << 4)
    parts = [jax.lax.bitcast_convert_type(part, jnp.uint8) for part in (pairs, scale)]
    return jnp.concatenate([part.reshape(*x.shape[:-1], -1) for part in parts], -1)


def unpacked(wire: jax.Array) -> jax.Array:
    """What `packed` gave as float32 [..., n]."""
    lead, groups = wire.shape[:-1], wire.shape[-1] // WIRE
    pairs = wire[..., : groups * LANES].reshape(*lead, groups, LANES)
    pairs = jax.lax.bitcast_convert_type(pairs, jnp.int8)
    values = jnp.stack([(pairs << 4) >> 4, pairs >> 4], -2)  # arithmetic shifts: signed
    raw = wire[..., groups * LANES :].reshape(*lead, groups, 2, 2, 2)
    scale = jax.lax.bitcast_convert_type(raw, jnp.bfloat16)
    return (values.astype(jnp.float32) * _spread(scale)).reshape(*lead, -1)


def _in_left_block(ndim: int) -> jax.Array:
    """Which of a row's LANES are of its first block: bool [..., LANES] of so many dimensions."""
    return (jnp.arange(LANES) < BLOCK).reshape(*(1,) * (ndim - 1), LANES)


def _spread(scale: jax.Array) -> jax.Array:
    """Each row's two scales [..., 2] as float32 [..., LANES]."""
    first, second = (x.astype(jnp.float32) for x in jnp.split(scale, 2, -1))
    return jnp.where(_in_left_block(scale.ndim), first, second)


def wire_bytes(size: int, devices: int) -> int:
    """Bytes of `size` values on the wire, those that fill up the last groups included."""
    return devices * math.ceil(size / (devices * GROUP)) * WIRE


def summed(x: jax.Array, left_out: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Within a per-device function: the sum over an axis, the same bits everywhere, and what is
    left out of it; both are shaped like x, float32.

    `left_out` is what the last call returned, zeros at first: on all devices together, the sum and
    what is left out are together exactly what is added up, x and the old `left_out`.
    """
    size, devices, me = x.size, jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    given = (x.astype(jnp.float32) + left_out).reshape(-1)
    filled = -size % (devices * GROUP)
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
