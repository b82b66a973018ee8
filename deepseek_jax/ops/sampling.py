"""Sampling: the next token from a row of logits, by temperature, top-k, top-p and repetition.

Repetition penalty: CTRL, arXiv 1909.05858, section 4.1, with negative logits multiplied so that
the penalty always lowers them; nucleus (top-p): arXiv 1904.09751. The order is that of HF's
processors. Rows do not touch each other: each has its own key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Sampling(NamedTuple):
    """How a token is drawn. None switches a part off; temperature None takes the likeliest.

    The numbers are leaves of a pytree: another temperature does not compile anything again.
    """

    temperature: float | Array | None = None
    top_k: int | Array | None = None
    top_p: float | Array | None = None
    repetition_penalty: float | Array | None = None


def penalized(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Array
) -> Float[Array, "B V"]:
    """The logits with those of tokens already seen made less likely (for a penalty above 1)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_k_only(logits: Float[Array, "B V"], top_k: int | Array) -> Float[Array, "B V"]:
    """The top_k largest logits of each row (and any that tie with the last); the others -inf."""
    rank = logits.shape[-1] - jnp.minimum(top_k, logits.shape[-1])
    ascending = jnp.sort(logits, axis=-1)
    return jnp.where(logits < ascending[:, rank, None], -jnp.inf, logits)


def top_p_only(logits: Float[Array, "B V"], top_p: float | Array) -> Float[Array, "B V"]:
    """The fewest likeliest logits whose probability reaches top_p (at least one); others -inf."""
    ascending = jnp.sort(logits, axis=-1)
    # Summed from the small end, where float32 still tells 1 - top_p from the tail.
    tail = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = jnp.where(tail > 1 - top_p, ascending, jnp.inf)
    least = jnp.minimum(jnp.min(kept, axis=-1, keepdims=True), ascending[:, -1:])
    return jnp.where(logits < least, -jnp.inf, logits)


def row_keys(key: Key[Array, ""], positions: Int[Array, " B"]) -> Key[Array, " B"]:
    """A key a row that depends on its number and the position to fill, not on other rows."""
    rows = jnp.arange(positions.shape[0])
    return jax.vmap(lambda r, p: jax.random.fold_in(jax.random.fold_in(key, r), p))(rows, positions)


def draw(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """One token a row. `seen`, needed with a repetition penalty, marks the row's tokens so far."""
    if sampling.repetition_penalty is not None:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1)
    # From the largest down, so that a tiny temperature gives -inf, never inf - inf.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = top_k_only(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p_only(logits, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits)
