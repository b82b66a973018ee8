"""Softmax attention: a reference, and the fastest available form for each backend.

`causal_attention` is the one place that chooses: blocks of queries on XLA (CPU, and wherever
nothing better applies), cuDNN through `jax.nn.dot_product_attention` on GPU, splash on TPU.
"""

import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.core import target
from deepseek_jax.core.extras import require
from deepseek_jax.ops.matmul import dot, laid

Implementation = Literal["reference", "blocks", "cudnn", "splash"]
KERNELS = {"splash"}  # written by hand, in Pallas: XLA cannot partition them
QUERIES = 384  # whose scores exist at a time, where rows are long and caches small
MORE_QUERIES = 1024  # elsewhere: 4096 tokens of 12 heads have 800 MB of scores
MASKED = -1e30  # finite: a row with nothing to attend gives a uniform softmax, never NaN


def causal_mask(
    segments: Int[Array, "B T"] | None, end: int, window: int | None, start: int = 0, first: int = 0
) -> Bool[Array, "_ queries keys"]:
    """Who attends to whom in packed rows: earlier tokens of the same segment, within the window.

    Queries are the positions from `start` to `end`, keys those from `first` to `end`.
    """
    query, key = jnp.arange(start, end)[None, :, None], jnp.arange(first, end)[None, None, :]
    mask = query >= key
    if window is not None:
        mask &= query - key < window
    if segments is not None:
        mask &= segments[:, start:end, None] == segments[:, None, first:end]
    return mask


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Bool[Array, "_ _ S"],
    scale: float,
) -> Float[Array, "B T N Hv"]:
    """Attention under an explicit mask, softmax in float32. Query head n reads kv head n // G."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    q = q.reshape(*q.shape[:2], num_kv_heads, num_heads // num_kv_heads, q.shape[-1])
    scores = dot("btkgh,bskh->bkgts", q, k) * scale
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = dot("bkgts,bskh->btkgh", weights, v)
    return out.reshape(*out.shape[:2], num_heads, v.shape[-1]).astype(v.dtype)


def full_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    mask: Bool[Array, "B S"] | Bool[Array, "_ T S"] | None,
    *,
    scale: float,
    causal: bool = False,
) -> Float[Array, "B T N Hv"]:
    """Attention of every token to all tokens that `mask` calls real, or the earlier of them.

    A mask [_, T, S] says it of each pair. A row without a real token attends to all alike. On GPU
    cuDNN's kernel where it can, else XLA, on CPU long rows by blocks of queries.
    `masked_attention` is the reference.
    """
    seen = mask[:, None, :] if mask is not None and mask.ndim == 2 else mask
    if preferred(q) == "cudnn":
        seen = None if seen is None else seen[:, None]
        given = {"mask": seen, "scale": scale, "is_causal": causal, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(q, k, _as_wide(v, q), **given)[..., : v.shape[-1]]
    if causal:
        earlier = causal_mask(None, q.shape[1], None)
        seen = earlier if seen is None else seen & earlier
    return _whole(q, k, v, seen, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _whole(q, k, v, seen, scale):
    """Attention among the pairs of `seen` [B, T, S], or all; weights are made anew for slopes.

    Products are of heads laid first, and in the backward pass of keys by queries: only so does
    XLA on CPU take half precision as it is (ops/matmul).
    """
    return _whole_forward(q, k, v, seen, scale)[0]


def _whole_heads(q, k, v, scale):
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return (laid(x.swapaxes(1, 2)) for x in (q, k, v))


def _whole_spans(length: int) -> list[slice]:
    """The queries whose scores exist at a time: on CPU what its caches hold."""
    most = QUERIES if target.platform() == "cpu" else MORE_QUERIES
    size = most if length > 2 * most else length
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _whole_forward(q, k, v, seen, scale):
    qh, kh, vh = _whole_heads(q, k, v, scale)
    outs, tops, totals = [], [], []
    for some in _whole_spans(q.shape[1]):
        scores = dot("bnth,bnsh->bnts", qh[:, :, some], kh)
        if seen is not None:
            scores = jnp.where(_of_queries(seen, some)[:, None], scores, MASKED)
        tops.append(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - tops[-1])
        totals.append(weights.sum(-1, keepdims=True))
        outs.append(dot("bnts,bnsh->bnth", weights.astype(v.dtype), vh) / totals[-1])
    out, top, total = (jnp.concatenate(parts, axis=2) for parts in (outs, tops, totals))
    out = out.astype(v.dtype).swapaxes(1, 2)
    # Apart: of a row without a real token their logarithms' sum would lose the second.
    return out, (q, k, v, seen, out, top.swapaxes(2, 3), total.swapaxes(2, 3))


def _whole_backward(scale, residuals, slope):
    q, k, v, seen, out, top, total = residuals
    qh, kh, vh = _whole_heads(q, k, v, scale)
    shared = (slope.astype(jnp.float32) * out).sum(-1).swapaxes(1, 2)[:, :, None]
    slope = laid(slope.swapaxes(1, 2))
    q_slopes, k_slope, v_slope = [], 0.0, 0.0
    for some in _whole_spans(q.shape[1]):
        scores = dot("bnsh,bnth->bnst", kh, qh[:, :, some])
        if seen is not None:
            pairs = _of_queries(seen, some).swapaxes(1, 2)[:, None]
            scores = jnp.where(pairs, scores, MASKED)
        weights = jnp.exp(scores - top[..., some]) / total[..., some]
        change = dot("bnsh,bnth->bnst", vh, slope[:, :, some])
        change = (weights * (change - shared[..., some])).astype(q.dtype)
        if seen is not None:  # a row without a real token weighs all, but by no score
            change = jnp.where(pairs, change, 0)
        # XLA widens this one: turning takes longer.
        q_slopes.append(dot("bnst,bnsh->bnth", change, kh) * scale)
        k_slope += dot("bnst,bnth->bnsh", change, qh[:, :, some])
        v_slope += dot("bnst,bnth->bnsh", weights.astype(v.dtype), slope[:, :, some])
    slopes = jnp.concatenate(q_slopes, axis=2), k_slope, v_slope
    return *(x.swapaxes(1, 2).astype(q.dtype) for x in slopes), None


def _of_queries(seen, some):
    return seen if seen.shape[1] == 1 else seen[:, some]


_whole.defvjp(_whole_forward, _whole_backward)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    segments: Int[Array, "B T"] | None,
    *,
    scale: float,
    window: int | None = None,
    keep: Bool[Array, "B T T"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention within segments and, if given, a sliding window; see the module's text.

    `keep` further says which pairs of (query, key) are seen.
    """
    if implementation == "reference":
        mask = causal_mask(segments, q.shape[1], window)
        return masked_attention(q, k, v, mask if keep is None else mask & keep, scale)
    if implementation is None:
        implementation = preferred(q)
        if implementation in KERNELS and target.partitioned():
            implementation = "blocks"
    if implementation == "blocks" or keep is not None:
        return _blocks(q, k, v, segments, keep, scale, window)
    return {"cudnn": _cudnn, "splash": _splash}[implementation](q, k, v, segments, scale, window)


def preferred(q: Float[Array, "B T N H"]) -> Implementation:
    """What is fastest where `q` will be computed, on one device."""
    backend, (_, length, _, width) = target.platform(), q.shape
    if backend == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        hopper = float(target.devices()[0].compute_capability) >= 9
        if width % 8 == 0 and width <= (256 if hopper else 128):
            return "cudnn"
    if backend == "tpu" and length % 128 == 0:
        return "splash"
    return "blocks"


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocks(q, k, v, segments, keep, scale, window):
    """Blocks of queries against only the keys that they can see: half the work of the square.

    The backward pass makes the weights anew from each row's log-sum-exp (as FlashAttention does,
    arXiv 2205.14135), so a block's square is stored nowhere.
    """
    return _blocks_forward(q, k, v, segments, keep, scale, window)[0]


def spans(length: int, window: int | None, least: int = 128) -> Iterator[tuple[int, int, int]]:
    """(first query, end, first key) of each block; at most 8, each is code of its own."""
    block = max(least, -(-length // 8))
    for start in range(0, length, block):
        first = 0 if window is None else max(0, start - window + 1)
        yield start, min(start + block, length), first


def _heads_first(q, k, v, scale):
    """q [B, K, G, T, H], scaled; k and v [B, K, T, H]: products then need no transposition."""
    batch, length, num_heads, width = q.shape
    num_kv_heads = k.shape[2]
    q = (q * scale).astype(q.dtype)
    q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, width)
    return q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _scores(q, k, segments, keep, span, window):
    start, end, first = span
    mask = causal_mask(segments, end, window, start, first)
    if keep is not None:
        mask &= keep[:, start:end, first:end]
    scores = dot("bkgth,bksh->bkgts", q[:, :, :, start:end], k[:, :, first:end])
    return jnp.where(mask[:, None, None], scores, MASKED)


def _blocks_forward(q, k, v, segments, keep, scale, window):
    heads = _heads_first(q, k, v, scale)
    outputs, sums = [], []
    for span in spans(q.shape[1], window):
        scores = _scores(*heads[:2], segments, keep, span, window)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        values = heads[2][:, :, span[2] : span[1]]
        outputs.append(dot("bkgts,bksh->bkgth", weights.astype(v.dtype), values) / total)
        sums.append(top + jnp.log(total))
    out = jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4)
    out = out.reshape(*q.shape[:3], v.shape[-1]).astype(v.dtype)
    return out, (q, k, v, segments, keep, out, jnp.concatenate(sums, axis=3))


def _blocks_backward(scale, window, residuals, slope):
    q, k, v, segments, keep, out, log_sums = residuals
    qh, kh, vh = _heads_first(q, k, v, scale)
    by_head = (*qh.shape[:-1], v.shape[-1])
    slope = slope.swapaxes(1, 2).reshape(by_head)
    shared = (slope.astype(jnp.float32) * out.swapaxes(1, 2).reshape(by_head)).sum(-1)[..., None]
    q_slopes = []
    k_slope, v_slope = jnp.zeros(kh.shape, jnp.float32), jnp.zeros(vh.shape, jnp.float32)
    for span in spans(q.shape[1], window):
        start, end, first = span
        rows, keys = slice(start, end), slice(first, end)
        scores = _scores(qh, kh, segments, keep, span, window)
        weights = jnp.exp(scores - log_sums[:, :, :, rows])
        change = dot("bkgth,bksh->bkgts", slope[:, :, :, rows], vh[:, :, keys])
        change = (weights * (change - shared[:, :, :, rows])).astype(q.dtype)
        weights = weights.astype(v.dtype)
        q_slopes.append(dot("bkgts,bksh->bkgth", change, kh[:, :, keys]))
        k_part = dot("bkgts,bkgth->bksh", change, qh[:, :, :, rows])
        v_part = dot("bkgts,bkgth->bksh", weights, slope[:, :, :, rows])
        # Not `.at[].add`: a scatter, which XLA does not split by heads.
        k_slope = k_slope.at[:, :, keys].set(k_slope[:, :, keys] + k_part)
        v_slope = v_slope.at[:, :, keys].set(v_slope[:, :, keys] + v_part)
    q_slope = jnp.concatenate(q_slopes, axis=3).transpose(0, 3, 1, 2, 4).reshape(q.shape) * scale
    k_slope, v_slope = (
        k_slope.swapaxes(1, 2).astype(k.dtype),
        v_slope.swapaxes(1, 2).astype(v.dtype),
    )
    return q_slope.astype(q.dtype), k_slope, v_slope, None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _as_wide(v, q):
    """Values as wide as queries: MLA's and SAM's are narrower, and cuDNN wants one width."""
    return jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, max(0, q.shape[-1] - v.shape[-1]))))


def _cudnn(q, k, v, segments, scale, window):
    width, v = v.shape[-1], _as_wide(v, q)
    same = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=same, scale=scale, is_causal=True, local_window_size=local,
        implementation="cudnn",
    )  # fmt: skip
    return out[..., :width]


def _splash(q, k, v, segments, scale, window):
    splash = require("jax.experimental.pallas.ops.tpu.splash_attention")
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    one = splash.CausalMask((length, length))
    if window is not None:
        one = splash.LocalMask((length, length), (window - 1, 0), 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([one] * q.shape[2]),
        interpret=target.platform() == "cpu",  # slow: for tests
    )
    heads_first = [
        jnp.swapaxes(x, 1, 2) for x in (q * scale, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2))
    ]
    ids = () if segments is None else (splash.SegmentIds(q=segments, kv=segments),)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, *ids), 1, 2)
