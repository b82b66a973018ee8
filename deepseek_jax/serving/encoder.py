"""An encoder to use: a Hugging Face folder's, fed with arrays in Hugging Face's own layout."""

import dataclasses
import functools
import math
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
from deepseek_jax.models.encoder import Encoder, EncoderConfig, build_encoder
from deepseek_jax.models.swin import Swin
from deepseek_jax.models.video import Video
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

        Pixels [B, C, H, W] or frames [B, T, C, H, W], normalized. Raises InputError for another
        shape.
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


def images_of_any_size(config: Swin, pixels: Any) -> dict[str, np.ndarray]:
    """Pixels [B, C, H, W] as a Swin's inputs."""
    pixels = np.asarray(pixels, np.float32)
    fits = pixels.ndim == 4 and pixels.size and pixels.shape[1] == config.num_channels
    if not fits or (config.absolute_positions and pixels.shape[2:] != config.image_size):
        sizes = config.image_size if config.absolute_positions else ("H", "W")
        wanted = ", ".join(map(str, ("B", config.num_channels, *sizes)))
        raise InputError(f"pixels have shape {pixels.shape}; this encoder takes [{wanted}]")
    return {"images": pixels.transpose(0, 2, 3, 1)}


def clips_of(
    config: Video, frames: Any, bool_masked_pos: Any | None = None
) -> dict[str, np.ndarray]:
    """Frames [B, T, C, H, W] as a video encoder's inputs.

    `bool_masked_pos` [B, N] says which tubelets are left out, as many in every clip.
    """
    frames = np.asarray(frames, np.float32)
    wanted = (config.num_frames, config.num_channels, *config.image_size)
    if frames.ndim != 5 or frames.shape[1:] != wanted or not frames.shape[0]:
        whole = ", ".join(map(str, ("B", *wanted)))
        raise InputError(f"frames have shape {frames.shape}; this encoder takes [{whole}]")
    given = {"clips": frames.transpose(0, 1, 3, 4, 2)}
    if bool_masked_pos is None:
        return given
    visible = ~np.asarray(bool_masked_pos, bool)
    shape = (len(frames), math.prod(config.grid))
    counts = {*visible.sum(1).tolist()} if visible.shape == shape else {0}
    if len(counts) > 1 or 0 in counts:
        raise InputError(
            f"bool_masked_pos has shape {visible.shape}; it must be {shape} and leave as many "
            "tubelets in every clip, at least one"
        )
    kept = np.nonzero(visible)[1].reshape(len(frames), -1)
    return given | {"visible": kept.astype(np.int32)}


INPUTS: dict[type, Callable[..., dict[str, np.ndarray]]] = {
    ViT: images_of,
    Swin: images_of_any_size,
    Video: clips_of,
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
