"""Segment Anything's image encoder of Hugging Face (transformers: models/sam, sam_vision_model)."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint import tables
from deepseek_jax.checkpoint.tables import THEIR_ACTIVATIONS, Family, Named, only, under
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.sam import SAM

DEFAULTS = {
    "hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "qkv_bias": True, "mlp_ratio": 4.0, "use_abs_pos": True,
    "use_rel_pos": True, "window_size": 14, "global_attn_indexes": [2, 5, 8, 11], "mlp_dim": None,
}  # fmt: skip
MODULES = {
    "patch": "patch_embed.projection",
    "layer/attention_norm": "layers.{}.layer_norm1", "layer/mlp_norm": "layers.{}.layer_norm2",
    "layer/attention/o": "layers.{}.attn.proj",
    "layer/mlp/up": "layers.{}.mlp.lin1", "layer/mlp/down": "layers.{}.mlp.lin2",
}  # fmt: skip
NECK = {
    "conv_1/conv": "conv1", "norm_1": "layer_norm1", "conv_2/conv": "conv2",
    "norm_2": "layer_norm2",
}  # fmt: skip
LEAVES = {"positions": Named("pos_embed", 1)} | {
    f"layer/attention/{ours}": Named(f"layers.{{}}.attn.{theirs}")
    for ours, theirs in (
        ("rows", "rel_pos_h"),
        ("columns", "rel_pos_w"),
        *((f"{n}/{leaf}", f"qkv.{leaf}") for leaf in ("weight", "bias") for n in "qkv"),
    )
}
TOWER = "vision_encoder."


def sam_vision(hf: Mapping[str, Any]) -> SAM:
    """The image encoder's config."""
    filled = DEFAULTS | {name: value for name, value in hf.items() if value is not None}
    only(filled, "SAM", attention_dropout=0.0)
    height, width = tables.square(filled["image_size"])
    patch, other = tables.square(filled["patch_size"])
    if height != width or patch != other:
        raise InputError(
            f"SAM: image_size {height, width} and patch_size {patch, other} must be squares"
        )
    layers = filled["num_hidden_layers"]
    windowed = filled["window_size"] > 0  # 0: every block sees the whole
    inner = filled["mlp_dim"] or int(filled["hidden_size"] * filled["mlp_ratio"])
    return SAM(
        transformer=tables.transformer(
            filled, mlp_dim=inner, biases="qkvo" if filled["qkv_bias"] else "o"
        ),
        image_size=height,
        patch_size=patch,
        num_channels=filled["num_channels"],
        window=filled["window_size"] or DEFAULTS["window_size"],
        whole_layers=tuple(filled["global_attn_indexes"]) if windowed else tuple(range(layers)),
        absolute_positions=filled["use_abs_pos"],
        relative_positions=filled["use_rel_pos"],
        output_dim=filled["output_channels"],
    )


def fields(config: SAM) -> dict[str, Any]:
    """What config.json calls them."""
    t = config.transformer
    found = tables.transformer_fields(t)
    del found["intermediate_size"]
    return found | {
        "architectures": ["SamVisionModel"],
        "hidden_act": THEIR_ACTIVATIONS[t.activation],
        "mlp_dim": t.mlp_dim,
        "qkv_bias": "q" in t.biases,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "window_size": config.window,
        "global_attn_indexes": [*config.whole_layers],
        "use_abs_pos": config.absolute_positions,
        "use_rel_pos": config.relative_positions,
        "output_channels": config.output_dim,
    }


SAM_MODULES = MODULES | under(NECK, "neck/", "neck.")
FAMILIES: dict[str, Family] = {
    "sam_vision_model": Family(
        sam_vision,
        fields,
        lambda config: under(SAM_MODULES, "", TOWER),
        {ours: named._replace(name=TOWER + named.name) for ours, named in LEAVES.items()},
    ),
}
