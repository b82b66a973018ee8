"""What encoders are fed: arrays in Hugging Face's own layouts, checked, as our modules' inputs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.models.any_modality import AnyModality, Boxes, Spectrum, Words
from deepseek_jax.models.audio import Wav2Vec2, Whisper
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.sam import SAM
from deepseek_jax.models.swin import Swin
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.video import Video
from deepseek_jax.models.vit import Learned, ViT


def images_of(
    config: ViT, pixels: Any, *, interpolate_pos_encoding: bool = False, bool_masked_pos: Any = None
) -> dict[str, np.ndarray]:
    """Pixels [B, C, H, W] as a ViT's inputs; `more` is called as in transformers.

    Raises InputError for pixels of another size than the config's, unless its positions are made
    for any or are to be interpolated.
    """
    pixels = np.asarray(pixels, np.float32)
    wanted = (config.num_channels, *config.image_size)
    fixed = isinstance(config.positions, Learned) and not config.positions.any_size
    if fixed and not interpolate_pos_encoding:
        fits, size = pixels.shape[1:] == wanted, f"{wanted}"
    else:
        least = config.patch_size
        fits = pixels.shape[1:2] == wanted[:1] and min(pixels.shape[2:], default=0) >= least
        size = f"{wanted[0]}, at least {least}, at least {least}"
    if pixels.ndim != 4 or not fits or not pixels.shape[0]:
        raise InputError(f"pixels have shape {pixels.shape}; this encoder takes [B, {size}]")
    inputs = {"images": pixels.transpose(0, 2, 3, 1)}
    if bool_masked_pos is None:
        return inputs
    hidden = np.asarray(bool_masked_pos, bool)
    count = math.prod(side // config.patch_size for side in pixels.shape[2:])
    if not config.mask_token or hidden.shape != (pixels.shape[0], count):
        raise InputError(
            f"bool_masked_pos has shape {hidden.shape}; it must be {(pixels.shape[0], count)}, "
            "and the encoder must have a mask token"
        )
    return inputs | {"hidden_patches": hidden}


def patches_of(
    config: NaFlex, patches: Any, *, pixel_attention_mask: Any = None, spatial_shapes: Any = None
) -> dict[str, np.ndarray]:
    """Patches [B, T, X], which are real [B, T], and each image's grid [B, 2] as NaFlex's inputs."""
    if pixel_attention_mask is None or spatial_shapes is None:
        raise InputError("NaFlex takes pixel_attention_mask and spatial_shapes beside the patches")
    patches = np.asarray(patches, np.float32)
    if patches.ndim != 3 or patches.shape[2] != config.patch_dim or not patches.size:
        raise InputError(
            f"patches have shape {patches.shape}; this encoder takes [B, T, {config.patch_dim}]"
        )
    mask, shapes = np.asarray(pixel_attention_mask), np.asarray(spatial_shapes)
    if mask.shape != patches.shape[:2] or shapes.shape != (len(patches), 2):
        raise InputError(
            f"of patches {patches.shape} pixel_attention_mask must have shape {patches.shape[:2]} "
            f"and spatial_shapes {(len(patches), 2)}; they have {mask.shape} and {shapes.shape}"
        )
    if shapes.min() < 1 or shapes.prod(1).max() > patches.shape[1]:
        raise InputError(
            f"spatial_shapes {shapes.tolist()} must be at least 1, and height times width at most "
            f"the {patches.shape[1]} patches of a row"
        )
    return {"patches": patches, "mask": mask.astype(bool), "shapes": shapes.astype(np.int32)}


def texts_of(config: TextTower, tokens: Any, attention_mask: Any = None) -> dict[str, np.ndarray]:
    """Rows of token ids [B, T], and which are real, as a text tower's inputs."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise InputError(f"the text has shape {tokens.shape}; this tower takes token ids [B, T]")
    if tokens.shape[1] > config.max_length:
        most = config.max_length
        raise InputError(f"texts have {tokens.shape[1]} tokens; this tower takes {most} at most")
    inputs = {"tokens": _ids(tokens, config.vocab_size)}
    if attention_mask is not None:
        mask = np.asarray(attention_mask, bool)
        if mask.shape != tokens.shape:
            raise InputError(f"attention_mask has shape {mask.shape}, and tokens {tokens.shape}")
        inputs["mask"] = mask
    return inputs


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


def sam_images_of(config: SAM, pixels: Any) -> dict[str, np.ndarray]:
    """Pixels [B, C, H, W] as a SAM's inputs; InputError for another size than the config's."""
    pixels = np.asarray(pixels, np.float32)
    wanted = (config.num_channels, config.image_size, config.image_size)
    if pixels.ndim != 4 or pixels.shape[1:] != wanted or not pixels.shape[0]:
        raise InputError(f"pixels have shape {pixels.shape}; this encoder takes [B, {wanted}]")
    return {"images": pixels.transpose(0, 2, 3, 1)}


def swin_images_of(
    config: Swin, pixels: Any, *, interpolate_pos_encoding: bool = False
) -> dict[str, np.ndarray]:
    """Pixels [B, C, H, W] as a Swin's inputs; absolute positions are resized where that is asked.

    Raises InputError for another size than these belong to, or, resized, for one of broken patches.
    """
    pixels, patch = np.asarray(pixels, np.float32), config.patch_size
    given, fits = pixels.shape[2:], True
    sizes: tuple[Any, ...] = ("H", "W")
    if config.absolute_positions and interpolate_pos_encoding:
        fits, sizes = not any(side % patch for side in given), (f"a multiple of {patch}",) * 2
    elif config.absolute_positions:
        fits, sizes = given == config.image_size, config.image_size
    if pixels.ndim != 4 or not pixels.size or pixels.shape[1] != config.num_channels or not fits:
        wanted = ", ".join(map(str, ("B", config.num_channels, *sizes)))
        raise InputError(f"pixels have shape {pixels.shape}; this encoder takes [{wanted}]")
    return {"images": pixels.transpose(0, 2, 3, 1)}


def clips_of(
    config: Video,
    frames: Any,
    bool_masked_pos: Any | None = None,
    *,
    interpolate_pos_encoding: bool = False,
) -> dict[str, np.ndarray]:
    """Frames [B, T, C, H, W] as a video encoder's inputs.

    `bool_masked_pos` [B, N] says which tubelets are left out, as many in every clip. InputError for
    frames of another number or size than the encoder's positions belong to, also where they are to
    be interpolated: transformers takes none of ViViT's but its own, but for one layer of tubelets.
    """
    frames = np.asarray(frames, np.float32)
    wanted = (config.num_frames, config.num_channels, *config.image_size)
    if frames.ndim != 5 or frames.shape[1:] != wanted or not frames.shape[0]:
        whole = ", ".join(map(str, ("B", *wanted)))
        why = "; a video's positions are not interpolated" if interpolate_pos_encoding else ""
        raise InputError(f"frames have shape {frames.shape}; this encoder takes [{whole}]{why}")
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


INPUTS: dict[type, Callable[..., dict[str, Any]]] = {
    ViT: images_of,
    NaFlex: patches_of,
    TextTower: texts_of,
    Whisper: mel_of,
    Wav2Vec2: wave_of,
    SAM: sam_images_of,
    Swin: swin_images_of,
    Video: clips_of,
    AnyModality: mixed_of,
}
