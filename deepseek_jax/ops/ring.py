"""Attention over rows that lie in pieces on several devices: keys and values travel around a ring.

Ring attention (arXiv 2310.01889) with causal work spread evenly ("zigzag", as in striped attention,
arXiv 2311.09431): of 2n chunks device i holds chunks i and 2n - 1 - i. Whatever device its keys
come from, it then sees the same amount of them. Per-device functions; only pairs of chunks that
see each other are computed, in blocks of queries whose scores exist one block at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.attention import MASKED
from deepseek_jax.ops.matmul import dot

BLOCK = 512  # queries whose scores exist at a time


def zigzag(x: Array, axis: str, dimension: int, back: bool = False) -> Array:
    """Consecutive pieces of `dimension` turned into zigzag's pairs of chunks, or back again."""
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    if size == 1:
        return x
    holder = [min(chunk, 2 * size - 1 - chunk) for chunk in range(2 * size)]
    even, odd = ([(i, holder[2 * i + part]) for i in range(size)] for part in (0, 1))
    if back:  # every device sends its even-numbered chunk, then its odd one, to where they belong
        even, odd = ([(b, a) for a, b in moves] for moves in (even, odd))
    halves = jnp.split(x, 2, dimension)
    # Of chunks i and 2n - 1 - i, one is even: the first where i is.
    flip = (me % 2 == 1) if back else jnp.bool_(False)
    first, second = (jnp.where(flip, halves[1 - i], halves[i]) for i in (0, 1))
    first, second = jax.lax.ppermute(first, axis, even), jax.lax.ppermute(second, axis, odd)
    turn = jnp.bool_(False) if back else (me % 2 == 1)
    return jnp.concatenate(
        [jnp.where(turn, second, first), jnp.where(turn, first, second)], dimension
    )


def zigzag_order(length: int, axis: str) -> Int[Array, " T"]:
    """Where in its row each of this device's `length` tokens stands."""
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    half = jnp.arange(length // 2)
    return jnp.concatenate([half + chunk * (length // 2) for chunk in (me, 2 * size - 1 - me)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    segments: Int[Array, "B T"] | None,
    axis: str,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention within segments of rows that lie zigzag along `axis`."""
    return _forward(q, k, v, segments, axis, scale, window)[0]


def _halves(x: Array, dimension: int) -> Array:
    """[2, ...]: the two chunks."""
    return jnp.stack(jnp.split(x, 2, dimension))


def _grouped(q, num_kv_heads):
    """[B, T, N, H] as chunks of heads that share keys: [2, B, K, G, h, H]."""
    batch, length, num_heads, width = q.shape
    q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, width)
    return _halves(q.transpose(0, 2, 3, 1, 4), 3)


def _whole(x):
    """And back."""
    x = jnp.concatenate([x[0], x[1]], 3).transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _prepared(q, k, v, segments, scale):
    """All in halves, heads first; queries scaled."""
    if segments is None:
        segments = jnp.ones(q.shape[:2], jnp.int32)
    keys = _halves(k.swapaxes(1, 2), 2), _halves(v.swapaxes(1, 2), 2), _halves(segments, 1)
    return _grouped((q * scale).astype(q.dtype), k.shape[2]), keys


def _blocks(function, queries):
    """function of each block of queries (dimension 3 of heads' arrays, 1 of segments), in turn."""
    length = queries[0].shape[3]
    block = next(size for size in range(min(BLOCK, length), 0, -1) if length % size == 0)

    def cut(x, dimension):
        shape = *x.shape[:dimension], length // block, block, *x.shape[dimension + 1 :]
        return jnp.moveaxis(x.reshape(shape), dimension, 0)

    parts = [cut(x, 3 if x.ndim > 2 else 1) for x in queries]
    starts = jnp.arange(length // block) * block
    return jax.lax.map(lambda given: function(*given), (starts, *parts))


def _joined(parts):
    """Blocks of queries behind each other again: [blocks, B, K, G, block, x]."""
    parts = jnp.moveaxis(parts, 0, 3)
    return parts.reshape(*parts.shape[:3], -1, parts.shape[-1])


def _scores(start, q, q_segments, k, k_segments, first_query, first_key, window):
    query = first_query + start + jnp.arange(q.shape[3])[None, :, None]
    key = first_key + jnp.arange(k.shape[2])[None, None, :]
    mask = (query >= key) & (q_segments[:, :, None] == k_segments[:, None, :])
    if window is not None:
        mask &= query - key < window
    scores = dot("bkgth,bksh->bkgts", q, k)
    return jnp.where(mask[:, None, None], scores, MASKED)


def _pairs(axis, step, visit, carry):
    """visit(carry, a, b) for every pair of a query chunk and a key chunk that see each other.

    At `step` the keys are those of the device that many places before this one.
    """
    me, size = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    if isinstance(step, int):  # its own
        for a, b in ((0, 0), (1, 0), (1, 1)):
            carry = visit(carry, a, b, me)
        return carry
    source = (me - step) % size
    both = jnp.where(source < me, 0, 1)
    carry = visit(carry, 1, 0, source)
    return visit(carry, both, both, source)


def _starts(axis, a, source, b, length):
    """Where in their rows this device's chunk a and the source's chunk b begin."""
    last = 2 * jax.lax.axis_size(axis) - 1
    held = ((jax.lax.axis_index(axis), a), (source, b))
    return [jnp.where(half == 0, device, last - device) * length for device, half in held]


def _passed_on(axis, x):
    size = jax.lax.axis_size(axis)
    moves = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda part: jax.lax.ppermute(part, axis, moves), x)


def _forward(q, k, v, segments, axis, scale, window):
    queries, keys = _prepared(q, k, v, segments, scale)
    own, length = keys[2], queries.shape[4]
    shape = queries.shape[:-1]
    start = (
        jnp.full((*shape, 1), MASKED, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, v.shape[-1]), jnp.float32),
    )

    def visit(keys):
        def one(carry, a, b, source):
            first = _starts(axis, a, source, b, length)

            def block(at, q, segments, top, total, out):
                scores = _scores(at, q, segments, keys[0][b], keys[2][b], *first, window)
                new = jnp.maximum(top, scores.max(-1, keepdims=True))
                weights, old = jnp.exp(scores - new), jnp.exp(top - new)
                values = dot("bkgts,bksh->bkgth", weights.astype(v.dtype), keys[1][b])
                return new, total * old + weights.sum(-1, keepdims=True), out * old + values

            found = _blocks(block, (queries[a], own[a], *(part[a] for part in carry)))
            return tuple(
                part.at[a].set(_joined(new)) for part, new in zip(carry, found, strict=True)
            )

        return one

    def step(state, index):
        keys, carry = state
        keys = _passed_on(axis, keys)
        return (keys, _pairs(axis, index, visit(keys), carry)), None

    carry = _pairs(axis, 0, visit(keys), start)
    steps = jnp.arange(1, jax.lax.axis_size(axis))
    _, (top, total, out) = jax.lax.scan(step, (keys, carry), steps)[0]
    out = _whole((out / total).astype(v.dtype))
    return out, (q, k, v, segments, out, top + jnp.log(total))


def _backward(axis, scale, window, residuals, slope):
    q, k, v, segments, out, log_sums = residuals
    queries, keys = _prepared(q, k, v, segments, scale)
    own, length = keys[2], queries.shape[4]
    slopes, out = _grouped(slope, k.shape[2]), _grouped(out, k.shape[2])
    shared = (slopes.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    zeros = [jnp.zeros(part.shape, jnp.float32) for part in keys[:2]]

    def visit(keys):
        def one(carry, a, b, source):
            first = _starts(axis, a, source, b, length)

            def block(at, q, segments, slope, log_sums, shared):
                scores = _scores(at, q, segments, keys[0][b], keys[2][b], *first, window)
                weights = jnp.exp(scores - log_sums)
                change = dot("bkgth,bksh->bkgts", slope, keys[1][b])
                change = (weights * (change - shared)).astype(q.dtype)
                weights = weights.astype(v.dtype)
                q_slope = dot("bkgts,bksh->bkgth", change, keys[0][b])
                k_slope = dot("bkgts,bkgth->bksh", change, q)
                return q_slope, k_slope, dot("bkgts,bkgth->bksh", weights, slope)

            q_slope, k_slope, v_slope = carry
            given = queries[a], own[a], slopes[a], log_sums[a], shared[a]
            q_part, k_part, v_part = _blocks(block, given)
            return (
                q_slope.at[a].add(_joined(q_part)),
                k_slope.at[b].add(k_part.sum(0)),
                v_slope.at[b].add(v_part.sum(0)),
            )

        return one

    def step(state, index):
        keys, q_slope, *rest = state
        keys, *rest = _passed_on(axis, (keys, *rest))  # slopes travel with their keys
        return (keys, *_pairs(axis, index, visit(keys), (q_slope, *rest))), None

    start = jnp.zeros(queries.shape, jnp.float32), *zeros
    carry = _pairs(axis, 0, visit(keys), start)
    steps = jnp.arange(1, jax.lax.axis_size(axis))
    _, q_slope, *rest = jax.lax.scan(step, (keys, *carry), steps)[0]
    k_slope, v_slope = _passed_on(axis, rest)  # home
    k_slope, v_slope = (jnp.concatenate([x[0], x[1]], 2).swapaxes(1, 2) for x in (k_slope, v_slope))
    return (
        (_whole(q_slope) * scale).astype(q.dtype),
        k_slope.astype(k.dtype),
        v_slope.astype(v.dtype),
        None,
    )


ring_attention.defvjp(_forward, _backward)
