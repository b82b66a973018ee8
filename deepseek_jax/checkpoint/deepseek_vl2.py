"""DeepSeek-VL2 tiny, small and base, as its hub folders have them (transformers has no class)."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint import families, tables
from deepseek_jax.checkpoint.joined import (
    MOST,
    Joined,
    check_said,
    leaves_of,
    modules_of,
    one_encoder,
    text_fields,
)
from deepseek_jax.checkpoint.tables import Family, Named, only
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.layers.mla import MLA
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.projectors import DownsampleProjector
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT
from deepseek_jax.ops.routing import Sigmoid

VL2_VISION = {  # the published code's defaults
    "image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16,
    "mlp_ratio": 4.0, "class_token": False, "ignore_head": True, "num_classes": 0,
}  # fmt: skip
VL2_PROJECTOR = {
    "projector_type": "downsample_mlp_gelu", "input_dim": 1152, "n_embed": 2048, "depth": 2,
    "mlp_ratio": 1, "downsample_ratio": 2, "token_pooling": False,
}  # fmt: skip
VL2_LANGUAGE = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 1407, "num_hidden_layers": 30, "num_attention_heads": 32,
    "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "greedy",
    "scoring_func": "softmax", "norm_topk_prob": False, "use_mla": True,
}  # fmt: skip


def vl2(hf: Mapping[str, Any]) -> VisionLanguage:
    """DeepSeek-VL2."""
    only(hf, "VL2", tile_tag="2D", global_view_pos="head")
    vision = VL2_VISION | (hf.get("vision_config") or {})
    only(vision, "VL2", class_token=False, ignore_head=True, num_classes=0)
    projector = VL2_PROJECTOR | (hf.get("projector_config") or {})
    language = vl2_decoder(hf.get("language_config") or {})
    only(
        projector, "VL2", projector_type="downsample_mlp_gelu", token_pooling=False,
        input_dim=vision["width"], n_embed=language.embed_dim,
    )  # fmt: skip
    transformer = Transformer(
        num_layers=vision["layers"],
        embed_dim=vision["width"],
        num_heads=vision["heads"],
        mlp_dim=int(vision["width"] * vision["mlp_ratio"]),
        activation="gelu_tanh",
    )
    return VisionLanguage(
        language=language,
        vision=ViT(
            transformer=transformer,
            image_size=tables.square(vision["image_size"]),
            patch_size=vision["patch_size"],
            class_token=False,
            pooling="none",
        ),
        projector=DownsampleProjector(
            factor=projector["downsample_ratio"],
            depth=projector["depth"],
            ratio=projector["mlp_ratio"],
        ),
        image_id=hf.get("image_token_id"),
    )


def vl2_decoder(hf: Mapping[str, Any]) -> Decoder:
    """VL2's decoder: tiny's is DeepSeekMoE's, small's V2-Lite's, base's V3's router on V2's MLA."""
    filled = VL2_LANGUAGE | hf
    if filled["topk_method"] == "gready":  # so spelled in the published code
        filled["topk_method"] = "greedy"
    sigmoid = filled["scoring_func"] == "sigmoid"
    if not sigmoid:
        only(filled, "VL2", scoring_func="softmax", norm_topk_prob=False)
    if filled["use_mla"]:
        kind = "deepseek_v3" if sigmoid else "deepseek_v2"
    else:
        kind = "deepseek"
        only(filled, "VL2 without MLA", scoring_func="softmax")
    extra = {"num_nextn_predict_layers": 0, "model_type": kind}
    return families.decoder(filled | extra)


def vl2_fields(config: VisionLanguage) -> dict[str, Any]:
    """The fields of VL2's config.json."""
    t, projector, language = one_encoder(config).transformer, config.projector, config.language
    if not isinstance(projector, DownsampleProjector):
        raise InputError("VL2 has a DownsampleProjector")
    latent = isinstance(language.attention, MLA)
    text = text_fields(language) | {"model_type": "deepseek_v2", "use_mla": latent}
    text |= {"architectures": ["DeepseekV2ForCausalLM"], "lm_head": True}
    if not latent:
        dims = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        text |= {"kv_lora_rank": None, "q_lora_rank": None} | dict.fromkeys(dims, 0)
    moe = language.moe
    text["scoring_func"] = "sigmoid" if moe and isinstance(moe.router, Sigmoid) else "softmax"
    height, width = config.vision.image_size
    fields = {
        "language_config": text,
        "vision_config": {
            "model_type": "vision",
            "image_size": height if height == width else [height, width],
            "patch_size": config.vision.patch_size,
            "width": t.embed_dim,
            "layers": t.num_layers,
            "heads": t.num_heads,
            "mlp_ratio": _ratio(t.embed_dim, t.mlp_dim),
        },
        "projector_config": {
            "model_type": "mlp_projector",
            "projector_type": "downsample_mlp_gelu",
            "input_dim": t.embed_dim,
            "n_embed": language.embed_dim,
            "depth": projector.depth,
            "mlp_ratio": projector.ratio,
            "downsample_ratio": projector.factor,
        },
        "tile_tag": "2D",
        "global_view_pos": "head",
        "architectures": ["DeepseekVLV2ForCausalLM"],
    }
    if config.image_id is not None:
        fields["image_token_id"] = config.image_id
    check_said(vl2(fields), config, "VL2")
    return fields


def _ratio(width: int, inner: int) -> float:
    """A ratio that int(width * ratio) makes `inner`."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width


VL2_MODULES = {
    "layer/attention_norm": "blocks.{}.norm1", "layer/mlp_norm": "blocks.{}.norm2",
    "layer/attention/o": "blocks.{}.attn.proj",
    "layer/mlp/up": "blocks.{}.mlp.fc1", "layer/mlp/down": "blocks.{}.mlp.fc2",
    "patch": "patch_embed.proj", "final_norm": "norm",
}  # fmt: skip
VL2_LEAVES = {"positions": Named("pos_embed", 1)} | {
    f"layer/attention/{n}/{leaf}": Named(f"blocks.{{}}.attn.qkv.{leaf}")
    for leaf in ("weight", "bias")
    for n in "qkv"  # one tensor there, in this order
}
FAMILIES: dict[str, Joined] = {
    "deepseek_vl_v2": Joined(
        Family(
            vl2,
            vl2_fields,
            modules_of(
                VL2_MODULES,
                "vision.",
                {n: f"projector.layers.{2 * n - 2}" for n in range(1, MOST + 1)},
            ),
            leaves_of("vision.", VL2_LEAVES)
            | {
                "image_newline": Named("image_newline"),
                "view_separator": Named("view_seperator"),  # so spelled
            },
            ignored=r"vision\.attn_pool\..*",  # SigLIP's own pooling: its answer goes nowhere
        ),
        {"model.": "language.model.", "lm_head.": "language.lm_head."},
    ),
}
