"""What encoders take of raw data: pixels, frames, waves and rows of tokens as data/ has them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.vision import Normalization, normalized
from deepseek_jax.models.any_modality import TAKEN, AnyModality, Boxes, Spectrum, Words
from deepseek_jax.models.audio import Wav2Vec2, Whisper
from deepseek_jax.models.ear import HOP, RATE, SPECTRUM
from deepseek_jax.models.encoder import EncoderConfig
from deepseek_jax.models.fusion import Fused
from deepseek_jax.models.stream import Stream
from deepseek_jax.models.swin import Swin
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.video import Video
from deepseek_jax.models.vit import ViT
from deepseek_jax.ops import signal

TAKERS: dict[str, tuple[type, ...]] = {  # by the data's name of a modality
    "image": (ViT, Swin, AnyModality),
    "sound": (Whisper, Wav2Vec2, Stream, AnyModality),
    "video": (Video, AnyModality),
    "text": (TextTower, AnyModality),
}


def misfit(config: Fused, inputs: dict[str, tuple[tuple[int, ...], Any]]) -> str:
    """Which encoder does not take `inputs` of these shapes and dtypes, and why; else ""."""
    for name, encoder in ((m.name, m.encoder) for m in config.modalities):
        (_, *shape), found = inputs[name][0], type(encoder).__name__
        if not isinstance(encoder, TAKERS[name]):
            kinds = " or ".join(kind.__name__ for kind in TAKERS[name])
            return f"the modality {name} has a {found} for encoder, and needs a {kinds}"
        match encoder:
            case ViT():
                wanted = [*encoder.image_size, encoder.num_channels]
            case Video():
                wanted = [encoder.num_frames, *encoder.image_size, encoder.num_channels]
            case Whisper():
                wanted = [2 * encoder.num_positions * HOP]
            case TextTower():
                wanted = [min(shape[0], encoder.max_length)]
            case AnyModality():
                wanted = _wanted(getattr(encoder, TAKEN[name]), shape)
            case _:
                wanted = shape
        if shape != wanted:
            return f"a {name} of the data is {shape}, and its encoder, a {found}, takes {wanted}"
    return ""


def _wanted(stem: Boxes | Words | Spectrum, shape: list[int]) -> list[int]:
    """What a stem takes that is as near to `shape` as it can be."""
    if isinstance(stem, Boxes):
        size = stem.size if len(shape) > 3 else stem.image_size
        return [*size, stem.num_channels]
    most = stem.max_length if isinstance(stem, Words) else stem.max_length * stem.hop - 1
    return [min(shape[0], most)]


def texts_of(tokens: jax.Array | np.ndarray) -> dict[str, Any]:
    """What a text tower takes of rows of tokens that are -1 behind their ends."""
    return {"tokens": jnp.maximum(tokens, 0), "mask": tokens >= 0}


def encoder_inputs(
    encoder: EncoderConfig, raw: jax.Array, preset: Normalization, name: str = ""
) -> dict[str, jax.Array]:
    """What an encoder takes of raw data: uint8 pixels [B, H, W, 3] or frames [B, T, H, W, 3], waves
    of 16 kHz [B, T], tokens [B, T] (-1 behind the end). `name` is the data's of the modality.

    Raises InputError for an encoder that takes none of these, and for a wave not of its length.
    """
    match encoder:
        case ViT() | Swin():
            return {"images": normalized(raw, preset)}
        case Video():
            return {"clips": normalized(raw, preset)}
        case Whisper():
            wanted = 2 * encoder.num_positions * HOP
            if raw.shape[1] != wanted:
                raise InputError(
                    f"sounds have {raw.shape[1]} samples, and {encoder.num_positions} positions "
                    f"are those of {wanted}: set sequence_length"
                )
            return {
                "mel": signal.log_mel(raw, signal.mel_filters(encoder.num_mels, SPECTRUM, RATE))
            }
        case Wav2Vec2():
            return {"wave": signal.normalized(raw)}
        case Stream():
            return {"wave": raw}
        case TextTower():
            return texts_of(raw)
        case AnyModality() if name == "text":
            lengths = jnp.maximum((raw >= 0).sum(1), 1)
            return {"text": jnp.maximum(raw, 0), "text_lengths": lengths}
        case AnyModality() if name in TAKEN:
            return {TAKEN[name]: raw if name == "sound" else normalized(raw, preset)}
    raise InputError(f"no raw data are known for an encoder of kind {type(encoder).__name__}")


def inputs_of(config: Fused, batch: dict[str, Any], preset: Normalization) -> dict[str, Any]:
    """What a classifier takes of a batch (data/audiovisual, data/labelled): its `inputs` and
    `present`."""
    inputs = {
        m.name: encoder_inputs(m.encoder, batch["inputs"][m.name], preset, m.name)
        for m in config.modalities
    }
    return {"inputs": inputs, "present": presence(config, batch)}


def presence(config: Fused, batch: dict[str, Any]) -> jax.Array:
    """Which modalities each row has, in the config's order: bool [B, M]."""
    return jnp.stack([batch["present"][name] for name in config.names], 1)
