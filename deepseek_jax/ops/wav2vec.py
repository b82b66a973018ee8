"""What wav2vec 2.0 is pretrained with: masked spans, codes, distractors, two losses.

arXiv 2006.11477, sections 2 and 3. A frame's features become a code in each group (a straight-
through Gumbel softmax, arXiv 1611.01144); from a masked frame's hidden state its own codes are to
be told from those of other masked frames of the same row. Codebooks die: `is_dead` says so.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from deepseek_jax.ops.matmul import dot


def _row_keys(key: Key[Array, ""], rows: int) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def span_mask(
    key: Key[Array, ""],
    counts: Int[Array, " B"],
    length: int,
    *,
    share: float,
    span: int,
    least: int = 0,
) -> Bool[Array, "B {length}"]:
    """Which frames are masked: spans of `span` frames that begin anywhere and may overlap.

    A row has share * count / span of them, rounded at random, at least `least` and as many as fit
    next to each other into its `counts` frames. They depend on the key, the row's number and its
    count alone. Fewer than `share` of the frames are masked, for spans overlap.
    """

    def of_row(key: Array, count: Array) -> Array:
        rounding, order = jax.random.split(key)
        wanted = share * count / span + jax.random.uniform(rounding)
        wanted = jnp.clip(wanted.astype(int), least, None)
        wanted = jnp.minimum(wanted, count // span)
        place = jnp.arange(length)
        drawn = jnp.where(place <= count - span, jax.random.uniform(order, (length,)), jnp.inf)
        begins = jnp.argsort(jnp.argsort(drawn)) < wanted
        begun = jnp.cumsum(begins)
        return begun > jnp.pad(begun, (span, 0))[:length]

    return jax.vmap(of_row)(_row_keys(key, counts.shape[0]), counts)


def distractors(
    key: Key[Array, ""], masked: Bool[Array, "B T"], count: int
) -> Int[Array, "B T {count}"]:
    """For each masked frame the places of `count` other masked frames of its row, with repetition.

    What stands at frames that are not masked means nothing; a row's only masked frame gets itself.
    """

    def of_row(key: Array, masked: Array) -> Array:
        total = masked.sum()
        rank = (jnp.cumsum(masked) - 1)[:, None]
        drawn = jax.random.randint(key, (*masked.shape, count), 0, jnp.maximum(total - 1, 1))
        drawn = drawn + (drawn >= rank)  # any but its own
        places = jnp.argsort(~masked, stable=True)
        return places[jnp.minimum(drawn, jnp.maximum(total - 1, 0))]

    return jax.vmap(of_row)(_row_keys(key, masked.shape[0]), masked)


def chosen_codes(
    logits: Float[Array, "B T G V"],
    key: Key[Array, ""] | None = None,
    temperature: float | Float[Array, ""] = 2.0,
    hard: bool = True,
) -> Float[Array, "B T G V"]:
    """A weight for each code of a group: softmax((logits + Gumbel noise) / temperature).

    `hard`: 1 for the largest, 0 for others, with the softmax's slope. Without a key the likeliest
    code, without noise and without a slope.
    """
    if key is None:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    soft = jax.nn.softmax((logits.astype(jnp.float32) + noise) / temperature, axis=-1)
    if not hard:
        return soft
    largest = jax.nn.one_hot(jnp.argmax(soft, axis=-1), logits.shape[-1])
    return largest + (soft - jax.lax.stop_gradient(soft))  # the value is exactly 0 or 1


def perplexity(weights: Float[Array, "B T G V"], masked: Bool[Array, "B T"]) -> Float[Array, " G"]:
    """How many codes of each group are in use: exp of the entropy of their mean over `masked`.

    Between 1 and V; 1 where nothing is masked.
    """
    picked = weights.astype(jnp.float32) * masked[..., None, None]
    mean = picked.sum((0, 1)) / jnp.maximum(masked.sum(), 1)
    used = mean > 0  # 0 log 0 = 0
    logs = jnp.log(jnp.where(used, mean, 1.0))
    return jnp.exp(-jnp.sum(mean * logs, axis=-1))


def is_dead(
    perplexity: Float[Array, " G"], num_codes: int, share: float = 0.05
) -> Bool[Array, " G"]:
    """Whether a group uses less than `share` of its codes: then nothing more is learned from it."""
    return perplexity < share * num_codes


def diversity_loss(
    perplexity: Float[Array, " G"], num_codes: int, count: Int[Array, ""]
) -> Float[Array, ""]:
    """The share of all codes that is not in use, times `count` (of masked frames)."""
    total = perplexity.shape[0] * num_codes
    return (total - perplexity.sum()) / total * count


def contrastive_scores(
    predicted: Float[Array, "B T Q"],
    targets: Float[Array, "B T Q"],
    codes: Int[Array, "B T G"],
    others: Int[Array, "B T M"],
    temperature: float = 0.1,
) -> tuple[Float[Array, "B T 1"], Float[Array, "B T M"]]:
    """s(t, t) and s(t, others[m]), where s(t, u) = cosine(predicted[t], targets[u]) / temperature.

    Others with the very codes of t are no distractors: their scores are minus infinity.
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16))
        return x / length

    predicted, targets = unit(predicted), unit(targets)
    own = jnp.sum(predicted * targets, axis=-1, keepdims=True) / temperature
    # All pairs of a row cost less than a copy of the targets for each frame.
    pairs = dot("btq,bsq->bts", predicted, targets) / temperature
    apart = jnp.take_along_axis(pairs, others, axis=2)
    theirs = jax.vmap(lambda row, places: row[places])(codes, others)
    alike = (theirs == codes[:, :, None]).all(-1)
    return own, jnp.where(alike, -jnp.inf, apart)


def contrastive_loss(
    own: Float[Array, "B T 1"], apart: Float[Array, "B T M"], masked: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over masked frames t of -log(exp(s(t, t)) / (exp(s(t, t)) + sum_m exp(s(t, others[m])))),
    of `contrastive_scores`."""
    total = jax.nn.logsumexp(jnp.concatenate([own, apart], axis=-1), axis=-1)
    return jnp.sum(jnp.where(masked, total - own[..., 0], 0.0))


def contrastive_hits(
    own: Float[Array, "B T 1"], apart: Float[Array, "B T M"], masked: Bool[Array, "B T"]
) -> Int[Array, ""]:
    """How many masked frames have their own codes above all distractors'; a tie is no hit.

    Nor is a frame all of whose distractors have its codes: there is nothing to tell apart.
    """
    best = apart.max(-1)
    return jnp.sum(masked & (own[..., 0] > best) & (best > -jnp.inf))
