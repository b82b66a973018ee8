"""DeepSeek-VL and Janus as DeepSeek itself released them: model_type "multi_modality".

Of Janus what draws is left out. DeepSeek-VL 7B, which has a second encoder, is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint import families, tables
from deepseek_jax.checkpoint.deepseek_vl import LLAMA
from deepseek_jax.checkpoint.deepseek_vl2 import VL2_LEAVES, VL2_MODULES
from deepseek_jax.checkpoint.joined import (
    MOST,
    Joined,
    check_said,
    leaves_of,
    modules_of,
    text_fields,
)
from deepseek_jax.checkpoint.tables import Family, only
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.projectors import MLPProjector
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT

TOWERS = {  # encoders that a config.json names: patch, width, layers, heads, inner width
    "siglip_large_patch16_384": (16, 1024, 24, 16, 4096),
    "siglip_so400m_patch14_384": (14, 1152, 27, 16, 4304),
}
TOWER = {"select_feature": "same", "select_layer": -1}


def config_of(hf: Mapping[str, Any]) -> VisionLanguage:
    """A model whose parts' configs are {"cls": a class, "params": its arguments}."""
    vision, aligner = hf["vision_config"], hf["aligner_config"]
    only(vision, "vision_config", cls="CLIPVisionTower")
    only(aligner, "aligner_config", cls="MlpProjector")
    tower, projector = TOWER | vision["params"], aligner["params"]
    only(tower, "vision_config", **TOWER, pixel_mean=None, pixel_std=None)
    if (name := tower["model_name"]) not in TOWERS:
        raise InputError(f"model_name is {name!r}; understood are {', '.join(TOWERS)}")
    patch, width, layers, heads, inner = TOWERS[name]
    text = LLAMA | {"tie_word_embeddings": False} | hf["language_config"]
    language = families.decoder(text)
    only(
        projector, "aligner_config", projector_type="mlp_gelu",
        input_dim=width, n_embed=language.embed_dim,
    )  # fmt: skip
    transformer = Transformer(num_layers=layers, embed_dim=width, num_heads=heads, mlp_dim=inner)
    return VisionLanguage(
        language=language,
        vision=ViT(
            transformer=transformer,
            image_size=tables.square(tower.get("image_size", 384)),
            patch_size=patch,
            class_token=False,
            pooling="none",
        ),
        projector=MLPProjector(depth=projector["depth"]),
    )


def fields(config: VisionLanguage) -> dict[str, Any]:
    """The fields of config.json that say how the model reads."""
    t, vision = config.vision.transformer, config.vision
    sizes = vision.patch_size, t.embed_dim, t.num_layers, t.num_heads, t.mlp_dim
    name = next((name for name, known in TOWERS.items() if known == sizes), None)
    if name is None or not isinstance(config.projector, MLPProjector):
        raise InputError(f"multi_modality has the encoders {', '.join(TOWERS)} and an MLPProjector")
    height, width = vision.image_size
    tower = TOWER | {
        "model_name": name,
        "image_size": height if height == width else [height, width],
    }
    aligner = {
        "projector_type": "mlp_gelu",
        "depth": config.projector.depth,
        "input_dim": t.embed_dim,
        "n_embed": config.language.embed_dim,
    }
    found = {
        "language_config": text_fields(config.language),
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": tower},
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
        "architectures": ["MultiModalityCausalLM"],
    }
    check_said(config_of(found), config, "multi_modality")
    return found


PREFIX = "vision_model.vision_tower."
FAMILIES: dict[str, Joined] = {
    "multi_modality": Joined(
        Family(
            config_of,
            fields,
            modules_of(
                VL2_MODULES,
                PREFIX,
                {n: f"aligner.layers.{2 * n - 2}" for n in range(1, MOST + 1)},
            ),
            leaves_of(PREFIX, VL2_LEAVES),
            # SigLIP's own pooling, whose answer goes nowhere, and what draws.
            ignored=rf"{PREFIX}attn_pool\..*|gen_(vision_model|aligner|head|embed)\..*",
        ),
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    ),
}
