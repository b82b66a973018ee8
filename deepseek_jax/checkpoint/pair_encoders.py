"""Text towers and pairs of towers of Hugging Face: CLIP and SigLIP (models/clip, models/siglip)."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint import image_encoders
from deepseek_jax.checkpoint.tables import (
    Family,
    Named,
    only,
    transformer,
    transformer_fields,
    under,
)
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.two_tower import TwoTower

CLIP_TEXT = {  # transformers' defaults, which a config.json leaves out
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "vocab_size": 49408, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
    "eos_token_id": 49407,
}  # fmt: skip

SIGLIP_TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 32000, "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
}  # fmt: skip


def clip_text(hf: Mapping[str, Any]) -> TextTower:
    """CLIP's text tower."""
    filled = CLIP_TEXT | hf
    only(filled, "CLIP", attention_dropout=0.0)
    if not isinstance(filled["eos_token_id"], int):
        raise InputError(f"CLIP: eos_token_id is {filled['eos_token_id']!r}; it must be one number")
    first = filled["eos_token_id"] == 2  # what the first releases say, and transformers honors
    return TextTower(
        transformer=transformer(filled, causal=True),
        vocab_size=filled["vocab_size"],
        max_length=filled["max_position_embeddings"],
        pooling="end" if first else "first_end",
        end_id=filled["eos_token_id"],
    )


def siglip_text(hf: Mapping[str, Any]) -> TextTower:
    """SigLIP's text tower: it sees all of a text, padding too, as it was trained."""
    filled = SIGLIP_TEXT | hf
    only(filled, "SigLIP", attention_dropout=0.0)
    return TextTower(
        transformer=transformer(filled),
        vocab_size=filled["vocab_size"],
        max_length=filled["max_position_embeddings"],
        pooling="last",
        head_dim=filled.get("projection_size") or filled["hidden_size"],
    )


def text_fields(config: TextTower) -> dict[str, Any]:
    """What CLIP and its kin call the fields of a text tower."""
    own = {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_length}
    if config.head_dim is not None:
        own |= {"projection_size": config.head_dim}
    elif config.pooling in ("end", "first_end"):
        own |= {"eos_token_id": config.end_id}
    return transformer_fields(config.transformer) | own


def text_modules(config: TextTower) -> dict[str, str]:
    """The modules of a text tower of CLIP or SigLIP."""
    del config
    layers = {
        f"layer/{o}": f"encoder.layers.{{}}.{t}" for o, t in image_encoders.CLIP_LAYER.items()
    }
    return layers | {
        "embedding": "embeddings.token_embedding",
        "final_norm": "final_layer_norm",
        "head": "head",
    }


TEXT_LEAVES = {"positions": Named("embeddings.position_embedding.weight")}


def clip(hf: Mapping[str, Any]) -> TwoTower:
    """Both towers of CLIP."""
    return TwoTower(
        image=image_encoders.clip_vision(hf.get("vision_config") or {}),
        text=clip_text(hf.get("text_config") or {}),
        shared_dim=hf.get("projection_dim", 512),
    )


def clip_fields(config: TwoTower) -> dict[str, Any]:
    """The fields of CLIP's config.json."""
    image = image_encoders.vit_fields(config.image) | {"model_type": "clip_vision_model"}
    text = text_fields(config.text) | {"model_type": "clip_text_model"}
    both = {"vision_config": image, "text_config": text, "projection_dim": config.shared_dim}
    return both | {"architectures": ["CLIPModel"]}


def siglip(hf: Mapping[str, Any]) -> TwoTower:
    """Both towers of SigLIP."""
    return TwoTower(
        image=image_encoders.siglip_vision(hf.get("vision_config") or {}),
        text=siglip_text(hf.get("text_config") or {}),
        shared_dim=None,
        loss="sigmoid",
    )


def siglip_fields(config: TwoTower) -> dict[str, Any]:
    """The fields of SigLIP's config.json."""
    image = image_encoders.FAMILIES["siglip_vision_model"].fields(config.image)
    text = text_fields(config.text)
    for fields, kind in ((image, "siglip_vision_model"), (text, "siglip_text_model")):
        fields.pop("architectures", None)
        fields["model_type"] = kind
    return {"vision_config": image, "text_config": text, "architectures": ["SiglipModel"]}


def siglip_pair_modules(config: TwoTower) -> dict[str, str]:
    """The modules of SigLIP."""
    image = image_encoders.FAMILIES["siglip_vision_model"].modules(config.image)
    text = text_modules(config.text)
    return under(image, "image/", "vision_model.") | under(text, "text/", "text_model.")


def clip_pair_modules(config: TwoTower) -> dict[str, str]:
    """The modules of CLIP."""
    return {
        **under(image_encoders.clip_modules(config.image), "image/", "vision_model."),
        **under(text_modules(config.text), "text/", "text_model."),
        "image_projection": "visual_projection",
        "text_projection": "text_projection",
    }


def pair_leaves(image: Mapping[str, Named]) -> dict[str, Named]:
    """Leaves of both towers under their names in the pair."""
    found = {f"image/{o}": n._replace(name=f"vision_model.{n.name}") for o, n in image.items()}
    text = TEXT_LEAVES.items()
    return found | {f"text/{o}": n._replace(name=f"text_model.{n.name}") for o, n in text}


FAMILIES: dict[str, Family] = {
    "clip_text_model": Family(
        clip_text,
        lambda config: text_fields(config) | {"architectures": ["CLIPTextModel"]},
        text_modules,
        TEXT_LEAVES,
        prefix="text_model.",
    ),
    "siglip_text_model": Family(
        siglip_text,
        lambda config: text_fields(config) | {"architectures": ["SiglipTextModel"]},
        text_modules,
        TEXT_LEAVES,
        prefix="text_model.",
    ),
    "siglip": Family(
        siglip,
        siglip_fields,
        siglip_pair_modules,
        pair_leaves(image_encoders.FAMILIES["siglip_vision_model"].leaves)
        | {"logit_scale": Named("logit_scale", 1), "logit_bias": Named("logit_bias", 1)},
    ),
    "clip": Family(
        clip,
        clip_fields,
        clip_pair_modules,
        pair_leaves(image_encoders.FAMILIES["clip_vision_model"].leaves)
        | {"logit_scale": Named("logit_scale")},
    ),
}
