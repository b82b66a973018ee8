"""Swin encoders of Hugging Face (transformers: models/swin), under the names that lie on disk.

In memory transformers 5 calls them otherwise, and turns these names around as it reads and writes.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint.tables import (
    THEIR_ACTIVATIONS,
    Family,
    Named,
    activation,
    only,
    square,
)
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.swin import Swin, runs

DEFAULTS = {
    "image_size": 224, "patch_size": 4, "num_channels": 3, "embed_dim": 96,
    "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "mlp_ratio": 4.0,
    "qkv_bias": True, "hidden_act": "gelu", "use_absolute_embeddings": False,
    "layer_norm_eps": 1e-5,
}  # fmt: skip
BLOCK = {
    "attention_norm": "layernorm_before", "mlp_norm": "layernorm_after",
    "attention/q": "attention.self.query", "attention/k": "attention.self.key",
    "attention/v": "attention.self.value", "attention/o": "attention.output.dense",
    "mlp/up": "intermediate.dense", "mlp/down": "output.dense",
}  # fmt: skip
KINDS = {"plain": "encoder.layers.{0}.blocks.{1}.", "shifted": "encoder.layers.{0}.blocks.{2}."}


def swin(hf: Mapping[str, Any]) -> Swin:
    """Swin's config."""
    filled = DEFAULTS | hf
    only(filled, "Swin", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    patch = square(filled["patch_size"])
    if patch[0] != patch[1]:
        raise InputError(f"Swin: patch_size is {patch}; only squares are understood")
    return Swin(
        image_size=square(filled["image_size"]),
        patch_size=patch[0],
        num_channels=filled["num_channels"],
        embed_dim=filled["embed_dim"],
        depths=tuple(filled["depths"]),
        num_heads=tuple(filled["num_heads"]),
        window=filled["window_size"],
        mlp_ratio=float(filled["mlp_ratio"]),
        activation=activation(filled, "hidden_act"),
        qkv_bias=filled["qkv_bias"],
        absolute_positions=filled["use_absolute_embeddings"],
        norm_eps=filled["layer_norm_eps"],
    )


def fields(config: Swin) -> dict[str, Any]:
    """What config.json calls them."""
    height, width = config.image_size
    return {
        "architectures": ["SwinModel"],
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "embed_dim": config.embed_dim,
        "depths": [*config.depths],
        "num_heads": [*config.num_heads],
        "window_size": config.window,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "hidden_act": THEIR_ACTIVATIONS[config.activation],
        "use_absolute_embeddings": config.absolute_positions,
        "layer_norm_eps": config.norm_eps,
    }


def modules(config: Swin) -> dict[str, str]:
    """The modules of a Swin; see `places` for the numbers of their blocks."""
    found = {
        f"layer/{kind}/{ours}": there + theirs
        for kind, there in KINDS.items()
        for ours, theirs in BLOCK.items()
    }
    for stage in range(len(config.depths) - 1):
        for part in ("norm", "reduction"):
            found[f"merging_{stage}/{part}"] = f"encoder.layers.{stage}.downsample.{part}"
    return found | {
        "patch": "embeddings.patch_embeddings.projection",
        "patch_norm": "embeddings.norm",
        "final_norm": "layernorm",
    }


def places(config: Swin, number: int) -> tuple[int, int, int]:
    """Of the pair with this number: its stage, and its blocks' numbers in it."""
    pairs = [(run.stage, run.first + 2 * i) for run in runs(config) for i in range(run.repeats)]
    stage, first = pairs[number]
    return stage, first, first + 1


FAMILIES: dict[str, Family] = {
    "swin": Family(
        swin,
        fields,
        modules,
        {"positions": Named("embeddings.position_embeddings", 1)}
        | {
            f"layer/{kind}/attention/relative_positions": Named(
                there + "attention.self.relative_position_bias_table"
            )
            for kind, there in KINDS.items()
        },
        # A classifier's head, a pretraining model's decoder and masked token.
        ignored=r".*relative_position_index|classifier\..*|decoder\..*|embeddings\.mask_token",
        prefix="swin.",
        places=places,
    ),
}
