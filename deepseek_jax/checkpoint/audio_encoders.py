"""Encoders of sound of Hugging Face: Whisper's and wav2vec 2.0 (models/whisper, models/wav2vec2).

What only training there reads (dropout, layer drop, how often masks fall) has no equal here; a
config.json that is written back keeps it.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.checkpoint.tables import (
    THEIR_ACTIVATIONS,
    Family,
    Named,
    activation,
    only,
    transformer,
    transformer_fields,
)
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.audio import CTC, Codebook, Wav2Vec2, Whisper

WHISPER = {  # transformers' defaults, which a config.json leaves out
    "num_mel_bins": 80, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
    "d_model": 384, "activation_function": "gelu", "max_source_positions": 1500,
}  # fmt: skip
WHISPER_LAYER = {
    "attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm",
    **{f"attention/{n}": f"self_attn.{n}_proj" for n in "qkv"},
    "attention/o": "self_attn.out_proj", "mlp/up": "fc1", "mlp/down": "fc2",
}  # fmt: skip


def whisper(hf: Mapping[str, Any]) -> Whisper:
    """The encoder of a Whisper."""
    hf = WHISPER | hf
    blocks = Transformer(
        num_layers=hf["encoder_layers"],
        embed_dim=hf["d_model"],
        num_heads=hf["encoder_attention_heads"],
        mlp_dim=hf["encoder_ffn_dim"],
        activation=activation(hf, "activation_function"),
        norm_eps=1e-5,  # torch's own
        biases="qvo",
    )
    counts = {"num_mels": hf["num_mel_bins"], "num_positions": hf["max_source_positions"]}
    return Whisper(transformer=blocks, **counts)


def whisper_fields(config: Whisper) -> dict[str, Any]:
    """What Whisper calls the fields of its encoder."""
    t = config.transformer
    return {
        "architectures": ["WhisperEncoder"],
        "num_mel_bins": config.num_mels,
        "encoder_layers": t.num_layers,
        "encoder_attention_heads": t.num_heads,
        "encoder_ffn_dim": t.mlp_dim,
        "d_model": t.embed_dim,
        "activation_function": THEIR_ACTIVATIONS[t.activation],
        "max_source_positions": config.num_positions,
    }


def whisper_modules(config: Whisper) -> dict[str, str]:
    """The modules of Whisper's encoder, as transformers' WhisperEncoder names them."""
    del config
    layers = {f"layer/{o}": f"layers.{{}}.{t}" for o, t in WHISPER_LAYER.items()}
    return layers | {
        "convolution_0/conv": "conv1",
        "convolution_1/conv": "conv2",
        "final_norm": "layer_norm",
    }


WAV2VEC2 = {  # transformers' defaults, which a config.json leaves out
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "conv_dim": (512,) * 7, "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2), "conv_bias": False, "feat_extract_norm": "group",
    "feat_extract_activation": "gelu", "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16, "do_stable_layer_norm": False, "mask_time_prob": 0.05,
    "mask_feature_prob": 0.0, "vocab_size": 32, "pad_token_id": 0, "num_codevector_groups": 2,
    "num_codevectors_per_group": 320, "codevector_dim": 256, "proj_codevector_dim": 256,
    "add_adapter": False, "adapter_attn_dim": None,
}  # fmt: skip
WAV2VEC2_LAYER = {
    "attention_norm": "layer_norm", "mlp_norm": "final_layer_norm",
    **{f"attention/{n}": f"attention.{n}_proj" for n in "qkv"},
    "attention/o": "attention.out_proj",
    "mlp/up": "feed_forward.intermediate_dense", "mlp/down": "feed_forward.output_dense",
}  # fmt: skip
HEADS = {
    "ctc": "lm_head", "choice": "quantizer.weight_proj", "hidden_out": "project_hid",
    "codes_out": "project_q",
}  # fmt: skip


def wav2vec2(hf: Mapping[str, Any]) -> Wav2Vec2:
    """wav2vec 2.0, with the head of a Wav2Vec2ForCTC or Wav2Vec2ForPreTraining."""
    hf = WAV2VEC2 | hf
    only(hf, "wav2vec 2.0", add_adapter=False, adapter_attn_dim=None)
    if hf["feat_extract_norm"] not in ("group", "layer"):
        only(hf, "wav2vec 2.0", feat_extract_norm="group")
    blocks = transformer(hf, post_norm=not hf["do_stable_layer_norm"])
    named, head = (hf.get("architectures") or [""])[0], None
    if named == "Wav2Vec2ForCTC":
        head = CTC(vocab_size=hf["vocab_size"], blank_id=hf["pad_token_id"])
    elif named == "Wav2Vec2ForPreTraining":
        head = Codebook(
            num_groups=hf["num_codevector_groups"],
            num_codes=hf["num_codevectors_per_group"],
            code_dim=hf["codevector_dim"],
            shared_dim=hf["proj_codevector_dim"],
        )
    shapes = zip(hf["conv_dim"], hf["conv_kernel"], hf["conv_stride"], strict=True)
    return Wav2Vec2(
        transformer=blocks,
        convolutions=tuple(shapes),
        conv_norm=hf["feat_extract_norm"],
        conv_bias=hf["conv_bias"],
        conv_activation=activation(hf, "feat_extract_activation"),
        position_size=hf["num_conv_pos_embeddings"],
        position_groups=hf["num_conv_pos_embedding_groups"],
        mask_vector=hf["mask_time_prob"] > 0 or hf["mask_feature_prob"] > 0,
        head=head,
    )


def wav2vec2_fields(config: Wav2Vec2) -> dict[str, Any]:
    """What wav2vec 2.0 calls its fields."""
    sizes = zip(*config.convolutions, strict=True)
    head, named, own = config.head, "Wav2Vec2Model", {}
    if isinstance(head, CTC):
        named = "Wav2Vec2ForCTC"
        own = {"vocab_size": head.vocab_size, "pad_token_id": head.blank_id}
    elif isinstance(head, Codebook):
        named = "Wav2Vec2ForPreTraining"
        own = {
            "num_codevector_groups": head.num_groups,
            "num_codevectors_per_group": head.num_codes,
            "codevector_dim": head.code_dim,
            "proj_codevector_dim": head.shared_dim,
        }
    if not config.mask_vector:
        own |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    return (
        transformer_fields(config.transformer)
        | dict(zip(("conv_dim", "conv_kernel", "conv_stride"), map(list, sizes), strict=True))
        | {
            "architectures": [named],
            "do_stable_layer_norm": not config.transformer.post_norm,
            "feat_extract_norm": config.conv_norm,
            "feat_extract_activation": THEIR_ACTIVATIONS[config.conv_activation],
            "conv_bias": config.conv_bias,
            "num_conv_pos_embeddings": config.position_size,
            "num_conv_pos_embedding_groups": config.position_groups,
        }
        | own
    )


def wav2vec2_modules(config: Wav2Vec2) -> dict[str, str]:
    """The modules of wav2vec 2.0 and of its heads."""
    modules = {f"layer/{o}": f"encoder.layers.{{}}.{t}" for o, t in WAV2VEC2_LAYER.items()}
    for i in range(len(config.convolutions)):
        there = f"feature_extractor.conv_layers.{i}"
        modules[f"convolution_{i}/conv"] = f"{there}.conv"
        modules[f"convolution_{i}/norm"] = f"{there}.layer_norm"
    return modules | HEADS | {
        "features_norm": "feature_projection.layer_norm",
        "features": "feature_projection.projection",
        "positions": "encoder.pos_conv_embed.conv",
        "norm": "encoder.layer_norm",
    }  # fmt: skip


WEIGHT_NORM = "encoder.pos_conv_embed.conv.parametrizations.weight.original"


def wav2vec2_written(config: Wav2Vec2, name: str) -> str:
    """The name that transformers writes: a model with a head puts the rest behind a prefix."""
    whole = config.head is None or name.startswith((*HEADS.values(), "quantizer."))
    return name if whole else f"wav2vec2.{name}"


FAMILIES: dict[str, Family] = {
    "whisper": Family(
        whisper,
        whisper_fields,
        whisper_modules,
        {"positions": Named("embed_positions.weight")},
        # What decodes text, and what classifies sounds: nothing here runs them.
        ignored=r"(model\.)?decoder\..*|proj_out\..*|projector\..*|classifier\..*|layer_weights",
        renamed={r"^(model\.)?encoder\.": ""},
    ),
    "wav2vec2": Family(
        wav2vec2,
        wav2vec2_fields,
        wav2vec2_modules,
        {
            "masked": Named("masked_spec_embed"),
            "positions/scale": Named(f"{WEIGHT_NORM}0", ones=2),
            "positions/direction": Named(f"{WEIGHT_NORM}1"),
            "codes": Named("quantizer.codevectors", ones=1),
        },
        # What classifies sounds, frames and speakers: nothing here runs them.
        ignored=r"(projector|classifier|objective|tdnn)\..*|layer_weights",
        prefix="wav2vec2.",
        renamed={
            r"\.conv\.weight_g$": ".conv.parametrizations.weight.original0",
            r"\.conv\.weight_v$": ".conv.parametrizations.weight.original1",
        },
        written=wav2vec2_written,
    ),
}
