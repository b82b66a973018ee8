"""DeepSeek-VL (1.3B, and the 7B with its SAM) and Janus's understanding, as transformers has them.

An output head counts as one of its own where the folder has it: config.json calls it tied by
default, and the released weights' is not.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint import families, image_encoders, sam_encoders, tables
from deepseek_jax.checkpoint.joined import (
    MOST,
    Joined,
    check_said,
    hybrid_leaves,
    hybrid_modules,
    leaves_of,
    modules_of,
    one_encoder,
    text_fields,
)
from deepseek_jax.checkpoint.tables import Family, Named, only, under
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.projectors import MLPProjector, SplitProjector
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT

LLAMA = {  # transformers' defaults, which a text_config may leave out
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
}  # fmt: skip
JANUS_VISION = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_channels": 3,
    "image_size": 384, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0, "mlp_ratio": 4.0, "attention_bias": True, "hidden_dropout_rate": 0.0,
    "projection_dim": 2048, "projection_dropout": 0.0, "use_qk_norm": False, "depth": 2,
}  # fmt: skip


def text_decoder(hf: Mapping[str, Any]) -> Decoder:
    """The decoder of a config.json with a text_config."""
    tied = hf.get("tie_word_embeddings", True) and not hf["has_head"]
    text = LLAMA | (hf.get("text_config") or {}) | {"tie_word_embeddings": tied}
    return families.decoder(text)


def deepseek_vl(hf: Mapping[str, Any]) -> VisionLanguage:
    """DeepSeek-VL."""
    return VisionLanguage(
        language=text_decoder(hf),
        vision=image_encoders.siglip_vision(hf.get("vision_config") or {}),
        image_id=hf.get("image_token_id", 100015),
    )


def deepseek_vl_fields(config: VisionLanguage) -> dict[str, Any]:
    """The fields of DeepSeek-VL's config.json."""
    vision = image_encoders.FAMILIES["siglip_vision_model"].fields(one_encoder(config))
    vision = vision | {"model_type": "siglip_vision_model"}
    del vision["architectures"]
    fields = _with_text(config) | {
        "vision_config": vision,
        "architectures": ["DeepseekVLForConditionalGeneration"],
    }
    check_said(deepseek_vl(fields | {"has_head": False}), config, "DeepSeek-VL")
    return fields


def deepseek_vl_hybrid(hf: Mapping[str, Any]) -> VisionLanguage:
    """DeepSeek-VL 7B."""
    return VisionLanguage(
        language=text_decoder(hf),
        vision=Hybrid(
            low=image_encoders.siglip_vision(hf.get("vision_config") or {}),
            high=sam_encoders.sam_vision(hf.get("high_res_vision_config") or {}),
        ),
        projector=SplitProjector(),
        image_id=hf.get("image_token_id", 100015),
    )


def deepseek_vl_hybrid_fields(config: VisionLanguage) -> dict[str, Any]:
    """The fields of DeepSeek-VL 7B's config.json."""
    if not isinstance(config.vision, Hybrid):
        raise InputError("DeepSeek-VL 7B's vision is a Hybrid")
    parts = {
        "vision_config": ("siglip_vision_model", image_encoders.FAMILIES, config.vision.low),
        "high_res_vision_config": ("sam_vision_model", sam_encoders.FAMILIES, config.vision.high),
    }
    fields = _with_text(config) | {"architectures": ["DeepseekVLHybridForConditionalGeneration"]}
    for name, (kind, families_of, part) in parts.items():
        fields[name] = families_of[kind].fields(part) | {"model_type": kind}
        del fields[name]["architectures"]
    check_said(deepseek_vl_hybrid(fields | {"has_head": False}), config, "DeepSeek-VL 7B")
    return fields


def _with_text(config: VisionLanguage) -> dict[str, Any]:
    return {
        "text_config": text_fields(config.language),
        "image_token_id": config.image_id,
        "tie_word_embeddings": config.language.tie_embeddings,
    }


def janus(hf: Mapping[str, Any]) -> VisionLanguage:
    """Janus and Janus-Pro, as far as they read images."""
    filled = JANUS_VISION | (hf.get("vision_config") or {})
    dropout = dict.fromkeys(("attention_dropout", "projection_dropout", "hidden_dropout_rate"), 0.0)
    language = text_decoder(hf)
    only(filled, "Janus", use_qk_norm=False, projection_dim=language.embed_dim, **dropout)
    transformer = tables.transformer(
        filled,
        mlp_dim=int(filled["hidden_size"] * filled["mlp_ratio"]),
        biases="qkvo" if filled["attention_bias"] else "o",
    )
    return VisionLanguage(
        language=language,
        vision=ViT(
            transformer=transformer,
            image_size=tables.square(filled["image_size"]),
            patch_size=image_encoders.patch_size(filled),
            num_channels=filled["num_channels"],
            class_token=False,
            pooling="none",
        ),
        projector=MLPProjector(depth=filled["depth"], activation=transformer.activation),
        image_id=hf.get("image_token_id", 100581),
    )


def janus_fields(config: VisionLanguage) -> dict[str, Any]:
    """The fields of Janus's config.json that say how it reads images."""
    t, projector = one_encoder(config).transformer, config.projector
    vision = image_encoders.vit_fields(one_encoder(config))
    del vision["intermediate_size"]
    vision |= {
        "mlp_ratio": t.mlp_dim / t.embed_dim,
        "attention_bias": "q" in t.biases,
        "projection_dim": config.language.embed_dim,
        "depth": getattr(projector, "depth", 0),
        "num_image_tokens": config.view_tokens,
        "model_type": "janus_vision_model",
    }
    fields = _with_text(config) | {
        "vision_config": vision,
        "architectures": ["JanusForConditionalGeneration"],
    }
    check_said(janus(fields | {"has_head": False}), config, "Janus")
    return fields


SIGLIP = image_encoders.siglip_modules(None)
# What draws images: this package's Janus reads them.
DRAWS = r"model\.(vqmodel|generation_(embeddings|aligner|head))\..*"
CONVERTED = {"model.": "model.language_model.", "lm_head.": "lm_head."}
TOWER = "model.vision_model."
LARGE, NECK = "model.high_res_vision_model", "model.high_res_vision_neck"
FAMILIES: dict[str, Joined] = {
    "deepseek_vl": Joined(
        Family(
            deepseek_vl,
            deepseek_vl_fields,
            modules_of(SIGLIP, TOWER, {n: f"model.aligner.linear{n}" for n in (1, 2)}),
            leaves_of(TOWER, image_encoders.SIGLIP_LEAVES),
            optional={"lm_head.weight": "has_head"},
            # A model that was loaded from older names is saved under them.
            renamed={r"^model\.vision_model\.vision_model\.": TOWER},
        ),
        CONVERTED,
    ),
    "deepseek_vl_hybrid": Joined(
        Family(
            deepseek_vl_hybrid,
            deepseek_vl_hybrid_fields,
            hybrid_modules(
                (SIGLIP, TOWER),
                (sam_encoders.SAM_MODULES, f"{LARGE}.vision_encoder."),
                under(sam_encoders.NECK, "vision/neck/", f"{NECK}.")
                | {f"vision/down_{n}/conv": f"model.high_res_vision_proj.conv{n}" for n in (1, 2)}
                | {
                    "projector/low": "model.aligner.vision_proj",
                    "projector/high": "model.aligner.high_res_vision_proj",
                    "projector/linear_2": "model.aligner.proj",
                },
            ),
            hybrid_leaves(
                (image_encoders.SIGLIP_LEAVES, TOWER),
                (sam_encoders.LEAVES, f"{LARGE}.vision_encoder."),
                {"vision/alpha": Named("model.high_res_vision_alpha")},
            ),
            optional={"lm_head.weight": "has_head"},
            renamed={r"^model\.vision_model\.vision_model\.": TOWER},
        ),
        CONVERTED,
    ),
    "janus": Joined(
        Family(
            janus,
            janus_fields,
            modules_of(
                SIGLIP | {"layer/attention/o": "encoder.layers.{}.self_attn.projection_layer"},
                TOWER,
                {1: "model.aligner.fc1"}
                | {n: f"model.aligner.hidden_layers.{n - 2}" for n in range(2, MOST + 1)},
            ),
            leaves_of(TOWER, {"positions": image_encoders.SIGLIP_LEAVES["positions"]}),
            ignored=rf"{DRAWS}|.*position_ids",
            optional={"lm_head.weight": "has_head"},
        ),
        CONVERTED,
    ),
}
