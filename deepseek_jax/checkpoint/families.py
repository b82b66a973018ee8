"""Hugging Face's config.json and our Decoder: one table of fields, used in both directions.

Sources: the configs of transformers 5.23 and of the published checkpoints. What changes a model's
result and has no equal here is refused by its name.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.sparse_attention import GatedGQA, Indexer
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Llama3, Yarn
from deepseek_jax.ops.routing import Sigmoid, Softmax

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
INDEXER = {
    "num_heads": "index_n_heads", "head_dim": "index_head_dim", "top_k": "index_topk",
}  # fmt: skip
MIXTURE = {
    "num_experts": "n_routed_experts", "expert_dim": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
}  # fmt: skip
ROUTER = {
    "num_active_experts": "num_experts_per_tok", "scale": "routed_scaling_factor",
    "normalize": "norm_topk_prob", "num_groups": "n_group", "num_active_groups": "topk_group",
}  # fmt: skip
LLAMA3 = {
    "factor": "factor", "original_length": "original_max_position_embeddings",
    "low_frequency": "low_freq_factor", "high_frequency": "high_freq_factor",
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
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
}  # fmt: skip
SIGMOID = ("deepseek_v3", "deepseek_v32")  # with V3's router, and MTP layers
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
    if any(part.get("partial_rotary_factor", 1) != 1 for part in (hf, rope)):
        raise InputError("config.json: partial_rotary_factor has no equal here; only 1 is known")
    yarn = _stretched(rope)
    if family in ("llama", "qwen2", "qwen3", "deepseek"):
        if isinstance(yarn, Yarn) and yarn.mscale_all_dim:
            raise InputError(f"config.json: mscale_all_dim has no meaning in a {family} model")
        heads = value("num_attention_heads")
        sizes = {"num_heads": heads, "num_kv_heads": hf.get("num_key_value_heads") or heads}
        sizes["head_dim"] = hf.get("head_dim") or value("hidden_size") // heads
        own = {"bias": family == "qwen2"}
        own["norm_eps"] = float(value("rms_norm_eps")) if family == "qwen3" else None
        attention = GQA(**sizes, **own, rope_theta=theta, yarn=yarn)
    else:
        sizes = {ours: value(theirs) for ours, theirs in LATENT.items()}
        if family == "deepseek_v32":
            index = {ours: value(theirs) for ours, theirs in INDEXER.items()}
            sizes["indexer"] = from_dict(Indexer, index, "config.json: index")
        attention = MLA(**sizes, rope_theta=theta, yarn=yarn)
    fields = {ours: value(theirs) for ours, theirs in DECODER.items()}
    dense = fields["num_layers"]
    if family.startswith("deepseek") and value("n_routed_experts"):
        dense = min(value("first_k_dense_replace") or 0, dense)
        kinds = ["dense"] * dense + ["sparse"] * (fields["num_layers"] - dense)
        if hf.get("mlp_layer_types", kinds) != kinds:
            raise InputError("config.json: mlp_layer_types are not first_k_dense_replace's")
    if dense < fields["num_layers"]:
        fields |= {"moe": _mixture(family, value), "num_dense_layers": dense}
    if family in SIGMOID:
        mtp = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 0))
        fields["num_mtp_layers"] = mtp or 0
    fields["norm_eps"] = float(fields["norm_eps"])
    try:
        return Decoder(**fields, attention=attention)
    except (TypeError, ValueError) as error:
        raise InputError(f"config.json: {error}") from None


def _stretched(rope: Mapping[str, Any]) -> Yarn | Llama3 | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "llama3":
        fields = {ours: rope.get(theirs) for ours, theirs in LLAMA3.items()}
        return from_dict(Llama3, fields, "config.json: rope")
    if kind != "yarn":
        raise InputError(f"config.json: rope type {kind!r} is none of default, yarn, llama3")
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
    if family in SIGMOID:
        known = ("greedy", "noaux_tc")
    if method not in known:
        raise InputError(f"config.json: topk_method {method!r} of {family} is not one of {known}")
    chosen = {ours: value(theirs) for ours, theirs in ROUTER.items()}
    grouped = {"num_groups": chosen["num_groups"] or 1}
    grouped["num_active_groups"] = (chosen["num_active_groups"] or 1) if chosen["num_groups"] else 1
    if family in SIGMOID:
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
    if isinstance(a, GatedGQA):
        found = None
    elif isinstance(a, GQA):
        dense = "qwen2" if a.bias else "llama"
        dense = dense if a.norm_eps is None else "qwen3"
        mixed = "deepseek" if isinstance(router, Softmax) and router.num_groups == 1 else None
        plain = not a.window and not (a.bias and (router or a.norm_eps))
        plain = plain and a.norm_eps in (None, config.norm_eps) and not (router and a.norm_eps)
        found = (mixed if router else dense) if plain else None
    elif isinstance(router, Softmax):
        plain = a.interleaved and not router.normalize and not a.indexer
        found = "deepseek_v2" if plain else None
    else:
        found = "deepseek_v3" if router is None or isinstance(router, Sigmoid) else None
        if found and a.indexer:
            found = "deepseek_v32" if a.interleaved else None
    if found is None or (config.num_mtp_layers and found not in SIGMOID):
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
        if a.indexer:
            found |= {theirs: getattr(a.indexer, ours) for ours, theirs in INDEXER.items()}
            kinds = {int: "dense", MoE: "sparse"}
            runs = ([kinds[type(part)]] * repeats for part, repeats in config.segments)
            found["mlp_layer_types"] = list(itertools.chain(*runs))
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
    if family in SIGMOID:
        found["num_nextn_predict_layers"] = config.num_mtp_layers
    rope: dict[str, Any] = {"rope_type": "default"}
    if a.yarn is not None:
        kind, fields = ("yarn", YARN) if isinstance(a.yarn, Yarn) else ("llama3", LLAMA3)
        rope = {theirs: getattr(a.yarn, ours) for ours, theirs in fields.items()}
        if kind == "yarn" and not a.yarn.mscale_all_dim:
            del rope["mscale"], rope["mscale_all_dim"]
        rope["rope_type"] = kind
    found["rope_theta"] = a.rope_theta
    found["rope_scaling"] = None if a.yarn is None else rope | {"type": rope["rope_type"]}
    found["rope_parameters"] = rope | {"rope_theta": a.rope_theta}
    found |= {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    found |= {"torch_dtype": dtype, "dtype": dtype}
    kept = {k: v for k, v in original.items() if k != "auto_map"}
    longest = kept.get("max_position_embeddings", found["max_position_embeddings"])
    return kept | found | {"max_position_embeddings": longest}
