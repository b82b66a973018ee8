"""Video encoders of Hugging Face: VideoMAE and ViViT (transformers: models/videomae, vivit).

The names are those that lie on disk, which transformers 5 turns around as it reads and writes.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint.image_encoders import VIT_LAYER, numbered
from deepseek_jax.checkpoint.tables import (
    Family,
    Named,
    only,
    square,
    transformer,
    transformer_fields,
)
from deepseek_jax.models.video import Video

SHARED = {  # transformers' defaults, which a config.json leaves out
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "num_channels": 3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
VIDEOMAE = SHARED | {
    "patch_size": 16, "num_frames": 16, "tubelet_size": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "qv_bias": True, "use_mean_pooling": True,
}  # fmt: skip
VIVIT = SHARED | {
    "num_frames": 32, "tubelet_size": [2, 16, 16], "hidden_act": "gelu_fast",
    "layer_norm_eps": 1e-6, "qkv_bias": True, "pooler_act": "tanh",
    "architectures": ["VivitModel"],
}  # fmt: skip


def _video(hf: Mapping[str, Any], what: str, biases: str, **own: Any) -> Video:
    only(hf, what, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return Video(
        transformer=transformer(hf, biases=biases),
        num_frames=hf["num_frames"],
        image_size=square(hf["image_size"]),
        num_channels=hf["num_channels"],
        **own,
    )


def videomae(hf: Mapping[str, Any]) -> Video:
    """VideoMAE's config."""
    filled = VIDEOMAE | hf
    biases = "qvo" if filled.get("qkv_bias", filled["qv_bias"]) else "o"  # so it was once called
    return _video(
        filled,
        "VideoMAE",
        biases,
        tubelet=(filled["tubelet_size"], *square(filled["patch_size"])),
        positions="sines",
        final_norm=not filled["use_mean_pooling"],
    )


def vivit(hf: Mapping[str, Any]) -> Video:
    """ViViT's config; a classifier's folder has no pooler."""
    filled = VIVIT | hf
    only(filled, "ViViT", pooler_act="tanh", pooler_output_size=filled["hidden_size"])
    pooler = "VivitModel" in (filled["architectures"] or ["VivitModel"])
    return _video(
        filled,
        "ViViT",
        "qkvo" if filled["qkv_bias"] else "o",
        tubelet=tuple(filled["tubelet_size"]),
        class_token=True,
        pooling="tanh" if pooler else "class",
    )


def _fields(config: Video) -> dict[str, Any]:
    height, width = config.image_size
    return transformer_fields(config.transformer) | {
        "num_frames": config.num_frames,
        "image_size": height if height == width else [height, width],
        "num_channels": config.num_channels,
    }


def videomae_fields(config: Video) -> dict[str, Any]:
    """What VideoMAE's config.json calls the fields."""
    frames, height, width = config.tubelet
    return _fields(config) | {
        "architectures": ["VideoMAEModel"],
        "tubelet_size": frames,
        "patch_size": height if height == width else [height, width],
        "qv_bias": "q" in config.transformer.biases,
        "use_mean_pooling": not config.final_norm,
    }


def vivit_fields(config: Video) -> dict[str, Any]:
    """What ViViT's config.json calls the fields."""
    pooler = config.pooling == "tanh"
    return _fields(config) | {
        "architectures": ["VivitModel" if pooler else "VivitForVideoClassification"],
        "tubelet_size": [*config.tubelet],
        "qkv_bias": "q" in config.transformer.biases,
        "pooler_act": "tanh",
    }


def modules(config: Video) -> dict[str, str]:
    """The modules of both."""
    del config
    return numbered("encoder.layer", VIT_LAYER) | {
        "patch": "embeddings.patch_embeddings.projection",
        "final_norm": "layernorm",
        "pooler": "pooler.dense",
    }


FAMILIES: dict[str, Family] = {
    "videomae": Family(
        videomae,
        videomae_fields,
        modules,
        {
            f"layer/attention/{n}/bias": Named(f"encoder.layer.{{}}.attention.attention.{n}_bias")
            for n in "qv"
        },
        # A pretraining model's decoder and masked token, a classifier's head.
        ignored=r"decoder\..*|encoder_to_decoder\..*|mask_token|position_embeddings"
        r"|fc_norm\..*|classifier\..*",
        prefix="videomae.",
    ),
    "vivit": Family(
        vivit,
        vivit_fields,
        modules,
        {
            "class_token": Named("embeddings.cls_token", 2),
            "positions": Named("embeddings.position_embeddings", 1),
        },
        ignored=r"classifier\..*",
        prefix="vivit.",
    ),
}
