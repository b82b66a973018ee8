"""Objectives of speech encoders: text by CTC, and wav2vec 2.0's pretraining (arXiv 2006.11477).

Both take the batches of data/utterances; what they compute stands in models/speech. Which frames a
row hides is a function of the row's number alone, so that their count is known of the batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.utterances import Utterances
from deepseek_jax.models.audio import CTC, Codebook, Wav2Vec2, frame_counts
from deepseek_jax.models.encoder import Encoder
from deepseek_jax.models.speech import WavePretraining, characters, hidden_frames, pretrained
from deepseek_jax.ops.ctc import ctc_losses
from deepseek_jax.ops.wav2vec import is_dead
from deepseek_jax.training.step import Objective

MASKS = 2006  # the key that rows' masks are drawn from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcription:
    """CTC: the characters of a text, wherever in the wave they are (Graves et al. 2006)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec(WavePretraining):
    """wav2vec 2.0's pretraining: what stands behind a masked frame is told from other frames'.

    Codes are drawn at a temperature of max(least, code_temperature * code_decay^step).
    """

    code_temperature: float = 2.0
    least_code_temperature: float = 0.5
    code_decay: float = 0.999995
    """Of the temperature, a step of the stage."""

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.least_code_temperature <= self.code_temperature):
            raise ValueError(
                f"objective.least_code_temperature ({self.least_code_temperature}) must lie above "
                f"0 and up to code_temperature ({self.code_temperature})."
            )
        if not 0 < self.code_decay <= 1:
            raise ValueError(f"objective.code_decay ({self.code_decay}) must lie in (0, 1].")


SpeechObjective: TypeAlias = Transcription | Wav2Vec
HEADS = {Transcription: CTC, Wav2Vec: Codebook}


def check_speech(
    model: Wav2Vec2, data: Utterances, objective: SpeechObjective, length: int, where: str = ""
) -> None:
    """ValueError, a full sentence with the numbers, unless these belong together."""
    wanted, found = HEADS[type(objective)], type(model.head)
    if found is not wanted:
        raise ValueError(
            f"{where}objective {type(objective).__name__} trains a model with a head of kind "
            f"{wanted.__name__}; model.head is {'None' if model.head is None else found.__name__}."
        )
    if isinstance(objective, Transcription) and not data.texts:
        raise ValueError(f"{where}objective Transcription needs data.texts.")
    if length < data.least_samples:
        raise ValueError(
            f"{where}sequence_length ({length} samples) is less than data.min_seconds "
            f"({data.min_seconds:g} at {data.rate} a second)."
        )
    least = objective.mask_span if isinstance(objective, Wav2Vec) else 1
    frames = model.num_frames(data.least_samples) if data.least_samples else 0
    if frames < least:
        raise ValueError(
            f"{where}data.min_seconds ({data.min_seconds:g} at {data.rate} samples a second) makes "
            f"{max(frames, 0)} frames, fewer than the {least} that "
            f"{'a masked span has' if least > 1 else 'a text needs'}: nothing could be learned "
            "from the shortest rows."
        )


def make_speech(config: SpeechObjective, model: Encoder) -> Objective:
    """The objective of a speech encoder on the batches of data/utterances."""
    if isinstance(config, Wav2Vec):
        return make_wav2vec(config, model)
    return make_transcription(model)


def make_transcription(model: Encoder) -> Objective:
    """CTC. Terms: `loss`, nats a character; reports `impossible`, the share of rows with fewer
    frames than characters, which teach nothing, and `blank`, that of frames which say nothing."""
    blank = model.config.head.blank_id

    def weights_fn(batch: dict[str, Any]) -> dict[str, jax.Array]:
        labels, frames = batch["labels"], frame_counts(model.config, batch["counts"])
        said = ((labels >= 0) & (labels != blank)).sum()
        found = {"loss": said, "impossible": labels.shape[0], "blank": frames.sum()}
        return {name: jnp.float32(weight) for name, weight in found.items()}

    def loss_fn(params: Any, batch: dict[str, Any], key: jax.Array) -> tuple[dict, dict]:
        del key  # nothing here is random
        logits, frames = characters(model, params, batch["wave"], batch["counts"])
        losses, possible = ctc_losses(logits, frames, batch["labels"], blank)
        real = jnp.arange(logits.shape[1])[None] < frames[:, None]
        silent = real & (jnp.argmax(logits, axis=-1) == blank)
        sums = {"loss": losses.sum(), "impossible": (~possible).sum(), "blank": silent.sum()}
        weights = weights_fn(batch)
        return {name: (jnp.float32(sums[name]), weights[name]) for name in sums}, {}

    return Objective(loss_fn, weights_fn, {"loss": 1.0}, {})


def hidden(
    config: WavePretraining, model: Wav2Vec2, batch: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Which frames of a batch's rows are masked [B, W], and their distractors [B, W, M].

    Of each row's number and its real frames alone: `hidden_frames`.
    """
    length = model.num_frames(batch["wave"].shape[1])

    def of_row(row: jax.Array, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.key(MASKS), row)
        masked, others = hidden_frames(config, key, frames[None], length)
        return masked[0], others[0]

    return jax.vmap(of_row)(batch["rows"], frame_counts(model, batch["counts"]))


def make_wav2vec(config: Wav2Vec, model: Encoder) -> Objective:
    """wav2vec 2.0's pretraining; a batch's `steps` [B] say how far the temperature has fallen.

    Terms: `loss`, contrastive, nats a masked frame, and `diversity`, the share of codes that is not
    in use, of a microbatch each. Reports: `accuracy`, the share of masked frames that are told from
    all distractors; `masked`, that of real frames; of a microbatch `perplexity`, the codes in use
    in the group that uses fewest, `codes_in_use`, the same over all its codes, and
    `code_temperature`.
    """
    head, single = model.config.head, ("diversity", "perplexity", "codes_in_use")
    single = (*single, "code_temperature")

    def weights_fn(batch: dict[str, Any]) -> dict[str, jax.Array]:
        masked, _ = hidden(config, model.config, batch)
        frames = frame_counts(model.config, batch["counts"]).sum()
        found = dict.fromkeys(("loss", "accuracy"), masked.sum()) | {"masked": frames}
        found |= dict.fromkeys(single, 1)
        return {name: jnp.float32(weight) for name, weight in found.items()}

    def loss_fn(params: Any, batch: dict[str, Any], key: jax.Array) -> tuple[dict, dict]:
        masked, others = hidden(config, model.config, batch)
        key = jax.random.fold_in(key, batch["rows"][0])  # another for each microbatch
        fallen = config.code_temperature * config.code_decay ** batch["steps"][0]
        temperature = jnp.maximum(fallen, config.least_code_temperature)
        given = batch["wave"], batch["counts"], masked, others, key, temperature
        found = pretrained(model, params, config, *given)
        used = found.perplexity.min()
        sums = {
            "loss": found.contrastive,
            "accuracy": found.hits,
            "masked": found.count,
            "diversity": found.diversity / jnp.maximum(found.count, 1),
            "perplexity": used,
            "codes_in_use": used / head.num_codes,
            "code_temperature": temperature,
        }
        weights = weights_fn(batch)
        return {name: (jnp.float32(sums[name]), weights[name]) for name in sums}, {}

    coefficients = {"loss": 1.0, "diversity": config.diversity_weight}
    return Objective(loss_fn, weights_fn, coefficients, {})


def speech_warning(step: int, values: Mapping[str, float]) -> str | None:
    """A sentence where a step's metrics say that codes collapse or texts do not fit; None else.

    InputError where not a frame was masked: the step has learned nothing.
    """
    if "codes_in_use" in values:
        used, share = values["perplexity"], values["codes_in_use"]
        count = round(used / share)
        if values["masked"] <= 0:
            raise InputError(
                f"step {step}: no frame was masked, so nothing is learned: give longer sound, or "
                "lower objective.mask_span"
            )
        if is_dead(jnp.array([used]), count)[0]:
            return (
                f"the codebook collapses: of the {count} codes of a group {used:.2f} are in use; "
                "raise objective.diversity_weight or lower the learning rate"
            )
    if values.get("impossible", 0) > 0:
        return (
            f"{values['impossible']:.1%} of the rows have more characters than frames and teach "
            "nothing: give slower speech, or a smaller stride of the model's convolutions"
        )
    return None
