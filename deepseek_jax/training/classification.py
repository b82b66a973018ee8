"""The classification objective: the fused answer's loss, and that of every modality's own head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.data.vision import Normalization
from deepseek_jax.models.fusion import FusedNetwork
from deepseek_jax.models.raw_inputs import inputs_of, presence
from deepseek_jax.ops.losses import class_losses, label_losses
from deepseek_jax.training.step import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Right answers of all modalities together, and of each alone."""

    alone: float = 1.0
    """Factor of each modality's own loss."""
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.alone <= 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"objective.alone ({self.alone}) must be above 0, for every head is trained, and "
                f"objective.label_smoothing ({self.label_smoothing}) lie in [0, 1)."
            )


def make_classification(
    config: Classification, model: FusedNetwork, preset: Normalization
) -> Objective:
    """The objective of a classifier of several modalities, on the batches of data/audiovisual
    and data/labelled; `preset` normalizes pixels.

    Terms: `loss` of the fused answer and, for each modality, `NAME_loss` of its own head, all of
    which are trained; `accuracy` and `NAME_accuracy` (of several labels: how many are right), and
    `NAME_weight`, the mean of what the fusion gives it. Means over the rows, or known labels, that
    have the modality.
    """
    c = model.config
    losses = label_losses if c.multi_label else class_losses

    def counts(batch: dict[str, Any]) -> dict[str, jax.Array]:
        """By modality, and under "" for the fusion: how many labels each row has for it."""
        known = batch["labels"] >= 0
        known = (known.sum(-1) if c.multi_label else known).astype(jnp.float32)
        there = presence(c, batch)
        sides = {"": there.any(-1)} | {name: there[:, i] for i, name in enumerate(c.names)}
        return {name: known * side for name, side in sides.items()}

    def weights_fn(batch: dict[str, Any]) -> dict[str, jax.Array]:
        found = {}
        for name, rows in counts(batch).items():
            found |= dict.fromkeys(_terms(name), rows.sum())
        some = presence(c, batch).any(-1).sum().astype(jnp.float32)
        return found | {f"{name}_weight": some for name in c.names}

    def loss_fn(params: Any, batch: dict[str, Any], key: jax.Array) -> tuple[dict, dict]:
        answer = model.apply(params, **inputs_of(c, batch, preset), key=key)
        sums = {}
        logits = {"": answer.logits} | {n: answer.alone[:, i] for i, n in enumerate(c.names)}
        for name, rows in counts(batch).items():
            each, _ = losses(logits[name], batch["labels"], config.label_smoothing)
            values = jnp.where(rows > 0, each, 0.0), _right(logits[name], batch["labels"])
            for term, value in zip(_terms(name), values, strict=True):
                sums[term] = jnp.where(rows > 0, value, 0.0).sum()
        for i, name in enumerate(c.names):
            sums[f"{name}_weight"] = jax.lax.stop_gradient(answer.weights[:, i]).sum()
        weights = weights_fn(batch)
        return {term: (total, weights[term]) for term, total in sums.items()}, {}

    coefficients = {"loss": 1.0} | {f"{name}_loss": config.alone for name in c.names}
    return Objective(loss_fn, weights_fn, coefficients, {})


def _terms(name: str) -> tuple[str, str]:
    prefix = f"{name}_" if name else ""
    return f"{prefix}loss", f"{prefix}accuracy"


def _right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many of each row's known labels are right, float32 [B]."""
    if labels.ndim == 1:
        return (logits.argmax(-1) == labels).astype(jnp.float32)
    return (((logits > 0) == (labels > 0)) & (labels >= 0)).sum(-1).astype(jnp.float32)
