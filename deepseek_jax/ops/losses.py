"""Cross-entropy from hidden states, a chunk of tokens at a time: the whole logits never exist.

The forward pass already holds each chunk's logits, so it computes the gradients too (three matmuls
where recomputing the logits takes four) and the backward pass only scales them.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.matmul import dot, turned


def token_losses(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    chunk: int = 512,
) -> Float[Array, " N"]:
    """Negative log-likelihood of every token, float32, in nats. For evaluation: no z-loss."""

    def of_chunk(inputs):
        return _negative_log_likelihood(dot("nd,dv->nv", inputs[0], head), inputs[1])[0]

    head = head.astype(hidden.dtype)
    return _joined(jax.lax.map(of_chunk, _chunks(chunk, hidden, targets)), hidden.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    z_weight: float = 0.0,
    chunk: int = 512,
    axis: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over tokens: nll + z_weight * lse^2, and its two parts apart.

    Only the first sum is differentiable (in hidden and head); the parts are for reading.
    z-loss: PaLM, arXiv 2204.02311, section 5.

    In a per-device function whose devices along `axis` each have a part of the vocabulary, in
    order, and the same tokens, all get the sums. Each then gets its part of the slope of hidden, to
    be added up by whoever calls, given its part of the slope of the sums: as of a psum.
    """
    # Its slopes are dead code here, which XLA removes.
    return _cross_entropy_forward(hidden, head, targets, weights, z_weight, chunk, axis)[0]


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Each array as [chunks, chunk, ...], zero-padded.

    A chunk is every n-th token, so that tokens sharded over devices stay where they are: of a
    chunk of neighbors every device would compute all.
    """
    size = arrays[0].shape[0]
    count = max(1, -(-size // chunk))
    per_chunk = -(-size // count)
    pad = count * per_chunk - size
    return tuple(
        jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1))
        .reshape(per_chunk, count, *a.shape[1:])
        .swapaxes(0, 1)
        for a in arrays
    )


def _joined(chunks: Array, size: int) -> Array:
    """[chunks, chunk, ...] as the tokens in their order."""
    return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])[:size]


def _negative_log_likelihood(logits, targets, axis=None):
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    if axis is None:
        lse = jnp.log(jnp.exp(logits - top).sum(-1)) + top[:, 0]
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return lse - chosen, lse
    top, width = jax.lax.pmax(top, axis), logits.shape[-1]
    mine = (targets >= 0) & (targets < width)
    chosen = jnp.take_along_axis(logits, jnp.where(mine, targets, 0)[:, None], axis=-1)[:, 0]
    parts = jnp.exp(logits - top).sum(-1), jnp.where(mine, chosen, 0.0)
    total, chosen = jax.lax.psum(parts, axis)
    lse = jnp.log(total) + top[:, 0]
    return lse - chosen, lse


def _cross_entropy_forward(hidden, head, targets, weights, z_weight, chunk, axis):
    def of_chunk(sums, inputs):
        chunk_hidden, chunk_targets, chunk_weights = inputs
        logits = dot("nd,dv->nv", chunk_hidden, narrow)
        nll, lse = _negative_log_likelihood(logits, chunk_targets, axis)
        scale = chunk_weights * (1.0 + 2.0 * z_weight * lse)
        hot = jnp.arange(logits.shape[-1])[None, :] == chunk_targets[:, None]
        slope = jnp.exp(logits - lse[:, None]) * scale[:, None]
        slope = (slope - jnp.where(hot, chunk_weights[:, None], 0.0)).astype(hidden.dtype)
        slope = jax.lax.optimization_barrier(slope)  # made once for both products
        hidden_slope = dot("nv,dv->nd", slope, narrow)
        head_slope = dot("dn,nv->dv", turned(chunk_hidden), slope)
        parts = (chunk_weights * nll).sum(), (chunk_weights * lse**2).sum()
        sums = (sums[0] + parts[0], sums[1] + parts[1], sums[2] + head_slope)
        return sums, hidden_slope  # float32 until scaled: float16 would lose small slopes

    narrow, zero = head.astype(hidden.dtype), jnp.zeros((), jnp.float32)
    if axis is not None:
        targets = targets - jax.lax.axis_index(axis) * head.shape[1]
    chunks = _chunks(chunk, hidden, targets, weights)
    start = (zero, zero, jnp.zeros(head.shape, jnp.float32))
    (nll, z, head_slope), hidden_slope = jax.lax.scan(of_chunk, start, chunks)
    hidden_slope = _joined(hidden_slope, hidden.shape[0])
    # Hidden and head are kept only for their dtypes; XLA drops what is not read.
    return (nll + z_weight * z, nll, z), (hidden_slope, head_slope, hidden, head)


def _cross_entropy_backward(z_weight, chunk, axis, residuals, slopes):
    hidden_slope, head_slope, hidden, head = residuals
    slope = slopes[0] if axis is None else jax.lax.psum(slopes[0], axis)
    hidden_slope = (hidden_slope * slope).astype(hidden.dtype)
    return hidden_slope, (head_slope * slope).astype(head.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def class_losses(
    logits: Float[Array, "B V"], labels: Int[Array, " B"], smoothing: float = 0.0
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Each row's cross-entropy with its class, float32, and 1; both 0 where the class is -1.

    `smoothing` of the probability is spread evenly over all classes (arXiv 1512.00567, section 7).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    loss = -(1 - smoothing) * own - smoothing * log_p.mean(-1)
    return jnp.where(labels >= 0, loss, 0.0), (labels >= 0).astype(jnp.float32)


def label_losses(
    logits: Float[Array, "B V"], labels: Int[Array, "B V"], smoothing: float = 0.0
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Each row's sum of its labels' binary cross-entropies, float32, and how many are known.

    A label is 1 or 0, or -1 where it is not known, which has no effect. `smoothing` of it is one
    half.
    """
    known, z = labels >= 0, logits.astype(jnp.float32)
    target = (1 - smoothing) * labels.astype(jnp.float32) + smoothing / 2
    loss = jnp.where(known, jax.nn.softplus(z) - z * target, 0.0)
    return loss.sum(-1), known.sum(-1).astype(jnp.float32)
