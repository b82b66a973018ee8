"""Sparse attention: which earlier tokens a query keeps, and how what chooses them learns.

The lightning indexer is DeepSeek-V3.2's (arXiv 2512.02556, section 2.1): light heads score every
earlier token, a query attends to the best `top_k`, and the scores learn to be the distribution of
the attention itself. The learned gate is simpler: a token has one score, whoever asks; each query
keeps the best part of what it sees, and the scores learn through the attention that they weaken.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.ops.attention import MASKED, causal_mask, spans
from deepseek_jax.ops.matmul import dot


def index_scores(
    q: Float[Array, "B T I H"], k: Float[Array, "B S H"], weights: Float[Array, "B T I"]
) -> Float[Array, "B T S"]:
    """Sum over heads of weights * relu(q . k), float32; a few heads' products exist at a time."""
    num_heads, most = q.shape[2], max(1, 512 // q.shape[1])
    size = max(n for n in range(1, min(num_heads, most) + 1) if num_heads % n == 0)

    @jax.checkpoint
    def add(total, heads):
        products = jax.nn.relu(dot("btih,bsh->btis", heads[0], k))
        return total + dot("btis,bti->bts", products, heads[1]), None

    parts = tuple(
        jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0) for x in (q, weights)
    )
    total = jnp.zeros((*q.shape[:2], k.shape[1]), jnp.float32)
    return jax.lax.scan(add, total, parts)[0]


def best(
    scores: Float[Array, "B T S"], mask: Bool[Array, "_ T S"], top_k: int
) -> Bool[Array, "B T S"]:
    """The `top_k` highest scores of each row's allowed ones, earlier first among equals."""
    if top_k >= scores.shape[-1]:
        return jnp.broadcast_to(mask, scores.shape)
    scores = jnp.where(mask, scores, -jnp.inf)
    least = jax.lax.top_k(scores, top_k)[0][..., -1:]
    above, level = scores > least, scores == least
    room = top_k - above.sum(-1, keepdims=True, dtype=jnp.int32)
    return mask & (above | (level & (jnp.cumsum(level, -1, dtype=jnp.int32) <= room)))


def indexed(
    index: tuple[Float[Array, "B T I X"], Float[Array, "B T X"], Float[Array, "B T I"]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    segments: Int[Array, "B T"] | None,
    *,
    top_k: int,
    scale: float,
) -> tuple[Bool[Array, "B T T"], Float[Array, ""]]:
    """Which pairs an indexer keeps, and its divergence from the attention over them.

    `index` is what `index_scores` takes. The divergence, KL(attention, mean over heads || softmax
    of the scores) over the kept pairs, is summed over tokens, padding left out; it is
    differentiable in `index` alone.
    """
    q, k = jax.lax.stop_gradient((q, k))

    @functools.partial(jax.checkpoint, static_argnums=(1,))
    def of_span(index, span):
        start, end, _ = span
        index_q, index_k, weights = index
        scores = index_scores(index_q[:, start:end], index_k[:, :end], weights[:, start:end])
        mask = causal_mask(segments, end, None, start)
        keep = best(jax.lax.stop_gradient(scores), mask, top_k)
        attended = dot("btnh,bsnh->bnts", q[:, start:end], k[:, :end]) * scale
        attended = jax.nn.softmax(jnp.where(keep[:, None], attended, MASKED), axis=-1).mean(1)
        logs = jax.nn.log_softmax(jnp.where(keep, scores, MASKED), axis=-1)
        gap = jnp.where(attended > 0, jnp.log(jnp.maximum(attended, 1e-37)) - logs, 0)
        apart = (attended * gap).sum(-1)
        if segments is not None:
            apart = jnp.where(segments[:, start:end] > 0, apart, 0)
        keep = jnp.pad(keep, ((0, 0), (0, 0), (0, q.shape[1] - end)))
        return keep, apart.sum()

    kept, sums = zip(*(of_span(index, span) for span in spans(q.shape[1], None)), strict=True)
    return jnp.concatenate(kept, axis=1), sum(sums)


def places(segments: Int[Array, "B T"] | None, length: int) -> Int[Array, "_ T"]:
    """Each token's number in its own segment, from 0."""
    numbers = jnp.arange(length, dtype=jnp.int32)[None]
    if segments is None:
        return numbers
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return numbers - jax.lax.cummax(jnp.where(first, numbers, 0), axis=1)


def room(ratio: float, length: int) -> np.ndarray:
    """How many tokens a query keeps of the `n` that it sees, n from 0 to `length`: int32."""
    return np.ceil(ratio * np.arange(length + 1) - 1e-9).astype(np.int32)


def _graded(gate: Array) -> Array:
    """Gates to compare, rounded: a token's that is computed in another program may differ a little.

    So equal tokens are equal wherever they were computed, and a cache keeps what training kept.
    """
    return jax.lax.reduce_precision(jax.lax.stop_gradient(gate), 8, 7)


def gate_mask(
    gate: Float[Array, "B S"],
    mask: Bool[Array, "_ T S"],
    own: Int[Array, "_ T"],
    ratio: float,
) -> Bool[Array, "B T S"]:
    """The best-scored part of what each query sees, and the token itself, which stands at `own`.

    Earlier tokens come first among equals.
    """
    length = gate.shape[-1]
    scores = jnp.where(mask, _graded(gate)[:, None], -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    most = jnp.asarray(room(ratio, length))[mask.sum(-1)]
    itself = own[..., None] == jnp.arange(length)[None, None, :]
    return mask & ((rank < most[..., None]) | itself)


def gated_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    gate: Float[Array, "B S"],
    keep: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention to what `keep` allows, whose logits gain log sigmoid(gate): the whole square."""
    shape = q.shape
    q = q.reshape(*shape[:2], k.shape[2], -1, shape[-1])
    scores = dot("btkgh,bskh->bkgts", q, k) * scale
    scores = scores + jax.nn.log_sigmoid(gate.astype(jnp.float32))[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(keep[:, None, None], scores, MASKED), axis=-1)
    return dot("bkgts,bskh->btkgh", weights.astype(v.dtype), v).reshape(shape).astype(v.dtype)


def gated(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    gate: Float[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    *,
    ratio: float,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, ""]]:
    """`gated_reference` of `gate_mask` at its true cost, and how many pairs were kept (no padding).

    A token's rank only falls as more tokens come. So of what stands before a block of queries only
    the best that its last query has room for can matter: those are gathered, once for the block.
    """
    length = q.shape[1]
    most = room(ratio, length)
    if segments is None:
        segments = jnp.ones(gate.shape, jnp.int32)
    number, graded = places(segments, length), _graded(gate)
    # Heads first: products then need no transposition.
    shape = q.shape
    q = (q * scale).astype(q.dtype).reshape(*shape[:2], k.shape[2], -1, shape[-1])
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    weaker, outputs, kept = jax.nn.log_sigmoid(gate.astype(jnp.float32)), [], 0.0
    for start, end, _ in spans(length, None, least=32):
        own = slice(start, end)
        index, keep = _gate_block(graded, segments, number[:, own], most, start, end)

        def seen(x, index=index, own=own):  # [B, S] or [B, K, S, H]
            before = index if x.ndim == 2 else index[:, None, :, None]
            axis = 1 if x.ndim == 2 else 2
            chosen = jnp.take_along_axis(x, before, axis)
            return jnp.concatenate(
                [chosen, jax.lax.slice_in_dim(x, own.start, own.stop, axis=axis)], axis
            )

        bias = jnp.where(keep, seen(weaker)[:, None], MASKED)
        outputs.append(_biased(q[:, :, :, own], seen(k), seen(v), bias))
        kept += (keep & (segments[:, own] > 0)[..., None]).sum(dtype=jnp.float32)
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(shape), kept


def _gate_block(graded, segments, number, most, start, end):
    """Which tokens before a block of queries may matter [B, n], and who sees which of these and of
    the block's own [B, block, n + block]."""
    own, count = slice(start, end), min(int(most[end]), start)
    # Before the block, only tokens of the segment that it begins in can be seen.
    same = segments[:, :start] == segments[:, start : start + 1]
    before, index = jax.lax.top_k(jnp.where(same, graded[:, :start], -jnp.inf), count)
    scores = jnp.concatenate([before, graded[:, own]], axis=1)
    of = jnp.concatenate([jnp.take_along_axis(segments, index, 1), segments[:, own]], axis=1)
    stands = jnp.arange(count + end - start)[None, None] - count  # below 0: before the block
    mine, at = segments[:, own], jnp.swapaxes(stands[..., count:], 1, 2)
    alike = mine[:, :, None] == of[:, None]
    mask = alike & (stands <= at) & (scores > -jnp.inf)[:, None]
    # A token's rank: who was better before the block, and who came since.
    better = (before[:, :, None] >= scores[:, None, count:]) & alike[:, :, :count].swapaxes(1, 2)
    earlier = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], before.shape)
    earlier = jnp.concatenate([earlier, better.sum(1, dtype=jnp.int32)], axis=1)
    ahead = scores[:, None] < scores[:, count:, None]
    tied = (scores[:, None] == scores[:, count:, None]) & (at < stands)
    since = jnp.cumsum((ahead | tied) & alike, axis=1, dtype=jnp.int32)
    fits = earlier[:, None] + since < jnp.asarray(most)[number + 1][..., None]
    return index, mask & (fits | (stands == at))


@jax.custom_vjp
def _biased(q, k, v, bias):
    """softmax(q k + bias) v, softmax in float32: q [B, K, G, T, H], k and v [B, K, S, H], bias
    [B, T, S]. The backward pass makes the weights anew, as that of ops/attention does."""
    return _biased_forward(q, k, v, bias)[0]


def _biased_forward(q, k, v, bias):
    scores = dot("bkgth,bksh->bkgts", q, k) + bias[:, None, None]
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = (dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v) / total).astype(v.dtype)
    return out, (q, k, v, bias, out, top + jnp.log(total))


def _biased_backward(residuals, slope):
    q, k, v, bias, out, log_sums = residuals
    weights = jnp.exp(dot("bkgth,bksh->bkgts", q, k) + bias[:, None, None] - log_sums)
    shared = (slope.astype(jnp.float32) * out).sum(-1, keepdims=True)
    change = weights * (dot("bkgth,bksh->bkgts", slope, v) - shared)
    narrow, weights = change.astype(q.dtype), weights.astype(v.dtype)
    return (
        dot("bkgts,bksh->bkgth", narrow, k).astype(q.dtype),
        dot("bkgts,bkgth->bksh", narrow, q).astype(k.dtype),
        dot("bkgts,bkgth->bksh", weights, slope).astype(v.dtype),
        change.sum((1, 2)),
    )


_biased.defvjp(_biased_forward, _biased_backward)
