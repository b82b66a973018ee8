"""Connectionist temporal classification: labels without knowing which frame speaks which.

Graves et al., "Connectionist temporal classification", ICML 2006. The sum over alignments is
optax's.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def ctc_losses(
    logits: Float[Array, "B T V"],
    counts: Int[Array, " B"],
    labels: Int[Array, "B U"],
    blank_id: int = 0,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Each row's -log p(labels | its first `counts` frames), and whether that is possible at all.

    Labels below 0, and blanks, are padding. A row with fewer frames than labels (and a blank
    between two that are alike) has p = 0: its loss and slope are 0 here, not infinite.
    """
    padding = (labels < 0) | (labels == blank_id)
    order = jnp.argsort(padding, axis=1, stable=True)  # padding goes to the end
    labels = jnp.take_along_axis(jnp.where(padding, 0, labels), order, axis=1)
    lengths = labels.shape[1] - padding.sum(1)
    past = jnp.arange(labels.shape[1])[None] >= lengths[:, None]
    alike = (labels[:, 1:] == labels[:, :-1]) & ~past[:, 1:]
    possible = counts >= lengths + alike.sum(1)
    silent = (jnp.arange(logits.shape[1])[None] >= counts[:, None]).astype(jnp.float32)
    logits = jnp.where(possible[:, None, None], logits.astype(jnp.float32), 0)
    losses = optax.ctc_loss(logits, silent, labels, past.astype(jnp.float32), blank_id=blank_id)
    return jnp.where(possible, losses, 0), possible


def ctc_greedy(
    logits: Float[Array, "B T V"], counts: Int[Array, " B"], blank_id: int = 0
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """The likeliest token of each frame, repetitions and blanks taken out: ids, then -1; how many.

    Two frames in a row that say the same are one token; a blank between them makes them two.
    """
    ids = jnp.argmax(logits, axis=-1)
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    real = jnp.arange(ids.shape[1])[None] < counts[:, None]
    kept = (ids != blank_id) & (ids != before) & real
    order = jnp.argsort(~kept, axis=1, stable=True)
    ids = jnp.take_along_axis(jnp.where(kept, ids, -1), order, axis=1)
    return ids, kept.sum(1)


def ctc_reduced(
    losses: Float[Array, " B"], labels: Int[Array, "B U"], blank_id: int, reduction: str
) -> Float[Array, ""]:
    """Losses as torch's CTCLoss puts them together: "sum", or "mean" of losses a label."""
    if reduction == "sum":
        return losses.sum()
    lengths = ((labels >= 0) & (labels != blank_id)).sum(1)
    return jnp.mean(losses / jnp.maximum(lengths, 1))
