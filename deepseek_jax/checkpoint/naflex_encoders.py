"""SigLIP2's NaFlex image tower of Hugging Face (transformers: models/siglip2)."""

import math
from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint.image_encoders import (
    SIGLIP_LEAVES,
    faithful,
    patch_size,
    siglip_fields,
    siglip_modules,
    transformer,
)
from deepseek_jax.checkpoint.tables import Family, only, transformer_fields
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.naflex import NaFlex

SIGLIP2_VISION = {  # transformers' defaults, which a config.json leaves out
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
    "vision_use_head": True, "num_patches": 256,
}  # fmt: skip


def siglip2_vision(hf: Mapping[str, Any]) -> NaFlex:
    """SigLIP2's image tower."""
    filled = SIGLIP2_VISION | hf
    only(filled, "SigLIP2", attention_dropout=0.0)
    side = math.isqrt(filled["num_patches"])
    if side**2 != filled["num_patches"]:
        raise InputError(f"SigLIP2: num_patches is {filled['num_patches']}; it must be a square")
    return NaFlex(
        transformer=transformer(filled),
        grid_size=side,
        patch_size=patch_size(filled),
        num_channels=filled["num_channels"],
        pooling="attention" if filled["vision_use_head"] else "none",
    )


def naflex_fields(config: NaFlex) -> dict[str, Any]:
    """What SigLIP2 calls the fields of its image tower."""
    own = {
        "num_patches": config.grid_size**2,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
    }
    return transformer_fields(config.transformer) | own


FAMILIES: dict[str, Family] = {
    "siglip2_vision_model": faithful(
        Family(
            siglip2_vision,
            siglip_fields("Siglip2VisionModel", naflex_fields),
            siglip_modules,
            SIGLIP_LEAVES,
            prefix="vision_model.",
        )
    ),
}
