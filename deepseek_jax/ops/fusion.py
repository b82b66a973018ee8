"""Fusion of modalities of which some are absent: weights over those present, dropout, masks.

Weights are a softmax over the present modalities of a score each: a task's gate, a confidence, or
a query's attention. They are at least 0 and sum to one; with nothing present all are 0. What stands
in an absent modality, NaN included, changes neither results nor gradients.

Confidence by energy: QMF, arXiv 2306.02050, whose code multiplies each modality's logits by
log-sum-exp / 10, without gradient. Bottlenecks and late joining: MBT, arXiv 2107.00135.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from deepseek_jax.ops.attention import MASKED
from deepseek_jax.ops.matmul import dot

BOTTLENECK = -1  # the stream of tokens through which the other streams exchange what they know
ENERGY = 10.0  # QMF's divisor


def where_present(
    x: Float[Array, "B M ..."], present: Bool[Array, "B M"]
) -> Float[Array, "B M ..."]:
    """x with zeros for what is absent; no slope goes there."""
    return jnp.where(present.reshape(present.shape + (1,) * (x.ndim - 2)), x, 0.0)


def present_softmax(
    scores: Float[Array, "B M"], present: Bool[Array, "B M"]
) -> Float[Array, "B M"]:
    """The softmax over the present modalities, float32: weights by a task's gate, its logits given.

    Zeros for a row without any, and zero gradients.
    """
    scores = jnp.where(present, scores.astype(jnp.float32), MASKED)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    terms = jnp.where(present, jnp.exp(scores - top), 0.0)
    total = terms.sum(-1, keepdims=True)
    return terms / jnp.where(total > 0, total, 1.0)


def entropy_weights(
    logits: Float[Array, "B M V"], present: Bool[Array, "B M"], sharpness: float = 1.0
) -> Float[Array, "B M"]:
    """Softmax of -sharpness * the entropy (nats) of each modality's own class distribution."""
    log_p = jax.nn.log_softmax(where_present(logits.astype(jnp.float32), present), axis=-1)
    return present_softmax(sharpness * (jnp.exp(log_p) * log_p).sum(-1), present)


def label_entropy_weights(
    logits: Float[Array, "B M V"], present: Bool[Array, "B M"], sharpness: float = 1.0
) -> Float[Array, "B M"]:
    """The same where each of V labels is there or not by itself: of their entropies' mean."""
    logits = where_present(logits.astype(jnp.float32), present)
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    negative = jnp.exp(yes) * yes + jnp.exp(no) * no
    return present_softmax(sharpness * negative.mean(-1), present)


def energy_weights(
    logits: Float[Array, "B M V"], present: Bool[Array, "B M"]
) -> Float[Array, "B M"]:
    """Softmax of QMF's confidence, log-sum-exp(logits) / 10, without gradient.

    QMF itself multiplies by the confidences; here they become weights that sum to one.
    """
    logits = where_present(jax.lax.stop_gradient(logits).astype(jnp.float32), present)
    return present_softmax(jax.nn.logsumexp(logits, axis=-1) / ENERGY, present)


def attention_weights(
    query: Float[Array, "B D"], embeddings: Float[Array, "B M D"], present: Bool[Array, "B M"]
) -> Float[Array, "B M"]:
    """Softmax of a query's dot products with the modalities' embeddings, over sqrt(D)."""
    scores = dot("bd,bmd->bm", query, where_present(embeddings, present))
    return present_softmax(scores / math.sqrt(query.shape[-1]), present)


def fused(
    x: Float[Array, "B M D"], weights: Float[Array, "B M"], present: Bool[Array, "B M"]
) -> Float[Array, "B D"]:
    """The weighted sum over present modalities, float32: late fusion of class logits, or of
    embeddings. Equal weights give the mean; zeros where nothing is present."""
    weights = jnp.where(present, weights, 0.0)
    return dot("bm,bmd->bd", weights, where_present(x, present).astype(jnp.float32))


def modality_dropout(
    key: Key[Array, ""], present: Bool[Array, "B M"], rate: float
) -> Bool[Array, "B M"]:
    """What stays of the present modalities, each dropped with probability `rate`.

    A row that would lose all keeps one of them, each as likely. Raises ValueError for a rate
    outside 0 to 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a modality's dropout rate is {rate}; it must lie between 0 and 1")
    for_drop, for_last = jax.random.split(key)
    kept = present & jax.random.bernoulli(for_drop, 1 - rate, present.shape)
    lots = jnp.where(present, jax.random.uniform(for_last, present.shape), -1.0)
    last = jax.nn.one_hot(lots.argmax(-1), present.shape[-1], dtype=bool) & present
    return jnp.where(kept.any(-1, keepdims=True), kept, last)


def token_streams(lengths: tuple[int, ...], bottlenecks: int = 0) -> Int[Array, "1 T"]:
    """The stream of each token of streams that stand behind each other, bottlenecks at the end."""
    streams = [i for i, length in enumerate(lengths) for _ in range(length)]
    return jnp.array([streams + [BOTTLENECK] * bottlenecks], jnp.int32)


def progressive_mask(
    streams: Int[Array, "_ T"], joint: bool | Bool[Array, ""], valid: Bool[Array, "B T"]
) -> Bool[Array, "_ T T"]:
    """Which token (rows) attends which: its own stream's; where `joint`, every stream's.

    `joint` is `layer >= first_joint_layer`, which may be traced: layers may be a scan. Tokens that
    are not `valid`, an absent modality's, are attended by nobody, nor attend: give them zeros
    (`where_present`), for no weight makes NaN nothing.
    """
    same = streams[:, :, None] == streams[:, None, :]
    return (same | joint) & valid[:, :, None] & valid[:, None, :]


def bottleneck_mask(
    streams: Int[Array, "_ T"], joint: bool | Bool[Array, ""], valid: Bool[Array, "B T"]
) -> Bool[Array, "_ T T"]:
    """As `progressive_mask`, but where `joint` streams see only their own tokens and bottlenecks.

    Bottlenecks then attend all tokens, in one softmax. (In MBT each stream updates them apart, and
    the results are averaged.) Below the joint layers they attend each other alone.
    """
    same = streams[:, :, None] == streams[:, None, :]
    through = (streams == BOTTLENECK)[:, :, None] | (streams == BOTTLENECK)[:, None, :]
    return (same | (through & joint)) & valid[:, :, None] & valid[:, None, :]
