"""What Hugging Face calls our weights: one table, used in both directions.

A torch matrix is [outputs, inputs] and ours [inputs..., outputs...]; `Spec` says which dimensions
are which. Two of ours may lie in one of theirs (MLA's key and value projections, a head's key rows
before its value rows), and our stacked experts are one tensor each there. Sources: the models of
transformers 5.23 and the published checkpoints' indexes.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checkpoint.manager import disk_names
from deepseek_jax.checkpoint.safetensors import Source, Tensor
from deepseek_jax.core import tree
from deepseek_jax.core.axes import Spec
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.attention import GQA
from deepseek_jax.models.build import Model
from deepseek_jax.models.decoder import Decoder, layer_table

TOP = {
    "embedding/weight": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
PARTS = ("gate", "up", "down")
LAYER = {  # behind layer_N/ and model.layers.N.
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"attention/{n}/weight": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"attention/{n}/bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
    "attention/q_down/weight": "self_attn.q_a_proj.weight",
    "attention/q_norm/scale": "self_attn.q_a_layernorm.weight",  # of MLA; GROUPED has GQA's
    "attention/q_up/weight": "self_attn.q_b_proj.weight",
    "attention/kv_down/weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attention/k_up/weight": "self_attn.kv_b_proj.weight",
    "attention/v_up/weight": "self_attn.kv_b_proj.weight",
    "attention/indexer/q_up/weight": "self_attn.indexer.wq_b.weight",
    "attention/indexer/k/weight": "self_attn.indexer.wk.weight",
    "attention/indexer/k_norm/scale": "self_attn.indexer.k_norm.weight",
    "attention/indexer/k_norm/bias": "self_attn.indexer.k_norm.bias",
    "attention/indexer/weight": "self_attn.indexer.weights_proj.weight",
    **{f"mlp/{n}/weight": f"mlp.{n}_proj.weight" for n in PARTS},
    **{f"moe/shared/{n}/weight": f"mlp.shared_experts.{n}_proj.weight" for n in PARTS},
    **{f"moe/experts/{n}": f"mlp.experts.{{}}.{n}_proj.weight" for n in PARTS},
    "moe/router/weight": "mlp.gate.weight",
    "moe/router/bias": "mlp.gate.e_score_correction_bias",
}  # fmt: skip
GROUPED = {f"attention/{n}_norm/scale": f"self_attn.{n}_norm.weight" for n in "qk"}
MTP = {  # behind mtp_D/ and model.layers.N. of the layers past the last
    "embedding_norm/scale": "enorm.weight",
    "hidden_norm/scale": "hnorm.weight",
    "projection/weight": "eh_proj.weight",
    "final_norm/scale": "shared_head.norm.weight",
}
COPIES = {"embed_tokens.weight": "embedding/weight", "shared_head.head.weight": "head/weight"}
# What some checkpoints carry beside their weights: tables that every reader makes itself.
COMPUTED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


class Row(NamedTuple):
    """One tensor of theirs and those of ours (by their names on disk) that lie in it."""

    theirs: str
    ours: tuple[str, ...]
    expert: int | None = None


class Leaf(NamedTuple):
    """A weight of ours as it lies on disk: of one layer, its experts stacked."""

    shape: tuple[int, ...]
    spec: Spec


def leaves(model: Model) -> dict[str, Leaf]:
    """A model's weights by their names on disk."""
    layers = layer_table(model.config)
    specs = tree.flatten(model.specs, is_leaf=lambda node: isinstance(node, Spec))
    found = {}
    for path, leaf in tree.flatten(model.shapes).items():
        one = Leaf(leaf.shape, specs[path])
        if rows := disk_names(path, leaf.shape, layers):
            one = Leaf(leaf.shape[1:], specs[path].unstacked())
        found |= dict.fromkeys(rows or [path], one)
    return found


def table(config: Decoder, ours: Mapping[str, Leaf]) -> list[Row]:
    """Their names of all of a model's weights, in their order, the copies of an MTP layer last.

    Raises InputError for a weight that they have no name for.
    """
    rows: dict[str, Row] = {}
    known = TOP | {f"layer/{ours}": theirs for ours, theirs in LAYER.items()}
    known |= {f"mtp/{ours}": theirs for ours, theirs in MTP.items()}
    if isinstance(config.attention, GQA):
        known |= {f"layer/{ours}": theirs for ours, theirs in GROUPED.items()}
    for path, leaf in ours.items():
        kind, number, rest = re.fullmatch(r"([a-z_]+?)(?:_(\d+))?/(.*)", path).groups()
        if (name := known.get(f"{kind}/{rest}")) is None:
            raise InputError(f"Hugging Face's models have no weight like {path}")
        past = config.num_layers if kind == "mtp" else 0
        prefix = "" if number is None else f"model.layers.{int(number) + past}."
        if rest.startswith("moe/experts/"):
            for expert in range(leaf.shape[0]):
                key = prefix + name.format(expert)
                rows[key] = Row(key, (path,), expert)
        else:
            before = rows[prefix + name].ours if prefix + name in rows else ()
            rows[prefix + name] = Row(prefix + name, (*before, path))
    copied = [Row(key, (path,)) for key, path in copies(config, ours).items()]
    return [*rows.values(), *copied]


def copies(config: Decoder, ours: Mapping[str, Leaf]) -> dict[str, str]:
    """Their names of what an MTP layer repeats there -> the weight of ours that it repeats."""
    return {
        f"model.layers.{config.num_layers + depth}.{name}": path
        for depth in range(config.num_mtp_layers)
        for name, path in COPIES.items()
        if path in ours  # no head where it is tied
    }


def empty(config: Decoder) -> dict[str, tuple[int, ...]]:
    """The tensors without values that a model without shared experts has there: their shapes."""
    moe, found = config.moe, {}
    if moe is None or moe.num_shared_experts:
        return found
    for layer in range(config.num_dense_layers, config.num_layers + config.num_mtp_layers):
        for part in PARTS:
            shape = (config.embed_dim, 0) if part == "down" else (0, config.embed_dim)
            found[f"model.layers.{layer}.mlp.shared_experts.{part}_proj.weight"] = shape
    return found


def is_quantized(theirs: str) -> bool:
    """Whether DeepSeek stores this matrix as float8 (transformers' names)."""
    projections = (
        "_proj.weight",
        "kv_a_proj_with_mqa.weight",
        "indexer.wq_b.weight",
        "indexer.wk.weight",
    )
    plain = ("eh_proj.weight", "indexer.weights_proj.weight")
    inside = theirs.startswith("model.layers.") and theirs.endswith(projections)
    return inside and not theirs.endswith(plain)


def _sides(leaf: Leaf, path: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A matrix's (outputs, inputs) dimensions; None for what is stored as it is."""
    if path == "embedding/weight" or not leaf.spec.reduced:
        return None
    return leaf.spec.outputs, leaf.spec.reduced


def their_shape(row: Row, ours: Mapping[str, Leaf]) -> tuple[int, ...]:
    """The shape that a tensor of theirs must have."""
    first = ours[row.ours[0]]
    sides = _sides(first, row.ours[0])
    if sides is None:
        return first.shape if row.ours[0] == "embedding/weight" else (math.prod(first.shape),)
    inputs = math.prod(first.shape[i] for i in sides[1])
    outputs = sum(math.prod(ours[p].shape[i] for i in ours[p].spec.outputs) for p in row.ours)
    return outputs, inputs


def joined(row: Row, ours: Mapping[str, Leaf], arrays: list[np.ndarray]) -> np.ndarray:
    """Their tensor, a view where that can be, from the weights of ours that lie in it."""
    first = ours[row.ours[0]]
    sides = _sides(first, row.ours[0])
    if sides is None:
        return arrays[0].reshape(their_shape(row, ours))
    if row.expert is not None:
        return arrays[0][row.expert].T
    turned = [array.transpose(*sides[1], *sides[0]) for array in arrays]
    whole = np.concatenate(turned, -1) if len(turned) > 1 else turned[0]
    return whole.reshape(their_shape(row, ours)[::-1]).T


def sources(
    config: Decoder, ours: Mapping[str, Leaf], theirs: Mapping[str, Tensor]
) -> dict[str, Source]:
    """Each weight of ours, on disk's names, out of tensors of theirs, none read yet.

    Raises InputError for tensors that match nothing, are missing, or have another shape.
    """
    rows = table(config, ours)
    wanted = {row.theirs: their_shape(row, ours) for row in rows} | empty(config)
    optional = copies(config, ours).keys() | empty(config).keys()
    extra = [name for name in theirs if name not in wanted and not COMPUTED.fullmatch(name)]
    if config.tie_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]
    missing = [name for name in wanted if name not in theirs and name not in optional]
    wrong = [
        f"{name} has shape {theirs[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in theirs and theirs[name].shape != shape
    ]
    faults = [f"{name} matches nothing in this model" for name in extra]
    faults += [f"{name} is missing" for name in missing] + wrong
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise InputError(f"the tensors do not fit the config: {'; '.join(faults[:5])}{more}")
    found: dict[str, Source] = {}
    experts: dict[str, list[Source]] = {}
    for row in rows:
        if row.theirs in optional:
            continue
        offset = 0
        for path in row.ours:
            source = _source(theirs[row.theirs], path, ours[path], row, offset, ours)
            offset += source.shape[-1]
            if row.expert is None:
                found[path] = source
            else:
                experts.setdefault(path, []).append(source)
    return found | {path: stacked(parts) for path, parts in experts.items()}


def _source(tensor: Tensor, path: str, leaf: Leaf, row: Row, offset: int, ours: Any) -> Source:
    sides = _sides(leaf, path)
    if sides is None:
        same = lambda index: tensor.read().reshape(leaf.shape)[index]  # noqa: E731
        return Source(leaf.shape, tensor.dtype, same)
    batch = row.expert is not None  # a dimension of ours that theirs lacks
    outputs, inputs = (tuple(i - batch for i in side) for side in sides)
    shape = leaf.shape[batch:]
    total = sum(ours[p].shape[-1] for p in row.ours)
    split = (*(shape[i] for i in outputs[:-1]), total, *(shape[i] for i in inputs))
    own = (slice(None),) * (len(outputs) - 1) + (slice(offset, offset + shape[outputs[-1]]),)
    order = np.argsort(outputs + inputs)
    return Source(
        shape, tensor.dtype, lambda index: tensor.read().reshape(split)[own].transpose(order)[index]
    )


def stacked(parts: list[Source]) -> Source:
    """Sources of one shape along a new leading dimension; only the parts asked for are read."""

    def read(index: tuple) -> np.ndarray:
        index = index or (slice(None),)
        if isinstance(index[0], int):
            return parts[index[0]].read(tuple(index[1:]))
        return np.stack([part.read(tuple(index[1:])) for part in parts[index[0]]])

    return Source((len(parts), *parts[0].shape), parts[0].dtype, read)
