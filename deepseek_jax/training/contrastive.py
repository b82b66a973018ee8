"""The contrastive objective: two towers brought together by pairs of images and captions.

CLIP's softmax (arXiv 2103.00020) or, where the model has a bias, SigLIP's sigmoid (2303.15343),
over the whole batch on any mesh: see layers/contrastive.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.data.vision import normalized
from deepseek_jax.layers.contrastive import contrastive_terms
from deepseek_jax.models.two_tower import Towers
from deepseek_jax.ops.alignment import collapse_signs, collapse_warning, guessing_loss
from deepseek_jax.ops.contrastive import temperature
from deepseek_jax.training.step import Objective

BEGUN = 100  # steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Pairs near each other, everything else apart."""

    chunk: int = 512
    """Columns whose logits exist at a time."""

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"objective.chunk ({self.chunk}) must be at least 1.")


def inputs_of(batch: dict[str, Any], preset: str) -> dict[str, jax.Array]:
    """What the towers take of a batch of data/pairs: normalized pixels, tokens, a mask."""
    return {"images": normalized(batch["images"], preset), **texts_of(batch["tokens"])}


def texts_of(tokens: jax.Array) -> dict[str, jax.Array]:
    """What a text tower takes of rows of tokens that are -1 behind their ends."""
    return {"tokens": jnp.maximum(tokens, 0), "mask": tokens >= 0}


def make_contrastive(config: Contrastive, model: Towers, preset: str) -> Objective:
    """The objective of two towers on the batches of data/pairs; `preset` normalizes pixels.

    Terms, means over rows: `loss`; reports `recall_at_1`, `recall_at_1_back` (within the batch),
    `positive_cosine`, `negative_cosine`; and of a microbatch each `guessing_loss` (what the loss is
    where nothing is learned), `temperature`, and of the images' vectors `mean_cosine` and
    `effective_rank`: near 1, either says that they have collapsed (`collapse`).
    """
    kind = model.config.loss
    means = ("loss", "recall_at_1", "recall_at_1_back", "positive_cosine", "negative_cosine")
    single = ("guessing_loss", "temperature", "mean_cosine", "effective_rank")

    def weights_fn(batch: dict[str, Any]) -> dict[str, jax.Array]:
        rows = jnp.float32(batch["tokens"].shape[0])
        return dict.fromkeys(means, rows) | dict.fromkeys(single, jnp.float32(1))

    def loss_fn(params: Any, batch: dict[str, Any], key: jax.Array) -> tuple[dict, dict]:
        del key  # nothing in this model is random
        pair = model.apply(params, **inputs_of(batch, preset))
        bias = pair.bias if kind == "sigmoid" else None
        given = pair.image, pair.text, pair.log_scale, bias, batch["groups"]
        terms = contrastive_terms(*given, kind=kind, chunk=config.chunk)
        rows = jnp.float32(batch["tokens"].shape[0])
        signs = collapse_signs(pair.image)
        signs["guessing_loss"] = guessing_loss(kind, rows)
        signs["temperature"] = jax.lax.stop_gradient(temperature(pair.log_scale))
        return terms | {name: (signs[name], jnp.float32(1)) for name in single}, {}

    return Objective(loss_fn, weights_fn, {"loss": 1.0}, {})


def collapse(step: int, values: Mapping[str, float]) -> str | None:
    """A sentence where a step's metrics say that the towers' vectors have become one.

    That a loss is no better than guessing means something only once a model has begun to learn.
    """
    if "mean_cosine" not in values:
        return None
    begun = [values[name] for name in ("loss", "guessing_loss")] if step > BEGUN else []
    return collapse_warning(values["mean_cosine"], *begun)
