"""What wav2vec 2.0's heads do: characters by CTC, and pretraining on masked frames."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from deepseek_jax.layers.encoder import Encoded
from deepseek_jax.models.audio import CTC, Codebook, frame_counts
from deepseek_jax.models.encoder import Encoder
from deepseek_jax.ops.ctc import ctc_greedy, ctc_losses
from deepseek_jax.ops.wav2vec import (
    chosen_codes,
    contrastive_hits,
    contrastive_loss,
    contrastive_scores,
    distractors,
    diversity_loss,
    perplexity,
    span_mask,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WavePretraining:
    """How wav2vec 2.0 is pretrained."""

    mask_share: float = 0.65
    """Frames in masked spans over all, were there no overlaps."""
    mask_span: int = 10
    num_distractors: int = 100
    temperature: float = 0.1
    """Of the similarities."""
    diversity_weight: float = 0.1

    def __post_init__(self):
        if not 0 < self.mask_share <= 1 or min(self.mask_span, self.num_distractors) < 1:
            raise ValueError(
                f"mask_share ({self.mask_share}) must lie above 0 and up to 1, mask_span "
                f"({self.mask_span}) and num_distractors ({self.num_distractors}) at 1 or above."
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")


class Pretrained(NamedTuple):
    """Sums over masked frames, to be divided by their number, and what the codebook does."""

    loss: Float[Array, ""]
    """contrastive + diversity_weight * diversity."""
    contrastive: Float[Array, ""]
    diversity: Float[Array, ""]
    count: Int[Array, ""]
    perplexity: Float[Array, " G"]
    """Codes in use, by group: see `ops.wav2vec.is_dead`."""
    predicted: Float[Array, "B T Q"]
    targets: Float[Array, "B T Q"]
    hits: Int[Array, ""]
    """Masked frames that are told from all of their distractors."""
    uses: Float[Array, "G V"]
    """What codes stand behind masked frames: how often, or in training their probabilities' sum."""


def _head(encoder: Encoder, kind: type) -> Any:
    if not isinstance(encoder.config.head, kind):
        raise ValueError(f"the encoder's head is {encoder.config.head}, not a {kind.__name__}")
    return encoder.config.head


def _call(encoder: Encoder, params: Any, method: str, *inputs: Array) -> Any:
    return encoder.module.apply({"params": params}, *inputs, method=method)


def _frames(encoder: Encoder, found: Encoded, counts: Array | None) -> Int[Array, " B"]:
    rows, length, _ = found.hidden.shape
    return jnp.full(rows, length) if counts is None else frame_counts(encoder.config, counts)


def characters(
    encoder: Encoder, params: Any, wave: Float[Array, "B T"], counts: Int[Array, " B"] | None = None
) -> tuple[Float[Array, "B W V"], Int[Array, " B"]]:
    """Float32 logits of each frame's character, and how many frames of each row are real."""
    _head(encoder, CTC)
    found = encoder.apply(params, wave=wave, counts=counts)
    return _call(encoder, params, "logits", found.hidden), _frames(encoder, found, counts)


def transcription_losses(
    encoder: Encoder,
    params: Any,
    wave: Float[Array, "B T"],
    counts: Int[Array, " B"] | None,
    labels: Int[Array, "B U"],
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Each row's CTC loss, and whether its frames are enough for its labels: `ops.ctc`."""
    logits, frames = characters(encoder, params, wave, counts)
    return ctc_losses(logits, frames, labels, encoder.config.head.blank_id)


def transcribed(
    encoder: Encoder, params: Any, wave: Float[Array, "B T"], counts: Int[Array, " B"] | None = None
) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """Ids of the likeliest characters, -1 behind a row's last, and how many there are."""
    logits, frames = characters(encoder, params, wave, counts)
    return ctc_greedy(logits, frames, encoder.config.head.blank_id)


def hidden_frames(
    config: WavePretraining, key: Key[Array, ""], frames: Int[Array, " B"], length: int
) -> tuple[Bool[Array, "B T"], Int[Array, "B T M"]]:
    """Which frames are masked in a step, and the distractors of each: of the key and `frames`."""
    of_mask, of_others = jax.random.split(key)
    spans = {"share": config.mask_share, "span": config.mask_span, "least": 2}
    masked = span_mask(of_mask, frames, length, **spans)
    return masked, distractors(of_others, masked, config.num_distractors)


def pretrained(
    encoder: Encoder,
    params: Any,
    config: WavePretraining,
    wave: Float[Array, "B T"],
    counts: Int[Array, " B"] | None,
    masked: Bool[Array, "B W"],
    others: Int[Array, "B W M"],
    key: Key[Array, ""] | None = None,
    code_temperature: float | Float[Array, ""] = 2.0,
) -> Pretrained:
    """The losses of a batch whose frames are `masked`, with each frame's distractors in `others`.

    With a key codes are drawn, and the codebook learns; without, they are the likeliest, which is
    for evaluation.
    """
    head = _head(encoder, Codebook)
    found = encoder.apply(params, wave=wave, counts=counts, masked=masked)
    logits = _call(encoder, params, "code_logits", found.features)
    weights = chosen_codes(logits, key, code_temperature)
    predicted, targets = _call(encoder, params, "shared", found.hidden, weights)
    codes = jnp.argmax(weights, axis=-1)
    scores = contrastive_scores(predicted, targets, codes, others, config.temperature)
    contrastive, hits = (f(*scores, masked) for f in (contrastive_loss, contrastive_hits))
    drawn = weights if key is None else jax.nn.softmax(logits, axis=-1)
    used, uses = perplexity(drawn, masked), (drawn * masked[..., None, None]).sum((0, 1))
    count = masked.sum()
    diversity = diversity_loss(used, head.num_codes, count)
    loss = contrastive + config.diversity_weight * diversity
    return Pretrained(loss, contrastive, diversity, count, used, predicted, targets, hits, uses)
