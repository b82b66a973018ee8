"""Which encoders of Hugging Face are known: every family's table, by model_type."""

from collections.abc import Collection, Mapping
from typing import Any

from deepseek_jax.checkpoint import (
    audio_encoders,
    image_encoders,
    naflex_encoders,
    pair_encoders,
    sam_encoders,
    swin_encoders,
    video_encoders,
)
from deepseek_jax.checkpoint.tables import Family, read_config
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.encoder import EncoderConfig
from deepseek_jax.models.two_tower import TwoTower

FAMILIES: dict[str, Family] = {
    **image_encoders.FAMILIES,
    **naflex_encoders.FAMILIES,
    **audio_encoders.FAMILIES,
    **pair_encoders.FAMILIES,
    **sam_encoders.FAMILIES,
    **swin_encoders.FAMILIES,
    **video_encoders.FAMILIES,
}


def family_of(original: Mapping[str, Any]) -> Family | None:
    """The family of a config.json; None where its model is no encoder that is known here."""
    return FAMILIES.get(original.get("model_type", ""))


def config_of(
    original: Mapping[str, Any], tensors: Collection[str] = ()
) -> EncoderConfig | TwoTower:
    """Our config of an encoder's config.json; InputError for what has no equal here.

    The names of the tensors beside it say what config.json may not.
    """
    family = family_of(original)
    if family is None:
        raise InputError(f"model_type {original.get('model_type')!r} is no encoder known here")
    return read_config(family, original, tensors)
