"""The language objective: next tokens, tokens further on (MTP), and what balances the routers.

DeepSeek-V3, arXiv 2412.19437: multi-token prediction in section 2.2, the sequence-wise balance loss
in equations 17 to 20 (per sequence, averaged over sequences, summed over layers).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.core import target, tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.vision import Normalization, normalized
from deepseek_jax.layers.sparse_attention import GatedGQA
from deepseek_jax.models.build import Model
from deepseek_jax.models.vision_language import VisionLanguageModel
from deepseek_jax.ops.losses import cross_entropy
from deepseek_jax.ops.sparse import places
from deepseek_jax.parallel.manual import gathered, per_device
from deepseek_jax.parallel.sharding import tokens_spec, weight_spec
from deepseek_jax.training.optimizer import is_indexer, is_router_bias
from deepseek_jax.training.step import Objective

# What of a batch is for the model.
MEDIA = ("images", "shapes", "sounds")
INPUTS = ("tokens", "segments", "positions", "sources", *MEDIA)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """Next-token prediction."""

    mtp_weight: float = 0.3
    """Of the mean over the multi-token prediction depths (V3's lambda)."""
    z_weight: float = 0.0
    """Of the squared log-normalizer of the output distribution (PaLM: 1e-4)."""
    indexer_weight: float = 1.0
    """Of the indexers' divergence from the attention that they choose for (DeepSeek-V3.2)."""
    indexer_warmup: bool = False
    """Attention stays dense and only the indexers learn: V3.2's first stage."""
    chunk: int = 512
    """Tokens whose logits exist at a time."""

    def __post_init__(self):
        if min(self.mtp_weight, self.z_weight, self.indexer_weight) < 0 or self.chunk < 1:
            raise ValueError(
                f"objective.mtp_weight ({self.mtp_weight}), z_weight ({self.z_weight}) and "
                f"indexer_weight ({self.indexer_weight}) must be at least 0, chunk ({self.chunk}) "
                "at least 1."
            )


def inputs_of(batch: dict[str, Any], preset: Normalization = "half") -> dict[str, jax.Array]:
    """What a model takes of a batch; pixels that are uint8 normalized by `preset`."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    if "images" in inputs and inputs["images"].dtype == jnp.uint8:
        inputs["images"] = normalized(inputs["images"], preset)
    if {"sources", "weights"} <= batch.keys():
        inputs["learned"] = batch["weights"][..., 0] > 0  # which ends a question
    return inputs


@jax.custom_vjp
def _in_order(hidden, head):
    """Both as they are; backward, the head's slope is summed over devices before the rest goes on.

    Else a scheduler may hold all of it, unsharded, through the backward pass of every layer.
    """
    return hidden, head


_in_order.defvjp(
    lambda hidden, head: ((hidden, head), None),
    lambda _, slopes: jax.lax.optimization_barrier(slopes),
)


def make_language(
    config: Language, model: Model | VisionLanguageModel, preset: Normalization = "half"
) -> Objective:
    """The objective of a decoder on the batches of data/loader.

    A decoder that sees and hears takes `sources`, `images`, `shapes` and `sounds` in a batch as
    well, as its `apply` does; images that are uint8, as data/seeing makes them, are normalized by
    `preset`.

    Terms: `loss` (next-token cross-entropy), `cross_entropy` (with z: what is trained), `z_loss`,
    `mtp_loss`, `mtp_loss_2`, ... are means over tokens; summed over layers, and averaged over what
    stands here, `router/sequence_loss` (sequences), `router/z_loss` (tokens) and
    `router/uniform_loss` (microbatches: no sum over tokens, it changes with accumulation_steps).
    With a sparse attention: `attention/kept`, the part of all pairs that is seen, and of indexers
    `attention/indexer_loss`, a mean over tokens, summed over layers; a warm-up minimizes it alone.
    Raises InputError when model.moe is set and no layer has it, or nothing is there to warm up.
    """
    decoder = model.language.config if isinstance(model, VisionLanguageModel) else model.config
    indexer = getattr(decoder.attention, "indexer", None)
    if config.indexer_warmup:
        if isinstance(model, VisionLanguageModel) or indexer is None or not config.indexer_weight:
            raise InputError(
                "objective.indexer_warmup needs a model whose attention has an indexer, and an "
                "indexer_weight above 0"
            )
        model = model.dense()
    num_mtp = decoder.num_mtp_layers if config.mtp_weight else 0
    depths = {f"mtp_loss_{d}" if d > 1 else "mtp_loss": d for d in range(1, num_mtp + 1)}
    coefficients = {"cross_entropy": 1.0}
    coefficients |= dict.fromkeys(depths, config.mtp_weight / max(num_mtp, 1))
    sparse = indexer is not None or isinstance(decoder.attention, GatedGQA)
    moe, bias_rates, paths = decoder.moe, {}, tree.flatten(model.shapes)
    if moe is not None:
        if not any("/moe/" in path for path in paths):
            raise InputError(
                f"model.moe is set, but num_dense_layers ({decoder.num_dense_layers}) leaves "
                f"none of the {decoder.num_layers} layers to it: lower it or drop model.moe"
            )
        for name in ("sequence", "uniform", "z"):
            if weight := getattr(moe.balance, f"{name}_weight"):
                coefficients[f"router/{name}_loss"] = weight
        trained = [path for path in paths if num_mtp or not path.startswith("mtp_")]
        blocks = [path.removesuffix("/moe/router/bias") for path in filter(is_router_bias, trained)]
        bias_rates = dict.fromkeys(blocks, moe.balance.bias_rate)
    if config.indexer_warmup:  # nothing but the indexers moves
        coefficients, bias_rates = {}, {}
    if indexer is not None:
        coefficients["attention/indexer_loss"] = config.indexer_weight

    def trains(path: str) -> bool:
        return is_indexer(path) or not config.indexer_warmup

    def weights_fn(batch: dict[str, Any]) -> dict[str, jax.Array]:
        per_depth, valid = batch["weights"].sum((0, 1)), batch["segments"] > 0
        weights = dict.fromkeys(("loss", "cross_entropy", "z_loss"), per_depth[0])
        weights |= {name: per_depth[d] for name, d in depths.items()}
        if moe is not None:
            weights["router/sequence_loss"] = valid.any(1).sum().astype(jnp.float32)
            weights["router/uniform_loss"] = jnp.float32(1)
            weights["router/z_loss"] = valid.sum().astype(jnp.float32)
        if sparse:
            seen = jnp.where(valid, places(batch["segments"], valid.shape[1]) + 1, 0)
            layers = decoder.num_layers + num_mtp
            weights["attention/kept"] = seen.sum().astype(jnp.float32) * layers
        if indexer is not None:
            weights["attention/indexer_loss"] = valid.sum().astype(jnp.float32)
        return weights

    def loss_fn(params: Any, batch: dict[str, Any], key: jax.Array) -> tuple[dict, dict]:
        del key  # nothing in this model is random
        targets, weights = batch["targets"], batch["weights"]
        inputs = inputs_of(batch, preset)
        if num_mtp:
            inputs["next_tokens"] = targets[..., :num_mtp]
        output = model.apply(params, **inputs)
        head = model.head(params)

        def of_depth(hidden, depth, z_weight=0.0):
            given = *_in_order(hidden, head), targets[..., depth], weights[..., depth]
            return entropy(*given, z_weight=z_weight, chunk=config.chunk)

        total, nll, z = of_depth(output.hidden, 0, config.z_weight)
        sums = {"loss": nll, "cross_entropy": total, "z_loss": z}
        sums |= {name: of_depth(output.mtp[d - 1], d)[0] for name, d in depths.items()}
        sums |= block_terms(output.routing.values(), output.selection.values())
        terms = {name: (sums[name], weight) for name, weight in weights_fn(batch).items()}
        return terms, {path: found._replace(chosen=None) for path, found in output.routing.items()}

    return Objective(loss_fn, weights_fn, coefficients, bias_rates, trains)


def block_terms(routing: Iterable[Any], selection: Iterable[Any]) -> dict[str, Any]:
    """The terms that blocks contribute, summed over them."""
    sums = {}
    for group, blocks, names in (
        (
            "router",
            [*routing],
            {name: name for name in ("sequence_loss", "uniform_loss", "z_loss")},
        ),
        ("attention", [*selection], {"kept": "kept", "indexer_loss": "divergence"}),
    ):
        for name, field in names.items():
            sums[f"{group}/{name}"] = sum(getattr(block, field).sum() for block in blocks)
    return sums


def entropy(hidden, head, targets, weights, **options):
    """`cross_entropy` of [B, T, D]; on a mesh each device's own tokens, the head gathered once.

    Left to itself, XLA would gather the head, and sum its slope, for every chunk of tokens. Where
    the tensor axis splits the vocabulary, a device has the logits of its own part of it.
    """
    spec = tokens_spec(*hidden.shape[:2])
    if spec is None or not target.partitioned():
        return of_tokens(hidden, head, targets, weights, **options)
    rows, whole = weight_spec(("embed", "vocab"), head.shape), PartitionSpec()
    axis = "tensor" if "tensor" in rows else None
    everywhere = (*spec[0], spec[1]) + (("tensor",) if axis else ())
    share = jax.lax.axis_size if axis else lambda _: 1

    def of_one(hidden, head, targets, weights):
        head = gathered(head, rows, keep=("tensor",))
        sums = of_tokens(hidden, head, targets, weights, axis=axis, **options)
        return [jax.lax.psum(x / share("tensor"), everywhere) for x in sums]

    tokens = PartitionSpec(*spec[:2])
    apply = per_device(of_one, (spec, rows, tokens, tokens), [whole] * 3)
    return apply(hidden, head, targets, weights)


def of_tokens(hidden, head, targets, weights, **options):
    """`cross_entropy` of [B, T, D]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return cross_entropy(flat, head, targets.reshape(-1), weights.reshape(-1), **options)
