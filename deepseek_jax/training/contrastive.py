"""The contrastive objective: two towers brought together by pairs of images and captions.

CLIP's softmax (arXiv 2103.00020) or, where the model has a bias, SigLIP's sigmoid (2303.15343),
over the whole batch on any mesh: see layers/contrastive. Two further losses may stand beside it:
the captioner's (CoCa, 2205.01917), and an alignment of single tokens, each caption's with the part
of the image that it is most like (after FILIP, 2111.07783; the mixture is soft).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.vision import normalized
from deepseek_jax.layers.contrastive import contrastive_terms
from deepseek_jax.models.raw_inputs import texts_of
from deepseek_jax.models.two_tower import Towers
from deepseek_jax.ops.alignment import (
    alignment_terms,
    collapse_signs,
    collapse_warning,
    guessing_loss,
    uncertainty_terms,
)
from deepseek_jax.ops.contrastive import temperature
from deepseek_jax.ops.matmul import dot
from deepseek_jax.training.language import entropy
from deepseek_jax.training.step import Objective

BEGUN = 100  # steps
SHARPNESS = 0.1  # temperature of a token's attention to its image's parts: a cosine's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Pairs near each other, everything else apart.

    The total is weight * loss, summed over the three losses whose weight is not 0.
    """

    contrastive_weight: float = 1.0
    caption_weight: float = 0.0
    """Of the next-token loss of the model's captioner."""
    alignment_weight: float = 0.0
    """Of 1 - cosine between a caption's token and what it attends to of its image."""
    chunk: int = 512
    """Columns whose logits exist at a time."""
    token_dropout: float = 0.0
    """Share of a caption's tokens that the text tower does not see, drawn anew every step."""

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"objective.chunk ({self.chunk}) must be at least 1.")
        weights = self.contrastive_weight, self.caption_weight, self.alignment_weight
        if min(weights) < 0 or not any(weights):
            raise ValueError(
                f"objective's weights of contrastive, caption and alignment loss are {weights}: "
                "none may be negative, and not all 0."
            )
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"objective.token_dropout ({self.token_dropout}) must lie in [0, 1).")


def inputs_of(batch: dict[str, Any], preset: str) -> dict[str, jax.Array]:
    """What the towers take of a batch of data/pairs: normalized pixels, tokens, a mask."""
    return {"images": normalized(batch["images"], preset), **texts_of(batch["tokens"])}


def thinned(mask: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """A mask [B, T] without a random share of its places; each row's first stays."""
    kept = jax.random.uniform(key, mask.shape) >= share
    return mask & kept.at[:, 0].set(True)


def make_contrastive(config: Contrastive, model: Towers, preset: str) -> Objective:
    """The objective of two towers on the batches of data/pairs; `preset` normalizes pixels.

    Terms, means over rows: `loss`; reports `recall_at_1`, `recall_at_1_back` (within the batch),
    `positive_cosine`, `negative_cosine`; means over tokens, where they are weighed: `caption_loss`,
    `alignment_loss`; and of a microbatch each `guessing_loss` (what the loss is where nothing is
    learned), `temperature`, and of the images' vectors `mean_cosine` and `effective_rank`: near 1,
    either says that they have collapsed (`collapse`). With the model's `learned_weights` it is
    `learned/NAME` that is minimized (`ops.alignment.uncertainty_terms`). Raises InputError where
    the model lacks what a weighed loss needs.
    """
    kind, c = model.config.loss, model.config
    means = ("loss", "recall_at_1", "recall_at_1_back", "positive_cosine", "negative_cosine")
    single = ("guessing_loss", "temperature", "mean_cosine", "effective_rank")
    weights = {
        "loss": config.contrastive_weight,
        "caption_loss": config.caption_weight,
        "alignment_loss": config.alignment_weight,
    }
    for name, there, needed in (
        ("caption", c.captioner is not None, "model.captioner"),
        ("alignment", c.aligns, "model.shared_dim, and no model.text.head_dim"),
    ):
        if weights[f"{name}_loss"] and not there:
            raise InputError(f"objective.{name}_weight is set; it needs {needed}")
    if c.captioner is not None and not config.caption_weight:
        raise InputError("model.captioner learns nothing: set objective.caption_weight, or drop it")
    places = {name: place for place, name in enumerate(weights) if weights[name]}
    coefficients = {f"learned/{x}" if c.learned_weights else x: weights[x] for x in places}

    def weights_fn(batch: dict[str, Any]) -> dict[str, jax.Array]:
        there = batch["tokens"] >= 0
        rows = jnp.float32(there.shape[0])
        found = dict.fromkeys(means, rows) | dict.fromkeys(single, jnp.float32(1))
        if config.caption_weight:
            found["caption_loss"] = there[:, 1:].sum().astype(jnp.float32)
        if config.alignment_weight:
            found["alignment_loss"] = there.sum().astype(jnp.float32)
        if c.learned_weights:
            found |= {f"learned/{name}": found[name] for name in places}
        return found

    def loss_fn(params: Any, batch: dict[str, Any], key: jax.Array) -> tuple[dict, dict]:
        inputs = inputs_of(batch, preset)
        there = inputs["mask"]
        if config.token_dropout:
            inputs["mask"] = thinned(there, config.token_dropout, key)
        pair = model.apply(params, **inputs)
        bias = pair.bias if kind == "sigmoid" else None
        given = pair.image, pair.text, pair.log_scale, bias, batch["groups"]
        terms = contrastive_terms(*given, kind=kind, chunk=config.chunk)
        rows = jnp.float32(batch["tokens"].shape[0])
        signs = collapse_signs(pair.image)
        signs["guessing_loss"] = guessing_loss(kind, rows)
        signs["temperature"] = jax.lax.stop_gradient(temperature(pair.log_scale))
        terms |= {name: (signs[name], jnp.float32(1)) for name in single}
        if config.caption_weight:
            follow = jnp.pad(there[:, 1:], ((0, 0), (0, 1)))
            targets = jnp.pad(inputs["tokens"][:, 1:], ((0, 0), (0, 1)))
            shown = follow.astype(jnp.float32)
            # One loss's collectives after the other's, backward in turn: devices that wait for each
            # other in two places at once may wait for ever.
            own = pair.written, model.caption_head(params), terms["loss"]
            written, head, terms["loss"] = jax.lax.optimization_barrier(own)
            nll, *_ = entropy(written, head, targets, shown, chunk=config.chunk)
            terms["caption_loss"] = nll, shown.sum()
        if config.alignment_weight:
            parts = attended(pair.text_tokens, pair.image_tokens)
            terms["alignment_loss"] = alignment_terms(pair.text_tokens, parts, there)
        if c.learned_weights:
            own = {name: pair.log_variances[place] for name, place in places.items()}
            learned = uncertainty_terms(terms, own)
            terms |= {f"learned/{name}": x for name, x in learned.items()}
        return terms, {}

    return Objective(loss_fn, weights_fn, coefficients, {})


def attended(words: jax.Array, parts: jax.Array) -> jax.Array:
    """What each word [B, T, E] attends to of its image's parts [B, P, E]: a mixture, softly."""
    likeness = dot("bte,bpe->btp", words, parts) / SHARPNESS
    return dot("btp,bpe->bte", jax.nn.softmax(likeness, axis=-1), parts)


def collapse(step: int, values: Mapping[str, float]) -> str | None:
    """A sentence where a step's metrics say that the towers' vectors have become one.

    That a loss is no better than guessing means something only once a model has begun to learn.
    """
    if "mean_cosine" not in values:
        return None
    begun = [values[name] for name in ("loss", "guessing_loss")] if step > BEGUN else []
    return collapse_warning(values["mean_cosine"], *begun)
