"""The classification objective: the fused answer's loss, and that of every modality's own head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audiovisual import RATE
from deepseek_jax.data.vision import Normalization, normalized
from deepseek_jax.models.audio import Wav2Vec2, Whisper
from deepseek_jax.models.encoder import EncoderConfig
from deepseek_jax.models.fusion import Fused, FusedNetwork
from deepseek_jax.models.stream import Stream
from deepseek_jax.models.swin import Swin
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.vit import ViT
from deepseek_jax.ops import signal
from deepseek_jax.ops.losses import class_losses, label_losses
from deepseek_jax.training.contrastive import texts_of
from deepseek_jax.training.step import Objective

WINDOW, HOP = 400, 160  # Whisper's frames: 25 and 10 ms


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


def encoder_inputs(
    encoder: EncoderConfig, raw: jax.Array, preset: Normalization
) -> dict[str, jax.Array]:
    """What an encoder takes of raw data: uint8 pixels, waves of 16 kHz, tokens (-1 behind the end).

    Raises InputError for an encoder that takes none of these, and for a wave not of its length.
    """
    match encoder:
        case ViT() | Swin():
            return {"images": normalized(raw, preset)}
        case Whisper():
            wanted = 2 * encoder.num_positions * HOP
            if raw.shape[1] != wanted:
                raise InputError(
                    f"sounds have {raw.shape[1]} samples, and {encoder.num_positions} positions "
                    f"are those of {wanted}: set sequence_length"
                )
            return {"mel": signal.log_mel(raw, signal.mel_filters(encoder.num_mels, WINDOW, RATE))}
        case Wav2Vec2():
            return {"wave": signal.normalized(raw)}
        case Stream():
            return {"wave": raw}
        case TextTower():
            return texts_of(raw)
    raise InputError(f"classification has no data for an encoder of kind {type(encoder).__name__}")


def inputs_of(config: Fused, batch: dict[str, Any], preset: Normalization) -> dict[str, Any]:
    """What a classifier takes of a batch (see data/audiovisual): its `inputs` and `present`."""
    inputs = {
        m.name: encoder_inputs(m.encoder, batch["inputs"][m.name], preset)
        for m in config.modalities
    }
    return {"inputs": inputs, "present": presence(config, batch)}


def presence(config: Fused, batch: dict[str, Any]) -> jax.Array:
    """Which modalities each row has, in the config's order: bool [B, M]."""
    return jnp.stack([batch["present"][name] for name in config.names], 1)


def make_classification(
    config: Classification, model: FusedNetwork, preset: Normalization
) -> Objective:
    """The objective of a classifier of several modalities, on the batches of data/audiovisual.

    `preset` normalizes pixels.
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
