"""DeepSeek-VL and Janus as DeepSeek itself released them: model_type "multi_modality".

Of Janus what draws is left out. DeepSeek-VL 7B has a second encoder, and its config.json says how
pictures are normalized (`pixels`); elsewhere the processor's file does.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint import families, sam_encoders, tables
from deepseek_jax.checkpoint.deepseek_vl import LLAMA
from deepseek_jax.checkpoint.deepseek_vl2 import VL2_LEAVES, VL2_MODULES
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
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.projectors import MLPProjector, SplitProjector
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT

TOWERS = {  # encoders that a config.json names: patch, width, layers, heads, inner width
    "siglip_large_patch16_384": (16, 1024, 24, 16, 4096),
    "siglip_so400m_patch14_384": (14, 1152, 27, 16, 4304),
}
TOWER = {"select_feature": "same", "select_layer": -1}
SAM_B = sam_encoders.sam_vision({})


# What DeepSeek-VL 7B has beside the tower above: Segment Anything's base, and their layout.
SAMS = {"sam_b_downsample": SAM_B}
HYBRID = {"concat_type": "tuple", "use_ln": False}
SPLIT = "low_high_hybrid_split_mlp_gelu"


def config_of(hf: Mapping[str, Any]) -> VisionLanguage:
    """A model whose parts' configs are {"cls": a class, "params": its arguments}."""
    vision, aligner = hf["vision_config"], hf["aligner_config"]
    only(aligner, "aligner_config", cls="MlpProjector")
    two = vision.get("cls") == "HybridVisionTower"
    if not two:
        only(vision, "vision_config", cls="CLIPVisionTower")
    given, projector = vision["params"], aligner["params"]
    text = LLAMA | {"tie_word_embeddings": False} | hf["language_config"]
    language = families.decoder(text)
    if not two:
        only(given, "vision_config", pixel_mean=None, pixel_std=None)
    low = _tower(given["low_res_cfg"] if two else given)
    only(
        projector, "aligner_config", projector_type=SPLIT if two else "mlp_gelu",
        input_dim=low.transformer.embed_dim, n_embed=language.embed_dim,
    )  # fmt: skip
    depth = projector["depth"]
    if not two:
        return VisionLanguage(language=language, vision=low, projector=MLPProjector(depth=depth))
    only(given, "vision_config", **HYBRID)
    large = TOWER | given["high_res_cfg"]
    only(large, "high_res_cfg", **TOWER)
    if (name := large["model_name"]) not in SAMS:
        raise InputError(f"model_name is {name!r}; understood are {', '.join(SAMS)}")
    high = dataclasses.replace(SAMS[name], image_size=large["image_size"])
    return VisionLanguage(
        language=language,
        vision=Hybrid(low=low, high=high),
        projector=SplitProjector(depth=depth),
    )


def _tower(given: Mapping[str, Any]) -> ViT:
    tower = TOWER | given
    only(tower, "vision_config", **TOWER)
    if (name := tower["model_name"]) not in TOWERS:
        raise InputError(f"model_name is {name!r}; understood are {', '.join(TOWERS)}")
    patch, width, layers, heads, inner = TOWERS[name]
    return ViT(
        transformer=Transformer(num_layers=layers, embed_dim=width, num_heads=heads, mlp_dim=inner),
        image_size=tables.square(tower.get("image_size", 384)),
        patch_size=patch,
        class_token=False,
        pooling="none",
    )


def fields(config: VisionLanguage) -> dict[str, Any]:
    """The fields of config.json that say how the model reads."""
    two = isinstance(config.vision, Hybrid)
    low = config.vision.low if two else one_encoder(config)
    t = low.transformer
    sizes = low.patch_size, t.embed_dim, t.num_layers, t.num_heads, t.mlp_dim
    name = next((name for name, known in TOWERS.items() if known == sizes), None)
    if name is None or not isinstance(config.projector, MLPProjector | SplitProjector):
        raise InputError(f"multi_modality has the encoders {', '.join(TOWERS)} and an MLP")
    height, width = low.image_size
    tower = TOWER | {
        "model_name": name,
        "image_size": height if height == width else [height, width],
    }
    if two:
        high = config.vision.high
        large = TOWER | {"model_name": next(iter(SAMS)), "image_size": high.image_size}
        large["output_dim"] = config.vision.widths[0]
        tower = {"high_res_cfg": large, "low_res_cfg": tower, "concat_type": "tuple"}
    aligner = {
        "projector_type": SPLIT if two else "mlp_gelu",
        "depth": config.projector.depth,
        "input_dim": t.embed_dim,
        "n_embed": config.language.embed_dim,
    }
    cls = "HybridVisionTower" if two else "CLIPVisionTower"
    found = {
        "language_config": text_fields(config.language),
        "vision_config": {"cls": cls, "model_type": "vision", "params": tower},
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
        "architectures": ["MultiModalityCausalLM"],
    }
    check_said(config_of(found), config, "multi_modality")
    return found


def pixels(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSeek-VL 7B's config.json says of pictures, as transformers' processors call it."""
    parts = (hf.get("vision_config") or {}).get("params") or {}
    return {
        f"{prefix}image_{name}": parts[part].get(f"pixel_{name}")
        for prefix, part in (("high_res_", "high_res_cfg"), ("", "low_res_cfg"))
        for name in ("mean", "std")
        if part in parts
    }


def modules(config: VisionLanguage) -> dict[str, str]:
    """Of one encoder's model, or of two's."""
    return (TWO if isinstance(config.vision, Hybrid) else ONE)(config)


PREFIX = "vision_model.vision_tower."
LOW, HIGH = (f"vision_model.vision_tower_{part}.vision_tower." for part in ("low", "high"))
NECK = {"conv_1/conv": "0", "norm_1": "1", "conv_2/conv": "2", "norm_2": "3"}
BLOCKS = {
    "patch": "patch_embed.proj",
    "layer/attention_norm": "blocks.{}.norm1", "layer/mlp_norm": "blocks.{}.norm2",
    "layer/attention/o": "blocks.{}.attn.proj",
    "layer/mlp/up": "blocks.{}.mlp.lin1", "layer/mlp/down": "blocks.{}.mlp.lin2",
}  # fmt: skip
SAM_LEAVES = {
    ours: named._replace(name=re.sub("^layers", "blocks", named.name))
    for ours, named in sam_encoders.LEAVES.items()
}
ONE = modules_of(
    VL2_MODULES, PREFIX, {n: f"aligner.layers.{2 * n - 2}" for n in range(1, MOST + 1)}
)
TWO = hybrid_modules(
    (VL2_MODULES, LOW),
    (BLOCKS | under(NECK, "neck/", "neck."), HIGH),
    under(NECK, "vision/neck/", f"{HIGH}neck_hd.")
    | {f"vision/down_{n}/conv": f"{HIGH}downsamples.{n - 1}" for n in (1, 2)}
    | {"projector/low": "aligner.low_up_proj", "projector/high": "aligner.high_up_proj"}
    | {f"projector/linear_{n}": f"aligner.layers.{2 * n - 3}" for n in range(2, MOST + 1)},
)
FAMILIES: dict[str, Joined] = {
    "multi_modality": Joined(
        Family(
            config_of,
            fields,
            modules,
            leaves_of(PREFIX, VL2_LEAVES)
            | hybrid_leaves(
                (VL2_LEAVES, LOW),
                (SAM_LEAVES, HIGH),
                {"vision/alpha": Named(f"{HIGH}hd_alpha_downsamples")},
            ),
            # SigLIP's own pooling, whose answer goes nowhere, norms that nothing passes, and what
            # draws.
            ignored=rf"({PREFIX}|{LOW})attn_pool\..*|vision_model\.(high|low)_layer_norm\..*"
            r"|gen_(vision_model|aligner|head|embed)\..*",
        ),
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    ),
}
