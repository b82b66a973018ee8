"""An encoder to use: a Hugging Face folder's, fed with arrays in Hugging Face's own layout."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepseek_jax.checkpoint import encoders, huggingface
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.core.target import leave_absent_tpus
from deepseek_jax.layers.encoder import Encoded
from deepseek_jax.models.audio import Wav2Vec2, Whisper
from deepseek_jax.models.encoder import Encoder, EncoderConfig, build_encoder
from deepseek_jax.models.vit import ViT
from deepseek_jax.serving import language


@dataclasses.dataclass(frozen=True)
class EncoderModel:
    """An encoder with its weights."""

    encoder: Encoder
    params: Any
    config: EncoderConfig
    original: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The config.json that it comes from."""

    def encode(self, inputs: Any, **more: Any) -> Float[Array, "B T D"]:
        """The last hidden state, float32, of a batch as Hugging Face's processors make it.

        Pixels [B, C, H, W], normalized; Whisper's mel [B, M, frames]; waves [B, T], normalized,
        with `attention_mask` [B, T] where rows are padded. Raises InputError for another shape.
        """
        return self.encoded(inputs, **more).hidden.astype(jnp.float32)

    def encoded(self, inputs: Any, *, keep: bool = False, **more: Any) -> Encoded:
        """The same with what else there is: a pooled vector, a mask, with `keep` all layers."""
        given = INPUTS[type(self.config)](self.config, inputs, **more)
        return _apply(self.encoder, self.params, given, keep)


def images_of(config: ViT, pixels: Any) -> dict[str, np.ndarray]:
    """Pixels [B, C, H, W] as a ViT's inputs."""
    pixels = np.asarray(pixels, np.float32)
    wanted = (config.num_channels, *config.image_size)
    if pixels.ndim != 4 or pixels.shape[1:] != wanted or not pixels.shape[0]:
        raise InputError(f"pixels have shape {pixels.shape}; this encoder takes [B, {wanted}]")
    return {"images": pixels.transpose(0, 2, 3, 1)}


def mel_of(config: Whisper, mel: Any) -> dict[str, np.ndarray]:
    """Log-mel frames [B, num_mels, 2 num_positions] as Whisper's inputs."""
    mel = np.asarray(mel, np.float32)
    wanted = (config.num_mels, 2 * config.num_positions)
    if mel.ndim != 3 or mel.shape[1:] != wanted or not mel.shape[0]:
        raise InputError(
            f"mel has shape {mel.shape}; this encoder takes [B, {wanted}]: pad or cut the sound "
            "first, as Whisper's feature extractor does"
        )
    return {"mel": mel.transpose(0, 2, 1)}


def wave_of(config: Wav2Vec2, wave: Any, attention_mask: Any = None) -> dict[str, Any]:
    """Waves [B, T] as wav2vec 2.0's inputs; `attention_mask` [B, T] is 1 on samples, then 0."""
    wave = np.asarray(wave)
    if wave.ndim != 2 or not wave.shape[0]:
        raise InputError(f"waves have shape {wave.shape}; this encoder takes [B, T], one channel")
    if not np.issubdtype(wave.dtype, np.floating):
        raise InputError(f"waves are {wave.dtype}; floats are wanted, normalized a row")
    counts = None
    if attention_mask is not None:
        mask = np.asarray(attention_mask).astype(bool)
        if mask.shape != wave.shape:
            raise InputError(f"attention_mask has shape {mask.shape}, waves {wave.shape}")
        counts = mask.sum(1)
        if (mask != (np.arange(mask.shape[1]) < counts[:, None])).any():
            raise InputError("attention_mask must be 1 on each row's samples, then 0 to its end")
    shortest = wave.shape[1] if counts is None else counts.min()
    if shortest < config.least_samples:
        raise InputError(
            f"a row has {shortest} samples; a frame takes {config.least_samples}: leave it out"
        )
    counts = None if counts is None else counts.astype(np.int32)
    return {"wave": wave.astype(np.float32), "counts": counts}


INPUTS: dict[type, Callable[..., dict[str, Any]]] = {
    ViT: images_of,
    Whisper: mel_of,
    Wav2Vec2: wave_of,
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(encoder: Encoder, params: Any, inputs: dict[str, Any], keep: bool) -> Encoded:
    return encoder.apply(params, keep=keep, **inputs)


def is_encoder(path: str | pathlib.Path) -> bool:
    """Whether a path is a Hugging Face folder of an encoder that is known here."""
    if not is_folder_of_tensors(path):
        return False
    original = huggingface.read_optional(pathlib.Path(path), "config.json")
    return encoders.family_of(original) is not None


def load_encoder(path: str | pathlib.Path) -> EncoderModel:
    """The encoder of a Hugging Face folder.

    On a CPU it computes in float32. Raises InputError when it is no encoder that is known here, or
    its tensors are not what its config says.
    """
    leave_absent_tpus()
    folder = huggingface.open_folder(path)
    if encoders.family_of(folder.original) is None:
        raise InputError(f"{path}: model_type {folder.original.get('model_type')!r} is no encoder")
    dtype = next(iter(folder.tensors.values())).dtype
    precision = Precision(params="bfloat16" if dtype == jnp.bfloat16 else "float32")
    if jax.default_backend() == "cpu":
        precision = Precision(compute="float32")
    encoder = build_encoder(folder.config, precision)
    params = huggingface.load_encoder(folder, encoder, encoder.shapes)
    return EncoderModel(encoder, params, folder.config, folder.original)


def load(path: str | pathlib.Path) -> EncoderModel | language.LanguageModel:
    """What a path holds, to use: an encoder's Hugging Face folder, else a language model.

    See `load_encoder` and `serving.language.load`.
    """
    return load_encoder(path) if is_encoder(path) else language.load(path)
