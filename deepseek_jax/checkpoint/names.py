"""What Hugging Face calls our configs and weights: one table a family, used in both directions.

A torch matrix is [outputs, inputs] and ours [inputs..., outputs...]; `Spec` says which dimensions
are which. Two of ours may lie in one of theirs (MLA's key and value projections, a head's key rows
before its value rows), and our stacked experts are one tensor each there. Sources: the configs and
models of transformers 5.23 and the published checkpoints' indexes.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checkpoint.manager import disk_names
from deepseek_jax.checkpoint.safetensors import Tensor
from deepseek_jax.core import tree
from deepseek_jax.core.axes import Spec
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.models.build import Model
from deepseek_jax.models.decoder import Decoder, layer_table
from deepseek_jax.ops.rope import Yarn
from deepseek_jax.ops.routing import Sigmoid, Softmax

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
    "attention/q_norm/scale": "self_attn.q_a_layernorm.weight",
    "attention/q_up/weight": "self_attn.q_b_proj.weight",
    "attention/kv_down/weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attention/k_up/weight": "self_attn.kv_b_proj.weight",
    "attention/v_up/weight": "self_attn.kv_b_proj.weight",
    **{f"mlp/{n}/weight": f"mlp.{n}_proj.weight" for n in PARTS},
    **{f"moe/shared/{n}/weight": f"mlp.shared_experts.{n}_proj.weight" for n in PARTS},
    **{f"moe/experts/{n}": f"mlp.experts.{{}}.{n}_proj.weight" for n in PARTS},
    "moe/router/weight": "mlp.gate.weight",
    "moe/router/bias": "mlp.gate.e_score_correction_bias",
}  # fmt: skip
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


class Source(NamedTuple):
    """Where a weight of ours comes from: `read(index)` gives the part that an index tuple names."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple], np.ndarray]


def leaves(model: Model) -> dict[str, Leaf]:
    """A model's weights by their names on disk."""
    layers = layer_table(model.config)
    specs = tree.flatten(model.specs, is_leaf=lambda node: isinstance(node, Spec))
    found = {}
    for path, leaf in tree.flatten(model.shapes).items():
        rows = disk_names(path, leaf.shape, layers)
        shape, spec = (
            (leaf.shape[1:], specs[path].unstacked()) if rows else (leaf.shape, specs[path])
        )
        found |= dict.fromkeys(rows or [path], Leaf(tuple(shape), spec))
    return found


def table(config: Decoder, ours: Mapping[str, Leaf]) -> list[Row]:
    """Their names of all of a model's weights, in their order, the copies of an MTP layer last."""
    rows: dict[str, Row] = {}
    for path, leaf in ours.items():
        kind, _, rest = path.partition("/")
        prefix = ""
        if match := re.fullmatch(r"(layer|mtp)_(\d+)", kind):
            number = int(match[2]) + (config.num_layers if match[1] == "mtp" else 0)
            prefix, name = f"model.layers.{number}.", (LAYER if match[1] == "layer" else MTP)[rest]
        else:
            name = TOP[path]
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


def is_quantized(theirs: str) -> bool:
    """Whether DeepSeek stores this matrix as float8 (transformers' names)."""
    inside = theirs.startswith("model.layers.") and theirs.endswith("_proj.weight")
    return (inside or theirs.endswith("kv_a_proj_with_mqa.weight")) and "eh_proj" not in theirs


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
    """Their tensor, from the weights of ours that lie in it."""
    first = ours[row.ours[0]]
    sides = _sides(first, row.ours[0])
    if sides is None:
        return arrays[0].reshape(their_shape(row, ours))
    if row.expert is not None:
        return arrays[0][row.expert].T
    turned = [array.transpose(*sides[0], *sides[1]) for array in arrays]
    return np.concatenate(turned, axis=len(sides[0]) - 1).reshape(their_shape(row, ours))


def sources(
    config: Decoder, ours: Mapping[str, Leaf], theirs: Mapping[str, Tensor]
) -> dict[str, Source]:
    """Each weight of ours, on disk's names, out of tensors of theirs, none read yet.

    Raises InputError for tensors that match nothing, are missing, or have another shape.
    """
    rows = table(config, ours)
    wanted = {row.theirs: their_shape(row, ours) for row in rows}
    optional = copies(config, ours).keys()
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
        return Source(
            leaf.shape, tensor.dtype, lambda index: tensor.read().reshape(leaf.shape)[index]
        )
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
        return np.stack([part.read(tuple(index[1:])) for part in parts[index[0]]])

    return Source((len(parts), *parts[0].shape), parts[0].dtype, read)


# Configs: our field -> their field. A field that a config.json lacks takes the default below.
DECODER = {
    "vocab_size": "vocab_size", "embed_dim": "hidden_size", "num_layers": "num_hidden_layers",
    "mlp_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
GROUPED = {
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}  # fmt: skip
LATENT = {
    "num_heads": "num_attention_heads", "kv_rank": "kv_lora_rank", "q_rank": "q_lora_rank",
    "nope_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim", "value_dim": "v_head_dim",
    "interleaved": "rope_interleave",
}  # fmt: skip
MIXTURE = {
    "num_experts": "n_routed_experts", "expert_dim": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
}  # fmt: skip
ROUTER = {
    "num_active_experts": "num_experts_per_tok", "scale": "routed_scaling_factor",
    "normalize": "norm_topk_prob", "num_groups": "n_group", "num_active_groups": "topk_group",
}  # fmt: skip
YARN = {
    "factor": "factor", "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow",
    "mscale": "mscale", "mscale_all_dim": "mscale_all_dim",
}  # fmt: skip
DEFAULTS = {
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "q_lora_rank": None,
    "rope_interleave": True, "n_shared_experts": 0, "routed_scaling_factor": 1.0,
    "norm_topk_prob": False, "n_group": None, "topk_group": None, "first_k_dense_replace": 0,
    "n_routed_experts": None, "beta_fast": 32.0, "beta_slow": 1.0, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "use_sliding_window": False,
    "topk_method": "greedy",
}  # fmt: skip
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
}  # fmt: skip
# What changes the result and has no counterpart here: the only value that is understood.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1,
    "use_sliding_window": False,
}  # fmt: skip


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """Our config of a Hugging Face config.json, old or new.

    Raises InputError for a family or a setting that this package has no equal of.
    """
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise InputError(f"model_type {family!r} is not one of {', '.join(ARCHITECTURES)}")

    def value(name: str) -> Any:
        if name not in hf and name not in DEFAULTS:
            raise InputError(f"config.json of a {family} model lacks {name}")
        return hf.get(name, DEFAULTS.get(name))

    for name, understood in FIXED.items():
        if value(name) != understood:
            raise InputError(
                f"config.json: {name} is {value(name)!r}; only {understood!r} is known"
            )
    rope = {"rope_theta": 10000.0} | dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(hf.get("rope_theta", rope["rope_theta"]))
    yarn = _yarn(rope)
    if family in ("llama", "qwen2", "deepseek"):
        heads = value("num_attention_heads")
        sizes = {"num_heads": heads, "num_kv_heads": hf.get("num_key_value_heads") or heads}
        sizes["head_dim"] = hf.get("head_dim") or value("hidden_size") // heads
        attention = GQA(**sizes, bias=family == "qwen2", rope_theta=theta, yarn=yarn)
    else:
        sizes = {ours: value(theirs) for ours, theirs in LATENT.items()}
        attention = MLA(**sizes, rope_theta=theta, yarn=yarn)
    fields = {ours: value(theirs) for ours, theirs in DECODER.items()}
    dense = fields["num_layers"]
    if family.startswith("deepseek") and value("n_routed_experts"):
        dense = min(value("first_k_dense_replace") or 0, dense)
    if dense < fields["num_layers"]:
        fields |= {"moe": _mixture(family, value), "num_dense_layers": dense}
    if family == "deepseek_v3":
        mtp = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 0))
        fields["num_mtp_layers"] = mtp or 0
    fields["norm_eps"] = float(fields["norm_eps"])
    try:
        return Decoder(**fields, attention=attention)
    except (TypeError, ValueError) as error:
        raise InputError(f"config.json: {error}") from None


def _yarn(rope: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"config.json: rope type {kind!r} is not one of 'default', 'yarn'")
    if rope.get("attention_factor") is not None or rope.get("truncate") is False:
        raise InputError("config.json: rope's attention_factor and truncate have no equal here")
    fields = {ours: rope[theirs] for ours, theirs in YARN.items() if rope.get(theirs) is not None}
    # Without both, transformers scales cosine and sine by the whole factor, the softmax by none.
    if not (fields.get("mscale") and fields.get("mscale_all_dim")):
        if fields.get("mscale_all_dim"):
            raise InputError("config.json: rope has mscale_all_dim but no mscale")
        fields |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    return from_dict(Yarn, fields, "config.json: rope")


def _mixture(family: str, value: Callable[[str], Any]) -> MoE:
    method, known = value("topk_method"), ("greedy", "group_limited_greedy")
    if family == "deepseek_v3":
        known = ("greedy", "noaux_tc")
    if method not in known:
        raise InputError(f"config.json: topk_method {method!r} of {family} is not one of {known}")
    chosen = {ours: value(theirs) for ours, theirs in ROUTER.items()}
    grouped = {"num_groups": chosen["num_groups"] or 1}
    grouped["num_active_groups"] = (chosen["num_active_groups"] or 1) if chosen["num_groups"] else 1
    if family == "deepseek_v3":
        router = from_dict(Sigmoid, chosen | grouped, "config.json: router")
    else:
        if method == "greedy":
            grouped = {"num_groups": 1, "num_active_groups": 1}
        # transformers' V2 never normalizes, whatever norm_topk_prob says.
        router = from_dict(Softmax, chosen | grouped | {"normalize": False}, "config.json: router")
    sizes = {ours: value(theirs) or 0 for ours, theirs in MIXTURE.items()}
    return MoE(**sizes, router=router)


def family_of(config: Decoder) -> str:
    """The model_type that can express a config; InputError when none can."""
    a, router = config.attention, config.moe and config.moe.router
    if isinstance(a, GQA):
        dense = "qwen2" if a.bias else "llama"
        mixed = "deepseek" if isinstance(router, Softmax) and router.num_groups == 1 else None
        found = None if a.window or (a.bias and router) else mixed if router else dense
    elif isinstance(router, Softmax):
        found = "deepseek_v2" if a.interleaved and not router.normalize else None
    else:
        found = "deepseek_v3" if router is None or isinstance(router, Sigmoid) else None
    if found is None or (config.num_mtp_layers and found != "deepseek_v3"):
        raise InputError(f"no family of {', '.join(ARCHITECTURES)} has this combination: {config}")
    return found


def hf_config(config: Decoder, original: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json for transformers, old and new; `original`'s other fields are kept.

    Raises InputError when no family can express the config.
    """
    family, a, moe = family_of(config), config.attention, config.moe
    found = {theirs: getattr(config, ours) for ours, theirs in DECODER.items()}
    found |= {
        theirs: getattr(a, ours)
        for ours, theirs in (GROUPED if isinstance(a, GQA) else LATENT).items()
    }
    found |= {"hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 4096}
    if isinstance(a, MLA):
        found |= {"num_key_value_heads": a.num_heads, "head_dim": a.rope_dim}
    if family.startswith("deepseek"):
        found["first_k_dense_replace"] = (
            config.num_layers if moe is None else config.num_dense_layers
        )
    if moe is not None:
        found |= {theirs: getattr(moe, ours) for ours, theirs in MIXTURE.items()}
        found |= {theirs: getattr(moe.router, ours) for ours, theirs in ROUTER.items()}
        found["moe_layer_freq"] = 1
        sigmoid, grouped = isinstance(moe.router, Sigmoid), moe.router.num_groups > 1
        found["scoring_func"] = "sigmoid" if sigmoid else "softmax"
        limited = "group_limited_greedy" if grouped else "greedy"
        found["topk_method"] = "noaux_tc" if sigmoid else limited
    if family == "deepseek_v3":
        found["num_nextn_predict_layers"] = config.num_mtp_layers
    rope: dict[str, Any] = {"rope_type": "default"}
    if a.yarn is not None:
        rope = {"rope_type": "yarn"} | {
            theirs: getattr(a.yarn, ours) for ours, theirs in YARN.items()
        }
        if not a.yarn.mscale_all_dim:
            del rope["mscale"], rope["mscale_all_dim"]
    found["rope_theta"] = a.rope_theta
    found["rope_scaling"] = None if a.yarn is None else rope | {"type": "yarn"}
    found["rope_parameters"] = rope | {"rope_theta": a.rope_theta}
    found |= {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    found |= {"torch_dtype": dtype, "dtype": dtype}
    kept = {k: v for k, v in original.items() if k != "auto_map"}
    longest = kept.get("max_position_embeddings", found["max_position_embeddings"])
    return kept | found | {"max_position_embeddings": longest}
