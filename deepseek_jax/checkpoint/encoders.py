"""Which encoders of Hugging Face are known: every family's table, by model_type."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint import audio_encoders, image_encoders
from deepseek_jax.checkpoint.tables import Family
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.encoder import EncoderConfig

FAMILIES: dict[str, Family] = {**image_encoders.FAMILIES, **audio_encoders.FAMILIES}


def family_of(original: Mapping[str, Any]) -> Family | None:
    """The family of a config.json; None where its model is no encoder that is known here."""
    return FAMILIES.get(original.get("model_type", ""))


def config_of(original: Mapping[str, Any]) -> EncoderConfig:
    """Our config of an encoder's config.json; InputError for what has no equal here."""
    family = family_of(original)
    if family is None:
        raise InputError(f"model_type {original.get('model_type')!r} is no encoder known here")
    try:
        return family.config(original)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config.json: {error}") from None
