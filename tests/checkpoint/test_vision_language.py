"""Reference: what folders of vision-language models say, beside their weights' names."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
import transformers
import vision_language_cases as seeing

import deepseek_jax
from deepseek_jax.checkpoint import multi_modality, sam_encoders, vision_language
from deepseek_jax.checkpoint.safetensors import open_tensors
from deepseek_jax.core.config import load_config
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.router import Balance
from deepseek_jax.models.counts import num_params
from deepseek_jax.models.projectors import MLPProjector
from deepseek_jax.models.vision_language import build_vision_language
from deepseek_jax.training.recipe import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_head_that_is_there_is_not_the_embedding(tmp_path):
    model = seeing.converted("deepseek_vl")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = True  # transformers' default, which released weights are not
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens, _, pixels = seeing.rows()
    theirs = model(input_ids=torch.from_numpy(tokens), pixel_values=torch.from_numpy(pixels))
    theirs = theirs.logits.detach().numpy()
    mine = deepseek_jax.load(tmp_path).logits(tokens, images=pixels)
    np.testing.assert_allclose(mine, theirs, atol=1e-4 * abs(theirs).max(), rtol=0)
    tied = seeing.converted("deepseek_vl", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert deepseek_jax.load(tmp_path / "tied").config.language.tie_embeddings


RELEASED = {  # of VL2's config.json: what differs, and the published billions of parameters
    "tiny": (
        {
            "hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896,
            "num_attention_heads": 10, "num_key_value_heads": 10, "num_hidden_layers": 12,
            "use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0,
            "v_head_dim": 0, "vocab_size": 129280, "n_routed_experts": 64,
        },
        3.37,
    ),
    "small": (
        {
            "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "num_attention_heads": 16, "num_hidden_layers": 27, "vocab_size": 102400,
            "n_routed_experts": 64,
        },
        16.1,
    ),
    "base": (
        {
            "hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536,
            "num_attention_heads": 32, "num_hidden_layers": 30, "vocab_size": 129280,
            "n_routed_experts": 72, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "norm_topk_prob": True, "routed_scaling_factor": 2.0,
        },
        27.5,
    ),
}  # fmt: skip


def as_read(model):
    """A config's model as a loader reads it: without what is of training alone."""
    language, tower = model.language, model.vision.transformer
    moe = dataclasses.replace(language.moe, balance=Balance())
    return dataclasses.replace(
        model,
        language=dataclasses.replace(language, moe=moe, remat="none"),
        vision=dataclasses.replace(
            model.vision, transformer=dataclasses.replace(tower, remat="none")
        ),
    )


@pytest.mark.parametrize("size", RELEASED)
def test_released_vl2s_have_their_published_sizes(size):
    language, billions = RELEASED[size]
    language = language | {
        "first_k_dense_replace": 1, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "q_lora_rank": None, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    tower = {"layers": 27, "mlp_ratio": 3.7362, "patch_size": 14, "width": 1152}
    projector = {"model_type": "mlp_projector", "n_embed": language["hidden_size"]}
    parts = {"language": language, "vision": tower, "projector": projector}
    original = {f"{name}_config": part for name, part in parts.items()}
    original["model_type"] = kind = "deepseek_vl_v2"
    config = vision_language.config_of(original, ())
    ours = load_config(ROOT / f"configs/deepseek_vl2_{size}.py", TrainConfig).model
    assert as_read(ours) == config
    total, _ = num_params(build_vision_language(config))
    pool = 1152 * (1 + 4 * 1152 + 2 * 4304)  # SigLIP's, which counts there and is left out here
    assert float(f"{(total + pool) / 1e9:.3g}") == billions
    assert config.view_tokens == 196
    assert len(config.sight.layout((3, 2))) == 210 + 1 + 28 * 43
    fields = vision_language.hf_config(vision_language.FAMILIES[kind], config, original)
    assert vision_language.config_of(fields, ()) == config


UNREAD = {  # of the released folders
    "janus": {"gen_embed.weight", "vision_model.vision_tower.attn_pool.latent"},
    "deepseek_vl_hybrid": {
        f"vision_model.{part}_layer_norm.{leaf}"
        for part in ("high", "low")
        for leaf in ("weight", "bias")
    },
}


@pytest.mark.parametrize("kind", UNREAD)
def test_a_folder_as_deepseek_released_it(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(multi_modality.TOWERS, seeing.TOWER, seeing.SIZES)
    monkeypatch.setattr(multi_modality, "SAMS", {seeing.SAM: sam_encoders.sam_vision(seeing.LARGE)})
    model = seeing.converted(kind)
    (seeing.original_folder if kind == "janus" else seeing.original_hybrid)(model, tmp_path)
    ours = deepseek_jax.load(tmp_path)
    ours = dataclasses.replace(
        ours, config=dataclasses.replace(ours.config, image_id=seeing.IMAGE)
    )  # which its tokenizer would say
    tokens, _, pixels = seeing.rows()
    shown = seeing.shown(kind, pixels)
    views = {name: torch.from_numpy(array) for name, array in shown.items()}
    theirs = model(input_ids=torch.from_numpy(tokens), **views).logits.detach().numpy()
    mine = ours.logits(tokens, images=shown if len(shown) > 1 else pixels)
    np.testing.assert_allclose(mine, theirs, atol=1e-4 * abs(theirs).max(), rtol=0)
    original = json.loads((tmp_path / "config.json").read_text())
    vision_language.write(tmp_path / "again", ours.model, ours.params, original)
    before, after = (open_tensors(folder) for folder in (tmp_path, tmp_path / "again"))
    assert before.keys() - after.keys() == UNREAD[kind]
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor.read(), before[name].read(), err_msg=name)
    assert deepseek_jax.load(tmp_path / "again").model.config == ours.model.config
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["vision_config"] == original["vision_config"]
    assert ours.look.normalization == {"janus": "half"}.get(kind, "clip+half")
    original["aligner_config"]["params"]["projector_type"] = "identity"
    (tmp_path / "config.json").write_text(json.dumps(original))
    with pytest.raises(InputError, match="projector_type is 'identity'"):
        deepseek_jax.load(tmp_path)


def test_deepseek_vl_7bs_published_size():
    """As transformers converts it, and as it was released; written back as either."""
    text = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_hidden_layers": 30, "vocab_size": 102400,
    }  # fmt: skip
    tower = {
        "hidden_size": 1024, "intermediate_size": 4096, "image_size": 384, "patch_size": 16,
        "hidden_act": "gelu", "vision_use_head": False, "num_attention_heads": 16,
        "num_hidden_layers": 24,
    }  # fmt: skip
    converted = {
        "model_type": "deepseek_vl_hybrid", "text_config": text, "vision_config": tower,
        "high_res_vision_config": {}, "tie_word_embeddings": False,
    }  # fmt: skip
    config = vision_language.config_of(converted, {"lm_head.weight"})
    with torch.device("meta"):
        parts = {name: converted[f"{name}_config"] for name in ("text", "vision")}
        made = transformers.DeepseekVLHybridConfig(
            text_config=transformers.LlamaConfig(**parts["text"]),
            vision_config=transformers.SiglipVisionConfig(**parts["vision"]),
            tie_word_embeddings=False,
        )
        theirs = transformers.DeepseekVLHybridForConditionalGeneration(made)
    total, _ = num_params(build_vision_language(config))
    assert total == sum(x.numel() for x in theirs.parameters())
    assert config.view_shape == (1408, 1024, 3) and config.view_tokens == 576
    assert vision_language.kind_of({}, config) == "deepseek_vl_hybrid"
    for kind in ("deepseek_vl_hybrid", "multi_modality"):
        fields = vision_language.hf_config(
            vision_language.FAMILIES[kind],
            dataclasses.replace(config, image_id=None),
            {"model_type": kind},
        )
        again = vision_language.config_of(fields | {"image_token_id": 100015}, {"lm_head.weight"})
        assert again.vision == config.vision and again.projector == config.projector
        assert again.language == config.language
    for kind in ("deepseek_vl", "janus", "deepseek_vl_v2"):
        with pytest.raises(
            InputError, match="Hybrid sees, where the folder has a ViT|has a Downsample"
        ):
            vision_language.FAMILIES[kind].family.fields(config)


def test_models_that_no_folder_can_say_are_refused(tmp_path):
    seeing.vl2_folder("tiny", tmp_path)
    config = deepseek_jax.load(tmp_path).config
    original = json.loads((tmp_path / "config.json").read_text())
    assert vision_language.kind_of({}, config) == "deepseek_vl_v2"
    for changed, why in (
        ({"projector": MLPProjector()}, "has a DownsampleProjector"),
        ({"prefix": "question"}, "no equal of this model's prefix"),
    ):
        other = dataclasses.replace(config, **changed)
        with pytest.raises(InputError, match=why):
            vision_language.hf_config(vision_language.FAMILIES["deepseek_vl_v2"], other, original)
    with pytest.raises(InputError, match="no folder of Hugging Face has such a model"):
        vision_language.kind_of({}, dataclasses.replace(config, prefix="images"))
    for field, value, why in (
        ("tile_tag", "1D", "tile_tag is '1D'"),
        ("global_view_pos", "tail", "global_view_pos is 'tail'"),
        ("projector_config", {"projector_type": "linear"}, "projector_type is 'linear'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(original | {field: value}))
        with pytest.raises(InputError, match=why):
            deepseek_jax.load(tmp_path)
