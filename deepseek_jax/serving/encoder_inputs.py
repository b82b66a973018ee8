"""What encoders of images, clips or any modality are given, from arrays as processors make them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.models.any_modality import AnyModality, Boxes, Spectrum, Words
from deepseek_jax.models.swin import Swin
from deepseek_jax.models.video import Video


def images_of(config: Swin, pixels: Any) -> dict[str, np.ndarray]:
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


LAYOUTS = {"image": "[B, C, H, W]", "video": "[B, T, C, H, W]", "text": "[B, T]", "audio": "[B, T]"}


def mixed_of(
    config: AnyModality, given: Mapping[str, Any], *, text_lengths: Any = None,
    audio_lengths: Any = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Arrays by modality as inputs of an encoder of several.

    image [B, C, H, W], video [B, T, C, H, W], text token ids [B, T], audio a wave [B, T]; lengths
    [B] say how many token ids and samples are real. Raises InputError for what does not fit.
    """
    if not isinstance(given, Mapping) or not given or not {*given} <= {*config.taken}:
        found = ", ".join(given) if isinstance(given, Mapping) else type(given).__name__
        raise InputError(
            f"given {found or 'nothing'}; this encoder takes a dict of {', '.join(config.taken)}"
        )
    inputs = {name: _one(getattr(config, name), name, x) for name, x in given.items()}
    rows = {name: len(x) for name, x in inputs.items()}
    if len({*rows.values()}) > 1:
        raise InputError(f"all modalities must have as many rows, not {rows}")
    for name, lengths in (("text", text_lengths), ("audio", audio_lengths)):
        if lengths is None:
            continue
        lengths = np.asarray(lengths)
        count = inputs[name].shape[1] if name in inputs else 0
        fits = lengths.shape == (rows.get(name, -1),) and lengths.min() >= 1
        if not fits or lengths.max() > count:
            raise InputError(
                f"{name}_lengths are {lengths.tolist()}; there must be one for each row of the "
                f"{name}, from 1 to {count}"
            )
        inputs[f"{name}_lengths"] = lengths.astype(np.int32)
    return inputs


def _one(config: Boxes | Words | Spectrum, name: str, given: Any) -> np.ndarray:
    array, layout = np.asarray(given), LAYOUTS[name]
    if array.ndim != layout.count(",") + 1 or not array.size:
        raise InputError(f"the {name} has shape {array.shape}; this encoder takes {layout}")
    if isinstance(config, Boxes):
        wanted = (config.num_frames, config.num_channels, *config.image_size)[5 - array.ndim :]
        if array.shape[1:] != wanted:
            whole = ", ".join(map(str, ("B", *wanted)))
            raise InputError(f"the {name} has shape {array.shape}; this encoder takes [{whole}]")
        return np.moveaxis(array, -3, -1).astype(np.float32)
    made = array.shape[1]
    if isinstance(config, Words):
        array = _ids(array, config.vocab_size)
    else:
        array, made = array.astype(np.float32), made // config.hop + 1
    if made > config.max_length:
        raise InputError(
            f"the {name} is {array.shape[1]} long, which makes {made} tokens; this encoder has "
            f"positions for {config.max_length}"
        )
    return array


def _ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"the text must be integers, not {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        found = f"the text's token ids lie in {tokens.min()}..{tokens.max()}"
        raise InputError(f"{found}, outside the vocabulary 0..{vocab_size - 1}")
    return tokens.astype(np.int32)
