"""Which tokens of a row see later ones: an image's, or a whole question's.

A decoder is causal. What is given at once may be seen at once, though: the tokens of an image, or,
as PaliGemma has it (arXiv 2407.07726, section 3.2.1), image and question together, while the answer
stays causal. `sources` are those of `models.vision_language`; packed rows keep to their segments.
"""

import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from deepseek_jax.data.tiles import TEXT

Prefix: TypeAlias = Literal["causal", "images", "question"]


def reach_of(
    prefix: Prefix,
    sources: Int[Array, "B T"] | None,
    segments: Int[Array, "B T"] | None,
    learned: Bool[Array, "B T"] | None = None,
) -> Int[Array, "B T"] | None:
    """Where in its row the last token stands that each one sees; None: its own place.

    `learned` says of which tokens the follower is an answer's, as a batch's weights do.
    """
    if prefix == "causal" or sources is None:
        return None
    if prefix == "images":
        return ends(sources > TEXT, segments)
    return ends(asked(sources, segments, learned), segments)


def ends(together: Bool[Array, "B T"], segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Where the last of those stands that are together with each token; of others their place.

    Tokens that touch are together, but not across segments.
    """
    length = together.shape[1]
    goes_on = together[:, :-1] & together[:, 1:]
    if segments is not None:
        goes_on &= segments[:, :-1] == segments[:, 1:]
    goes_on = jnp.pad(goes_on, ((0, 0), (0, 1)))
    found = jnp.where(goes_on, length, jnp.arange(length)[None])
    return jax.lax.cummin(found, axis=1, reverse=True)


def asked(
    sources: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    learned: Bool[Array, "B T"] | None,
) -> Bool[Array, "B T"]:
    """Which tokens are their segment's question: up to the one that the first answer follows.

    Without `learned` there is no answer yet. A segment of text alone has no question.
    """
    if segments is None:
        segments = jnp.ones_like(sources)
    last = ends(jnp.ones_like(segments, bool), segments)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(begins, jnp.arange(begins.shape[1])[None], 0), axis=1)

    def before(marks: Bool[Array, "B T"]) -> Int[Array, "B T"]:
        """How many of a row's stand before each token."""
        return jnp.cumsum(marks, axis=1) - marks

    at, media = functools.partial(jnp.take_along_axis, axis=1), sources > TEXT
    found = at(before(media) + media, last) > at(before(media), first)
    if learned is None:
        return found
    return found & (before(learned) == at(before(learned), first))
