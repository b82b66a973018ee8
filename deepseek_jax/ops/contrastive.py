"""Contrastive losses of pairs: CLIP's softmax and SigLIP's sigmoid, exact over any devices.

CLIP, arXiv 2103.00020, figure 3; SigLIP, arXiv 2303.15343, algorithm 1, with its pass of one side
around the devices (section 3.3). Here the softmax takes that way too: with the travelling side
travel the running log-sum-exps of its columns. Logits exist for `chunk` columns at a time, forward
and backward, on one device as on many; the backward pass computes them again.

A pair's two rows are each other's positive. Every other pairing is a negative, unless both have
the same group (the same caption twice: no negative, and no positive) or either is not valid.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.ops.attention import MASKED
from deepseek_jax.ops.matmul import dot

Kind = Literal["softmax", "sigmoid"]
# What the learned log-temperature and bias start with; the softmax's has no bias to learn.
START: dict[Kind, tuple[float, float]] = {
    "softmax": (math.log(1 / 0.07), 0.0),
    "sigmoid": (math.log(10.0), -10.0),
}
MAX_LOG_TEMPERATURE = math.log(100.0)
TIE = 1e-6  # cosines this near each other are equal: what float32 products of unit vectors lose


class _Met(NamedTuple):
    """What rows, or columns, have of the negatives that they met so far."""

    top: Array
    """The largest logit."""
    total: Array
    """Softmax: the sum of exp(logit - top), in the end their log-sum-exp. Sigmoid: of losses."""
    cosines: Array
    count: Array


def l2_normalized(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """x over its length, float32; zeros where x is zero, and so is the gradient."""
    x = x.astype(jnp.float32)
    largest = jax.lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True))
    some = largest > 0
    x = x / jnp.where(some, largest, 1.0)  # else squares leave float32's range
    x = x * jax.lax.rsqrt(jnp.where(some, (x * x).sum(-1, keepdims=True), 1.0))
    return jnp.where(some, x, 0.0)


@jax.custom_vjp
def temperature(log_temperature: Float[Array, ""]) -> Float[Array, ""]:
    """What cosines are multiplied by: exp(log_temperature), at most 100.

    Above, only a step downward has a slope: as if the parameter were clipped after each step.
    """
    return jnp.exp(jnp.minimum(log_temperature, MAX_LOG_TEMPERATURE))


def _temperature_backward(log_temperature, slope):
    stuck = (log_temperature >= MAX_LOG_TEMPERATURE) & (slope < 0)
    return (jnp.where(stuck, 0.0, slope * temperature(log_temperature)),)


temperature.defvjp(lambda x: (temperature(x), x), _temperature_backward)


def contrastive_terms(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    log_temperature: Float[Array, ""],
    bias: Float[Array, ""] | None = None,
    groups: Int[Array, " B"] | None = None,
    valid: Bool[Array, " B"] | None = None,
    *,
    kind: Kind,
    axes: tuple[str, ...] = (),
    chunk: int = 512,
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """Sums over valid rows, and how many those are, of the loss and of what shows how it fares.

    `loss`: softmax: the mean of the cross-entropies of a row's and of its column's positive;
    sigmoid: -log sigmoid(+-logit) summed over all the row's pairings (over the batch, rows' and
    columns' sums are the same, and their mean is taken here too). Logits: temperature * cosine +
    bias. Reports: `recall_at_1` (no negative's cosine reaches the positive's), `recall_at_1_back`
    from second to first, `positive_cosine`, and `negative_cosine`, each row's mean over negatives.

    Embeddings need not be normalized. `groups` are equal where captions are; None: all differ. What
    stands in rows that are not valid has no effect, nor NaN there.

    In a per-device function whose rows are split over the mesh axes `axes`, the negatives are all
    devices' rows, and the sums those of this device's, to be added up by whoever calls: the slopes
    of shared inputs too.
    """
    size = first.shape[0]
    if valid is None:
        valid = jnp.ones(size, bool)
    if groups is None:
        groups = jnp.arange(size) + (jax.lax.axis_index(axes) * size if axes else 0)
    first, second = (
        l2_normalized(jnp.where(valid[:, None], x.astype(jnp.float32), 0.0))
        for x in (first, second)
    )
    bias = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    scale = temperature(log_temperature.astype(jnp.float32))
    sides = _negatives(kind, axes, chunk, first, second, scale, bias, groups, valid)
    cosine = (first * second).sum(-1)
    positive = scale * cosine + bias
    if kind == "softmax":  # log(exp(positive) + the negatives') - positive
        losses = [jax.nn.softplus(side.total - positive) for side in sides]
    else:
        losses = [jax.nn.softplus(-positive) + side.total for side in sides]
    hits = [positive - side.top > TIE * scale for side in sides]
    rows = {
        "loss": (losses[0] + losses[1]) / 2,
        "recall_at_1": hits[0].astype(jnp.float32),
        "recall_at_1_back": hits[1].astype(jnp.float32),
        "positive_cosine": cosine,
        "negative_cosine": sides[0].cosines / jnp.maximum(sides[0].count, 1.0),
    }
    rows |= {name: jax.lax.stop_gradient(x) for name, x in rows.items() if name != "loss"}
    weight = valid.sum().astype(jnp.float32)
    return {name: (jnp.where(valid, x, 0.0).sum(), weight) for name, x in rows.items()}


def dense_losses(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    log_temperature: Float[Array, ""],
    bias: Float[Array, ""],
    groups: Int[Array, " B"],
    valid: Bool[Array, " B"],
    kind: Kind,
) -> Float[Array, " B"]:
    """The reference: every row's loss from all B x B logits at once; 0 where not valid."""
    first, second = (l2_normalized(jnp.where(valid[:, None], x, 0.0)) for x in (first, second))
    logits = temperature(log_temperature) * dot("bd,kd->bk", first, second) + bias
    own = jnp.eye(len(logits), dtype=bool)
    seen = own | (valid[:, None] & valid[None, :] & (groups[:, None] != groups[None, :]))
    if kind == "softmax":
        logits = jnp.where(seen, logits, MASKED)
        found = [-jnp.diagonal(jax.nn.log_softmax(logits, axis)) for axis in (1, 0)]
    else:
        pairs = jax.nn.softplus(jnp.where(own, -logits, logits))
        found = [jnp.where(seen, pairs, 0.0).sum(axis) for axis in (1, 0)]
    return jnp.where(valid, (found[0] + found[1]) / 2, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _negatives(kind, axes, chunk, first, second, scale, bias, groups, valid):
    """What rows have met, and what columns have; only the totals are differentiable."""
    return _forward(kind, axes, chunk, first, second, scale, bias, groups, valid)[0]


def _chunked(chunk, *arrays):
    """Each as [chunks, columns, ...], padded with zeros: with columns that are not valid."""
    size = arrays[0].shape[0]
    count = -(-size // chunk)
    columns = -(-size // count)
    pad = count * columns - size
    return tuple(
        jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(count, columns, *x.shape[1:])
        for x in arrays
    )


def _passed_on(axes, x):
    if not axes:
        return x
    size = jax.lax.axis_size(axes)
    moves = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda part: jax.lax.ppermute(part, axes, moves), x)


def _around(axes, visit, rows, keys, columns):
    """visit(rows, (chunk of keys, of columns)) -> (rows, columns) with every device's chunks.

    Columns are home again in the end. Keys go ahead while the visit computes.
    """

    def step(state, _):
        rows, keys, columns = state
        ahead = _passed_on(axes, keys)
        rows, columns = jax.lax.scan(visit, rows, (keys, columns))
        return (rows, ahead, _passed_on(axes, columns)), None

    steps = jax.lax.axis_size(axes) if axes else 1
    (rows, _, columns), _ = jax.lax.scan(step, (rows, keys, columns), length=steps)
    return rows, columns


def _block(first, groups, valid, second, key_groups, key_valid):
    """A chunk of columns: cosines and which of them are negatives' [rows, columns]."""
    negative = valid[:, None] & key_valid[None, :] & (groups[:, None] != key_groups[None, :])
    return dot("bd,kd->bk", first, second), negative


def _after(kind, met, logits, cosines, negative, axis):
    """What rows (of axis 1), or columns (of axis 0), have met after this block."""
    top = jnp.maximum(met.top, jnp.where(negative, logits, MASKED).max(axis))
    if kind == "softmax":
        terms = jnp.exp(logits - jnp.expand_dims(top, axis))
        total = met.total * jnp.exp(met.top - top)
    else:
        terms, total = jax.nn.softplus(logits), met.total
    total = total + jnp.where(negative, terms, 0.0).sum(axis)
    cosines = met.cosines + jnp.where(negative, cosines, 0.0).sum(axis)
    return _Met(top, total, cosines, met.count + negative.sum(axis).astype(jnp.float32))


def _forward(kind, axes, chunk, first, second, scale, bias, groups, valid):
    keys = _chunked(chunk, second, groups, valid)

    def start(shape):
        zeros = jnp.zeros(shape, jnp.float32)
        return _Met(jnp.full(shape, MASKED, jnp.float32), zeros, zeros, zeros)

    def visit(rows, met):
        keys, columns = met
        cosines, negative = _block(first, groups, valid, *keys)
        block = scale * cosines + bias, cosines, negative
        return _after(kind, rows, *block, 1), _after(kind, columns, *block, 0)

    size = first.shape[0]
    rows, columns = _around(axes, visit, start(size), keys, start(keys[0].shape[:2]))
    sides = rows, jax.tree.map(lambda x: x.reshape(-1)[:size], columns)
    if kind == "softmax":
        sides = tuple(
            side._replace(total=jnp.where(side.count > 0, side.top + jnp.log(side.total), MASKED))
            for side in sides
        )
    return sides, (first, second, scale, bias, groups, valid, *(side.total for side in sides))


def _backward(kind, axes, chunk, residuals, slopes):
    first, second, scale, bias, groups, valid, row_total, column_total = residuals
    row_slope, column_slope = (side.total for side in slopes)
    keys = _chunked(chunk, second, groups, valid, column_total, column_slope)

    def visit(sums, met):
        first_slope, scale_slope, bias_slope = sums
        (second, *who, total, slope), second_slope = met
        cosines, negative = _block(first, groups, valid, second, *who)
        logits = scale * cosines + bias
        if kind == "softmax":
            change = jnp.exp(logits - row_total[:, None]) * row_slope[:, None]
            change += jnp.exp(logits - total[None, :]) * slope[None, :]
        else:
            change = jax.nn.sigmoid(logits) * (row_slope[:, None] + slope[None, :])
        change = jnp.where(negative, change, 0.0)
        sums = (
            first_slope + scale * dot("bk,kd->bd", change, second),
            scale_slope + (change * cosines).sum(),
            bias_slope + change.sum(),
        )
        return sums, second_slope + scale * dot("bk,bd->kd", change, first)

    zero = jnp.zeros((), jnp.float32)
    start = jnp.zeros_like(first), zero, zero
    found, second_slope = _around(axes, visit, start, keys, jnp.zeros_like(keys[0]))
    first_slope, scale_slope, bias_slope = found
    second_slope = second_slope.reshape(-1, second.shape[1])[: len(second)]
    return first_slope, second_slope, scale_slope, bias_slope, None, None


_negatives.defvjp(_forward, _backward)
