"""Image encoders of Hugging Face: ViT, CLIP's and SigLIP's towers, DINOv2 (transformers: models/).

SigLIP2's stands in naflex_encoders.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.checkpoint.tables import (
    Family,
    Named,
    only,
    square,
    transformer,
    transformer_fields,
)
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.vit import Learned, ViT

EMBEDDED = "embeddings.patch_embeddings.projection"
# A head for classes and what paints hidden patches are left behind.
NOT_HERE = r".*position_ids|classifier\..*|decoder\..*"
CLIP_LAYER = {
    "attention_norm": "layer_norm1", "mlp_norm": "layer_norm2",
    **{f"attention/{n}": f"self_attn.{n}_proj" for n in "qkv"},
    "attention/o": "self_attn.out_proj", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
}  # fmt: skip
VIT_ATTENTION = {  # on disk; in memory transformers 5 has other names
    "attention/q": "attention.attention.query", "attention/k": "attention.attention.key",
    "attention/v": "attention.attention.value", "attention/o": "attention.output.dense",
}  # fmt: skip
VIT_LAYER = VIT_ATTENTION | {
    "attention_norm": "layernorm_before", "mlp_norm": "layernorm_after",
    "mlp/up": "intermediate.dense", "mlp/down": "output.dense",
}  # fmt: skip
SIGLIP_HEAD = {
    "head/o": "head.attention.out_proj", "head/norm": "head.layernorm",
    "head/mlp/up": "head.mlp.fc1", "head/mlp/down": "head.mlp.fc2",
}  # fmt: skip
SIGLIP_LEAVES = {
    "positions": Named("embeddings.position_embedding.weight"),
    "head/probe": Named("head.probe", 2),
    **{
        f"head/{n}/{leaf}": Named(f"head.attention.in_proj_{leaf}")
        for leaf in ("weight", "bias")
        for n in "qkv"  # one tensor there, in this order
    },
}


def numbered(there: str, layer: Mapping[str, str]) -> dict[str, str]:
    """The modules of every layer, where theirs are called there.NUMBER.NAME."""
    return {f"layer/{ours}": f"{there}.{{}}.{theirs}" for ours, theirs in layer.items()}


def patch_size(hf: Mapping[str, Any]) -> int:
    """The side of a patch, which must be square here."""
    height, width = square(hf["patch_size"])
    if height != width:
        raise InputError(f"patch_size is {hf['patch_size']}; patches must be square here")
    return height


def _image(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_size": square(hf["image_size"]),
        "patch_size": patch_size(hf),
        "num_channels": hf["num_channels"],
    }


SIZES = {  # transformers' defaults, which a config.json leaves out
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "num_channels": 3,
}  # fmt: skip
CLIP_VISION = SIZES | {
    "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
}  # fmt: skip
SIGLIP_VISION = SIZES | {
    "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0, "vision_use_head": True,
}  # fmt: skip
VIT = SIZES | {
    "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_act": "tanh",
}  # fmt: skip
DINOV2 = SIZES | {
    "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
    "mlp_ratio": 4, "layerscale_value": 1.0, "use_swiglu_ffn": False, "use_mask_token": True,
}  # fmt: skip
DINOV2_WITH_REGISTERS = DINOV2 | {"patch_size": 16, "num_register_tokens": 4}


def clip_vision(hf: Mapping[str, Any]) -> ViT:
    """CLIP's image tower."""
    filled = CLIP_VISION | hf
    only(filled, "CLIP", attention_dropout=0.0)
    fixed = {"patch_bias": False, "pre_norm": True, "final_norm": False}
    return ViT(transformer=transformer(filled), **_image(filled), **fixed)


def siglip_vision(hf: Mapping[str, Any]) -> ViT:
    """SigLIP's image tower."""
    filled = SIGLIP_VISION | hf
    only(filled, "SigLIP", attention_dropout=0.0)
    pooling = "attention" if filled["vision_use_head"] else "none"
    own = {"class_token": False, "pooling": pooling}
    return ViT(transformer=transformer(filled), **_image(filled), **own)


def vit(hf: Mapping[str, Any]) -> ViT:
    """ViT; whether it has a pooler and a mask token its tensors say."""
    filled = {"add_pooling_layer": True, "use_mask_token": False} | VIT | {**hf}
    fixed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_act": "tanh"}
    only(filled, "ViT", **fixed)
    if (filled.get("pooler_output_size") or filled["hidden_size"]) != filled["hidden_size"]:
        raise InputError("ViT: pooler_output_size must be hidden_size here")
    return ViT(
        transformer=transformer(filled, biases="qkvo" if filled["qkv_bias"] else "o"),
        mask_token=filled["use_mask_token"],
        pooling="tanh" if filled["add_pooling_layer"] else "none",
        **_image(filled),
    )


def _dinov2_mlp(width: int, ratio: float, gated: bool) -> int:
    """The feed-forward part's width: SwiGLU's is two thirds, in eights."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def dinov2(hf: Mapping[str, Any], registers: bool = False) -> ViT:
    """DINOv2, without or with registers."""
    filled = (DINOV2_WITH_REGISTERS if registers else DINOV2) | hf
    fixed = dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"), 0.0
    )
    only(filled, "DINOv2", **fixed)
    gated = filled["use_swiglu_ffn"]
    own = {"activation": "silu"} if gated else {}
    return ViT(
        transformer=transformer(
            filled,
            mlp_dim=_dinov2_mlp(filled["hidden_size"], filled["mlp_ratio"], gated),
            gated=gated,
            layer_scale=float(filled["layerscale_value"]),
            biases="qkvo" if filled["qkv_bias"] else "o",
            **own,
        ),
        num_registers=filled["num_register_tokens"] if registers else 0,
        mask_token=filled["use_mask_token"],
        positions=Learned(any_size=True, antialias=registers),
        **_image(filled),
    )


def vit_fields(config: ViT) -> dict[str, Any]:
    """What CLIP and its kin call the fields of a vision transformer."""
    height, width = config.table_size  # what image_size says there
    size = height if height == width else [height, width]
    own = {"image_size": size, "patch_size": config.patch_size, "num_channels": config.num_channels}
    return transformer_fields(config.transformer) | own


def _vit_fields(config: ViT) -> dict[str, Any]:
    own = {"qkv_bias": "q" in config.transformer.biases, "architectures": ["ViTModel"]}
    return vit_fields(config) | own


def _dinov2_fields(config: ViT, registers: bool) -> dict[str, Any]:
    t = config.transformer
    ratios = (n for n in range(1, 65) if _dinov2_mlp(t.embed_dim, n, t.gated) == t.mlp_dim)
    if (ratio := next(ratios, None)) is None:
        raise InputError(f"DINOv2: no mlp_ratio gives an mlp_dim of {t.mlp_dim}")
    fields = vit_fields(config)
    del fields["intermediate_size"]
    own: dict[str, Any] = {
        "qkv_bias": "q" in t.biases,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": t.gated,
        "layerscale_value": t.layer_scale or 0.0,
    }
    if t.gated:
        own["hidden_act"] = "gelu"  # which is not used: the gate's is silu
    if registers:
        own |= {"num_register_tokens": config.num_registers}
        return fields | own | {"architectures": ["Dinov2WithRegistersModel"]}
    own |= {"use_mask_token": config.mask_token, "architectures": ["Dinov2Model"]}
    return fields | own


def siglip_fields(architecture: str, fields: Callable[[Any], dict[str, Any]]) -> Callable:
    """Our config -> config.json of a tower that may have SigLIP's head."""

    def made(config: Any) -> dict[str, Any]:
        head = config.pooling == "attention"
        return fields(config) | {"vision_use_head": head, "architectures": [architecture]}

    return made


def faithful(family: Family, unsaid: Callable[[Any], dict[str, Any]] = lambda config: {}) -> Family:
    """The family, where `fields` refuses a config that its config.json cannot say.

    `unsaid` are the fields that tensors say (`Family.optional`). How a config is initialized and
    computed is nobody else's business.
    """

    def fields(config: Any) -> dict[str, Any]:
        made = family.fields(config)
        back = family.config(made | unsaid(config))
        own = {"remat": back.transformer.remat, "unroll": back.transformer.unroll}
        same = dataclasses.replace(
            config,
            transformer=dataclasses.replace(config.transformer, **own),
            init_scale=back.init_scale,
        )
        wrong = [name for name, value in vars(same).items() if getattr(back, name) != value]
        if wrong:
            raise InputError(
                f"{made['architectures'][0]} has no equal of this encoder's {', '.join(wrong)}"
            )
        return made

    return family._replace(fields=fields)


def siglip_modules(config: Any) -> dict[str, str]:
    """The modules of SigLIP's and SigLIP2's image towers."""
    del config
    own = {"patch": "embeddings.patch_embedding", "final_norm": "post_layernorm"}
    return numbered("encoder.layers", CLIP_LAYER) | own | SIGLIP_HEAD


def clip_modules(config: ViT) -> dict[str, str]:
    """The modules of CLIP's image tower."""
    return siglip_modules(config) | {"pre_norm": "pre_layrnorm"}  # so spelled


def _vit_modules(config: ViT) -> dict[str, str]:
    del config
    own = {"patch": EMBEDDED, "final_norm": "layernorm", "head": "pooler.dense"}
    return numbered("encoder.layer", VIT_LAYER) | own


def _dinov2_family(registers: bool) -> Family:
    scales = {
        f"layer/{part}_scale": Named(f"encoder.layer.{{}}.layer_scale{i}.lambda1")
        for i, part in enumerate(("attention", "mlp"), 1)
    }

    def modules(config: ViT) -> dict[str, str]:
        layer = VIT_ATTENTION | {"attention_norm": "norm1", "mlp_norm": "norm2"}
        layer |= (  # the gate before the value it multiplies, in one tensor
            {
                "mlp/gate": "mlp.weights_in",
                "mlp/up": "mlp.weights_in",
                "mlp/down": "mlp.weights_out",
            }
            if config.transformer.gated
            else {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
        )
        return numbered("encoder.layer", layer) | {"patch": EMBEDDED, "final_norm": "layernorm"}

    leaves = {
        "class_token": Named("embeddings.cls_token", 2),
        "mask_token": Named("embeddings.mask_token", 1),
        "positions": Named("embeddings.position_embeddings", 1),
        "registers": Named("embeddings.register_tokens", 1),
    }
    return faithful(
        Family(
            lambda hf: dinov2(hf, registers),
            lambda config: _dinov2_fields(config, registers),
            modules,
            leaves | scales,
            NOT_HERE,
            prefix="dinov2_with_registers." if registers else "dinov2.",
            optional={"embeddings.mask_token": "use_mask_token"},
        ),
        lambda config: {"use_mask_token": config.mask_token},
    )


FAMILIES: dict[str, Family] = {
    "clip_vision_model": faithful(
        Family(
            clip_vision,
            lambda config: vit_fields(config) | {"architectures": ["CLIPVisionModel"]},
            clip_modules,
            {
                "class_token": Named("embeddings.class_embedding"),
                "positions": Named("embeddings.position_embedding.weight"),
            },
            prefix="vision_model.",
        )
    ),
    "siglip_vision_model": faithful(
        Family(
            siglip_vision,
            siglip_fields("SiglipVisionModel", vit_fields),
            siglip_modules,
            SIGLIP_LEAVES,
            prefix="vision_model.",
        )
    ),
    "vit": faithful(
        Family(
            vit,
            _vit_fields,
            _vit_modules,
            {
                "class_token": Named("embeddings.cls_token", 2),
                "mask_token": Named("embeddings.mask_token", 2),
                "positions": Named("embeddings.position_embeddings", 1),
            },
            NOT_HERE,
            prefix="vit.",
            optional={
                "pooler.dense.weight": "add_pooling_layer",
                "embeddings.mask_token": "use_mask_token",
            },
        ),
        lambda c: {"add_pooling_layer": c.pooling == "tanh", "use_mask_token": c.mask_token},
    ),
    "dinov2": _dinov2_family(registers=False),
    "dinov2_with_registers": _dinov2_family(registers=True),
}
