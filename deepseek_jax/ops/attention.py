"""Softmax attention: a reference, and the fastest available form for each backend.

`causal_attention` is the one place that chooses: blocks of queries on XLA (CPU, and wherever
nothing better applies), cuDNN through `jax.nn.dot_product_attention` on GPU, splash on TPU.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.core.extras import require

Implementation = Literal["reference", "blocks", "cudnn", "splash"]
MASKED = -1e30  # finite: a row with nothing to attend gives a uniform softmax, never NaN


def causal_mask(
    segments: Int[Array, "B T"] | None, length: int, window: int | None
) -> Bool[Array, "_ T T"]:
    """Who attends to whom in packed rows: earlier tokens of the same segment, within the window."""
    query, key = jnp.arange(length)[None, :, None], jnp.arange(length)[None, None, :]
    mask = query >= key
    if window is not None:
        mask &= query - key < window
    if segments is not None:
        mask &= segments[:, :, None] == segments[:, None, :]
    return mask


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Bool[Array, "_ T S"],
    scale: float,
) -> Float[Array, "B T N Hv"]:
    """Attention under an explicit mask, softmax in float32. Query head n reads kv head n // G."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    q = q.reshape(*q.shape[:2], num_kv_heads, num_heads // num_kv_heads, q.shape[-1])
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(*out.shape[:2], num_heads, v.shape[-1]).astype(v.dtype)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    segments: Int[Array, "B T"] | None,
    *,
    scale: float,
    window: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention within segments and, if given, a sliding window; see the module's text."""
    chosen = implementation or _fastest(q, k, v)
    if chosen == "cudnn":
        return _cudnn(q, k, v, segments, scale, window)
    if chosen == "splash":
        return _splash(q, k, v, segments, scale, window)
    if chosen == "reference":
        return masked_attention(q, k, v, causal_mask(segments, q.shape[1], window), scale)
    return _blocks(q, k, v, segments, scale, window)


def _fastest(q: Array, k: Array, v: Array) -> Implementation:
    backend = jax.default_backend()
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if backend == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        return "cudnn"
    if backend == "tpu" and q.shape[1] % 128 == 0 and jax.device_count() == 1:
        return "splash"  # a Pallas kernel: not partitioned automatically, so one device only
    return "blocks"


def _blocks(q, k, v, segments, scale, window):
    """Blocks of queries against only the keys that they can see: half the work of the square."""
    length = q.shape[1]
    block = max(128, -(-length // 8))  # at most 8 blocks: each is its own code in the program
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if window is None else max(0, start - window + 1)
        query = jnp.arange(start, end)[None, :, None]
        key = jnp.arange(first, end)[None, None, :]
        mask = query >= key
        if window is not None:
            mask &= query - key < window
        if segments is not None:
            mask &= segments[:, start:end, None] == segments[:, None, first:end]
        outputs.append(
            masked_attention(q[:, start:end], k[:, first:end], v[:, first:end], mask, scale)
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _cudnn(q, k, v, segments, scale, window):
    width = v.shape[-1]
    if width < q.shape[-1]:  # MLA's values are narrower than its keys; cuDNN wants one width
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - width)))
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True, local_window_size=local,
        implementation="cudnn",
    )  # fmt: skip
    return out[..., :width]


def _splash(q, k, v, segments, scale, window):
    splash = require("jax.experimental.pallas.ops.tpu.splash_attention")
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    one = splash.CausalMask((length, length))
    if window is not None:
        one = splash.LocalMask((length, length), (window - 1, 0), 0)
    kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([one] * q.shape[2]))
    heads_first = [
        jnp.swapaxes(x, 1, 2) for x in (q * scale, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2))
    ]
    if segments is None:
        out = jax.vmap(kernel)(*heads_first)
    else:
        ids = splash.SegmentIds(q=segments, kv=segments)
        out = jax.vmap(kernel)(*heads_first, ids)
    return jnp.swapaxes(out, 1, 2)
