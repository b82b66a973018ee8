"""Reference: an outside implementation. Tiny random models of transformers, weights copied over.

Logits must agree at every position, past YaRN's original length too. The NumPy model is held
against the same logits, so that it earns its role in the other tests.
"""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
import transformers
from transformers.modeling_layers import MtpModel

from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Sigmoid, Softmax
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Yarn

V2_YARN = Yarn(factor=8.0, original_length=16, mscale=0.707, mscale_all_dim=0.707)
V3_YARN = Yarn(factor=40.0, original_length=16, beta_fast=4.0)
ODD_YARN = Yarn(factor=4.0, original_length=8, mscale=0.5, mscale_all_dim=0.8)
HEADS = {"num_heads": 4, "kv_rank": 16, "nope_dim": 8, "rope_dim": 8, "value_dim": 6}
LENGTH = 40


def v2(yarn, q_rank, **router):
    moe = MoE(
        num_experts=8, expert_dim=16, num_shared_experts=2,
        router=Softmax(num_active_experts=3, **router),
    )  # fmt: skip
    return Decoder(
        **SHAPE, moe=moe, num_dense_layers=1, attention=MLA(**HEADS, q_rank=q_rank, yarn=yarn)
    )


def v3(
    yarn=None, q_rank=12, interleaved=True, num_dense_layers=1, num_mtp_layers=0, normalize=True
):
    moe = MoE(
        num_experts=8, expert_dim=16, num_shared_experts=1,
        router=Sigmoid(
            num_active_experts=3, num_groups=4, num_active_groups=2, scale=2.5, normalize=normalize
        ),
    )  # fmt: skip
    attention = MLA(**HEADS, q_rank=q_rank, yarn=yarn, interleaved=interleaved, rope_theta=200.0)
    return Decoder(
        **SHAPE, moe=moe, attention=attention, num_dense_layers=num_dense_layers,
        num_mtp_layers=num_mtp_layers,
    )  # fmt: skip


def dense(tie_embeddings=False, **attention):
    return Decoder(
        **SHAPE, attention=GQA(num_heads=4, head_dim=8, **attention), tie_embeddings=tie_embeddings
    )


SHAPE = {"vocab_size": 71, "embed_dim": 32, "num_layers": 3, "mlp_dim": 48, "norm_eps": 1e-5}
MODELS = {
    "v2-greedy": ("DeepseekV2", v2(None, None, scale=1.5)),
    "v2-grouped-yarn": (
        "DeepseekV2", v2(V2_YARN, 12, num_groups=4, num_active_groups=2, scale=16.0),
    ),
    "v3": ("DeepseekV3", v3()),
    "v3-yarn": ("DeepseekV3", v3(V3_YARN)),
    "v3-odd-yarn-halves": ("DeepseekV3", v3(ODD_YARN, None, interleaved=False, normalize=False)),
    "llama": ("Llama", dense(num_kv_heads=2, tie_embeddings=True, rope_theta=500.0)),
    "llama-yarn": ("Llama", dense(num_kv_heads=2, yarn=Yarn(factor=4.0, original_length=16))),
    "qwen2": ("Qwen2", dense(num_kv_heads=1, bias=True)),
    "mistral": ("Mistral", dense(num_kv_heads=4, window=7)),
}  # fmt: skip


def hf_config(family, config):
    """The same shape in transformers' words."""
    a = config.attention
    rope = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.yarn is not None:
        rope |= dataclasses.asdict(a.yarn) | {"rope_type": "yarn"}
        rope["original_max_position_embeddings"] = rope.pop("original_length")
        if family == "Llama":  # there cosine and sine carry what DeepSeek's softmax scale does
            del rope["mscale"], rope["mscale_all_dim"]
    words = {
        "vocab_size": config.vocab_size, "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": a.num_heads,
        "intermediate_size": config.mlp_dim, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "rope_parameters": rope,
        "max_position_embeddings": 128, "attn_implementation": "eager",
    }  # fmt: skip
    if isinstance(a, GQA):
        words |= {"num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim}
        words["sliding_window"] = a.window
    else:
        words |= {
            "kv_lora_rank": a.kv_rank, "q_lora_rank": a.q_rank, "qk_nope_head_dim": a.nope_dim,
            "qk_rope_head_dim": a.rope_dim, "v_head_dim": a.value_dim, "head_dim": a.rope_dim,
            "num_key_value_heads": a.num_heads, "rope_interleave": a.interleaved,
        }  # fmt: skip
    if config.moe is not None:
        r = config.moe.router
        words |= {
            "moe_intermediate_size": config.moe.expert_dim,
            "n_routed_experts": config.moe.num_experts,
            "n_shared_experts": config.moe.num_shared_experts,
            "num_experts_per_tok": r.num_active_experts, "n_group": r.num_groups,
            "topk_group": r.num_active_groups, "routed_scaling_factor": r.scale,
            "norm_topk_prob": r.normalize, "first_k_dense_replace": config.num_dense_layers,
            "topk_method": "group_limited_greedy" if r.num_groups > 1 else "greedy",
            "num_mtp_layers": config.num_mtp_layers,
        }  # fmt: skip
    if family == "Qwen2":
        del words["sliding_window"]
    return getattr(transformers, f"{family}Config")(**words)


def linear(w, inputs=1):
    """[in..., out...] as torch's [out, in]; `inputs` says how many dimensions are summed."""
    w = np.asarray(w)
    return w.reshape(int(np.prod(w.shape[:inputs])), -1).T


def attention_weights(p, config):
    if isinstance(config, GQA):
        names = {f"{n}_proj.weight": linear(p[n]["weight"]) for n in "qkv"}
        if config.bias:
            names |= {f"{n}_proj.bias": p[n]["bias"].reshape(-1) for n in "qkv"}
    else:
        up = np.concatenate([p["k_up"]["weight"], p["v_up"]["weight"]], axis=-1)  # per head: k, v
        names = {
            "kv_a_proj_with_mqa.weight": linear(p["kv_down"]["weight"]),
            "kv_a_layernorm.weight": p["kv_norm"]["scale"],
            "kv_b_proj.weight": linear(up),
        }
        if config.q_rank is None:
            names["q_proj.weight"] = linear(p["q"]["weight"])
        else:
            names["q_a_proj.weight"] = linear(p["q_down"]["weight"])
            names["q_a_layernorm.weight"] = p["q_norm"]["scale"]
            names["q_b_proj.weight"] = linear(p["q_up"]["weight"])
    return names | {"o_proj.weight": linear(p["o"]["weight"], inputs=2)}


def mlp_weights(p):
    return {f"{n}_proj.weight": linear(p[n]["weight"]) for n in ("gate", "up", "down")}


def under(prefix, names):
    return {f"{prefix}.{name}": value for name, value in names.items()}


def block_weights(p, config):
    names = {
        "input_layernorm.weight": p["attention_norm"]["scale"],
        "post_attention_layernorm.weight": p["mlp_norm"]["scale"],
    } | under("self_attn", attention_weights(p["attention"], config.attention))
    if "mlp" in p:
        return names | under("mlp", mlp_weights(p["mlp"]))
    moe = p["moe"]
    gate_up = np.concatenate([moe["experts"]["gate"], moe["experts"]["up"]], axis=-1)
    names |= {
        "mlp.experts.gate_up_proj": gate_up.swapaxes(1, 2),
        "mlp.experts.down_proj": np.swapaxes(moe["experts"]["down"], 1, 2),
        "mlp.gate.weight": linear(moe["router"]["weight"]),
    } | under("mlp.shared_experts", mlp_weights(moe["shared"]))
    if "bias" in moe["router"]:
        names["mlp.gate.e_score_correction_bias"] = moe["router"]["bias"]
    return names


def load(module, names):
    """Every weight of a torch module from these, none left over."""
    tensors = {name: torch.tensor(np.array(value)) for name, value in names.items()}
    module.load_state_dict(tensors, strict=True)


def hf_model(family, config, params):
    model = getattr(transformers, f"{family}ForCausalLM")(hf_config(family, config)).eval()
    if config.moe is not None:
        model.set_experts_implementation("eager")
    names = {
        "model.embed_tokens.weight": params["embedding"]["weight"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    blocks = [
        p for index in range(len(config.segments))
        for p in reference.layers(params[f"segment_{index}"]["block"])
    ]  # fmt: skip
    for index, p in enumerate(blocks):
        names |= under(f"model.layers.{index}", block_weights(p, config))
    table = params["embedding"]["weight"]
    names["lm_head.weight"] = table if config.tie_embeddings else linear(params["head"]["weight"])
    load(model, names)
    return model


def settled(config):
    """Parameters and tokens whose routing has no near ties, and the reference's answer."""
    model = build(config, Precision(compute="float32"))
    for seed in range(100):
        params = cases.random_params(model.shapes, seed)
        tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, LENGTH))
        following = np.stack([np.roll(tokens, -1 - d, 1) for d in (0, 1)], -1)
        expected = reference.forward(params, config, tokens, next_tokens=following)
        if expected.margin > 3e-5:
            return model, params, tokens, following, expected
    raise AssertionError("every seed has a near tie")


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    family, config = MODELS[name]
    model, params, tokens, _, expected = settled(config)
    with torch.no_grad():
        theirs = hf_model(family, config, params)(torch.tensor(tokens)).logits.numpy()
    assert np.abs(theirs).max() > 3
    np.testing.assert_allclose(expected.logits, theirs, atol=2e-5, rtol=0)  # NumPy
    compiled = jax.jit(
        lambda params, tokens: model.logits(params, model.apply(params, tokens).hidden)
    )
    ours = compiled(jax.tree.map(jnp.asarray, params), jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.shows("logits", family="V3")
def test_mtp_logits_are_those_of_transformers():
    """Two depths, each fed the previous one's hidden state after its final norm."""
    config = v3(V3_YARN, num_dense_layers=0, num_mtp_layers=2)
    model, params, tokens, following, expected = settled(config)
    main = hf_model("DeepseekV3", config, params)
    mtp = MtpModel(main, 2).eval()
    mtp.set_experts_implementation("eager")
    shared = {"embed_tokens.weight": params["embedding"]["weight"]}
    names = shared | {"shared_head.weight": linear(params["head"]["weight"])}
    for depth in range(2):
        p = params[f"mtp_{depth}"]
        names |= under(
            f"layers.{depth}.mtp_block", block_weights(reference.layers(p["block"])[0], config)
        )
        names |= {
            f"layers.{depth}.enorm.weight": p["embedding_norm"]["scale"],
            f"layers.{depth}.hnorm.weight": p["hidden_norm"]["scale"],
            f"layers.{depth}.eh_proj.weight": linear(p["projection"]["weight"]),
            f"layers.{depth}.post_norm.weight": p["final_norm"]["scale"],
        }
    load(mtp, names)
    compiled = jax.jit(lambda *args: model.apply(*args[:2], next_tokens=args[2]).mtp)
    ours = compiled(jax.tree.map(jnp.asarray, params), jnp.asarray(tokens), jnp.asarray(following))
    ids = torch.tensor(tokens)
    with torch.no_grad():
        hidden = main.model(ids).last_hidden_state
        for depth in range(2):
            known = LENGTH - 1 - depth  # later tokens do not exist
            x, hidden = mtp.embed_tokens(ids[:, 1 + depth :]), hidden[:, :known]
            positions = torch.arange(known)[None] + 1 + depth
            hidden = mtp.layers[depth](
                inputs_embeds=x, previous_hidden_state=hidden, position_ids=positions,
                position_embeddings=mtp.rotary_emb(x, positions), past_key_values=None,
                attention_mask=torch.full((known, known), -torch.inf).triu(1)[None, None],
            )  # fmt: skip
            theirs = mtp.shared_head(hidden).numpy()
            np.testing.assert_allclose(
                expected.mtp_logits[depth][:, :known], theirs, atol=1e-5, rtol=0
            )
            logits = np.asarray(ours[depth]) @ params["head"]["weight"]
            np.testing.assert_allclose(logits[:, :known], theirs, atol=2e-5, rtol=0)
