"""Image encoders of Hugging Face: CLIP's tower (transformers: models/clip)."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint.tables import (
    Family,
    Named,
    activation,
    clip_transformer,
    only,
    square,
    transformer_fields,
)
from deepseek_jax.models.vit import ViT

CLIP_LAYER = {
    "attention_norm": "layer_norm1", "mlp_norm": "layer_norm2",
    **{f"attention/{n}": f"self_attn.{n}_proj" for n in "qkv"},
    "attention/o": "self_attn.out_proj", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
}  # fmt: skip


def clip_vision(hf: Mapping[str, Any]) -> ViT:
    """CLIP's image tower."""
    filled = CLIP_VISION | hf
    only(filled, "CLIP", attention_dropout=0.0, num_channels=3)
    own = {"activation": activation(filled, "hidden_act"), "norm_eps": filled["layer_norm_eps"]}
    return ViT(
        transformer=clip_transformer(filled, **own),
        image_size=square(filled["image_size"]),
        patch_size=filled["patch_size"],
        patch_bias=False,
        pre_norm=True,
        final_norm=False,
    )


CLIP_VISION = {  # transformers' defaults, which a config.json leaves out
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "num_channels": 3,
}  # fmt: skip


def vit_fields(config: ViT) -> dict[str, Any]:
    """What CLIP and its kin call the fields of a vision transformer."""
    height, width = config.image_size
    size = height if height == width else [height, width]
    own = {"image_size": size, "patch_size": config.patch_size, "num_channels": config.num_channels}
    return transformer_fields(config.transformer) | own


def clip_modules(config: ViT) -> dict[str, str]:
    """The modules of CLIP's image tower."""
    del config
    layers = {f"layer/{o}": f"encoder.layers.{{}}.{t}" for o, t in CLIP_LAYER.items()}
    return layers | {
        "patch": "embeddings.patch_embedding",
        "pre_norm": "pre_layrnorm",  # so spelled
        "final_norm": "post_layernorm",
    }


FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(
        clip_vision,
        lambda config: vit_fields(config) | {"architectures": ["CLIPVisionModel"]},
        clip_modules,
        {
            "class_token": Named("embeddings.class_embedding"),
            "positions": Named("embeddings.position_embedding.weight"),
        },
        prefix="vision_model.",
    ),
}
