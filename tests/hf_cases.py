"""Tiny random models of transformers, saved as it saves them: the other side of conversion."""

import pathlib

import numpy as np
import torch
import transformers
from transformers import conversion_mapping
from transformers.models import deepseek_ocr2 as ocr2

VOCAB, LENGTH = 97, 40  # rows are longer than YaRN's original length
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 300.0, "factor": 8.0, "beta_fast": 4.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
DEEP_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
MIXED = {
    "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 6, "num_key_value_heads": 4,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}
V2, V3 = MIXED | LATENT, MIXED | LATENT | GROUPS | {"q_lora_rank": 12}
LIMITED = GROUPS | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}
YARNED = {"rope_parameters": DEEP_YARN}
# Fewer heads would tie at exactly zero, where torch chooses as it likes.
V32 = V3 | {"index_topk": 9, "index_head_dim": 12, "index_n_heads": 16}
CASES = {
    "llama": ("Llama", {"num_key_value_heads": 2, "head_dim": 12}),
    "llama-tied-yarn": (
        "Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "llama-3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}),
    "qwen3-yarn": (
        "Qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "v1": ("Deepseek", MIXED),
    "v2-lite": ("DeepseekV2", V2),
    "v2-lite-yarn": ("DeepseekV2", V2 | YARNED | {"n_shared_experts": 1}),
    "v2-lite-unshared": ("DeepseekV2", V2 | {"n_shared_experts": 0}),
    "v2": ("DeepseekV2", V2 | LIMITED | {"q_lora_rank": 12}),
    "v2-yarn": (
        "DeepseekV2",
        V2 | LIMITED | YARNED | {"q_lora_rank": 12, "first_k_dense_replace": 0},
    ),
    "v3": ("DeepseekV3", V3),
    "v3-yarn": ("DeepseekV3", V3 | YARNED | {"n_shared_experts": 1}),
    "v3-plain-yarn": ("DeepseekV3", V3 | {"rope_parameters": YARN, "q_lora_rank": None}),
    "v3-dense-3": ("DeepseekV3", V3 | {"first_k_dense_replace": 3}),
    "v3-one-group": (
        "DeepseekV3",
        V3 | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 4, "norm_topk_prob": False},
    ),
    "v3-unshared": ("DeepseekV3", V3 | {"n_shared_experts": 0, "num_experts_per_tok": 2}),
    "v32": ("DeepseekV32", V32),
    "v32-yarn": ("DeepseekV32", V32 | YARNED | {"n_shared_experts": 1, "index_n_heads": 32}),
    "v32-dense": (
        "DeepseekV32",
        V32 | {"first_k_dense_replace": 3, "index_topk": 200, "tie_word_embeddings": True},
    ),
    "v3-halves": ("DeepseekV3", V3 | {"rope_interleave": False, "tie_word_embeddings": True}),
}  # fmt: skip


class DeepseekConfig(ocr2.DeepseekOcr2TextConfig):
    """Of the first DeepSeekMoE, which transformers has only as a part of DeepSeek-OCR-2."""

    model_type = "deepseek"
    first_k_dense_replace: int = 0

    def __post_init__(self, **others):
        dense = self.first_k_dense_replace
        kinds = ["dense"] * dense + ["sparse"] * (self.num_hidden_layers - dense)
        self.mlp_layer_types = kinds
        super().__post_init__(**others)


class DeepseekForCausalLM(transformers.DeepseekV2ForCausalLM):
    """That part, with V2's head and V2's names on disk."""

    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig):
        transformers.PreTrainedModel.__init__(self, config)
        self.model = ocr2.DeepseekOcr2TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


transformers.AutoConfig.register("deepseek", DeepseekConfig)
transformers.AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
conversion_mapping.register_checkpoint_conversion_mapping(
    "deepseek", conversion_mapping.get_checkpoint_conversion_mapping("deepseek_v2")
)


def hf_model(name: str, seed: int = 0, **changed) -> transformers.PreTrainedModel:
    """A model of CASES in float32 with eager attention and experts; biases of routers not zero."""
    family, fields = CASES[name]
    torch.manual_seed(seed)
    names = f"{family}Config", f"{family}ForCausalLM"
    of_config, of_model = (globals().get(name) or getattr(transformers, name) for name in names)
    config = of_config(**BASE | fields | changed)
    config._attn_implementation = "eager"
    model = of_model(config).eval()
    if family.startswith("Deepseek"):
        model.set_experts_implementation("eager")
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def save(model: transformers.PreTrainedModel, directory: pathlib.Path, **options) -> pathlib.Path:
    """Save it as transformers does."""
    model.save_pretrained(directory, **options)
    return directory


def tokens(seed: int = 0) -> np.ndarray:
    """Two rows [2, LENGTH]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (2, LENGTH))


def logits(model: transformers.PreTrainedModel, rows: np.ndarray) -> np.ndarray:
    """The reference's answer."""
    with torch.no_grad():
        return model(torch.tensor(rows)).logits.float().numpy()
