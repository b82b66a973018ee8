"""Reference: image encoders against transformers' own, forward, slopes and written back."""

import dataclasses

import encoder_cases
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from deepseek_jax.checkpoint import huggingface
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.vit import Learned, Sines, ViT
from deepseek_jax.serving.encoder import load_encoder

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip


def pixels(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def both(model, x):
    out = model(x)
    return out.last_hidden_state, out.pooler_output


def resized(model, x, interpolate_pos_encoding):
    out = model(x, interpolate_pos_encoding=interpolate_pos_encoding)
    return out.last_hidden_state, out.pooler_output


ANY_SIZE = {"run": resized, "interpolate_pos_encoding": True}


def test_clip(tmp_path):
    config = transformers.CLIPVisionConfig(**SHAPE, image_size=30, patch_size=7)
    model = encoder_cases.randomized(transformers.CLIPVisionModel(config))
    encoder = encoder_cases.agrees(model, tmp_path, pixels(2, 3, 30, 30), both)
    x = pixels(1, 3, 23, 50)
    wanted, pooled = (y.detach().numpy() for y in resized(model, torch.from_numpy(x), True))
    found = encoder.encoded(x, interpolate_pos_encoding=True)
    np.testing.assert_allclose(found.hidden, wanted, atol=1e-4 * abs(wanted).max(), rtol=0)
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-4 * abs(pooled).max(), rtol=0)


@pytest.mark.parametrize(
    ("fields", "size", "made_with", "how"),
    [
        (
            {"image_size": [24, 40], "patch_size": 8, "num_channels": 1, "qkv_bias": False},
            (24, 40),
            {"add_pooling_layer": False, "use_mask_token": True},
            {},
        ),
        ({"image_size": 32, "patch_size": 8, "hidden_act": "relu"}, (46, 16), {}, ANY_SIZE),
    ],
    ids=["mask-token", "pooler-resized"],
)
def test_vit(tmp_path, fields, size, made_with, how):
    config = transformers.ViTConfig(**SHAPE, **fields)
    model = encoder_cases.randomized(transformers.ViTModel(config, **made_with))
    x = pixels(2, config.num_channels, *size)
    how = {"run": both} | how
    if "use_mask_token" in made_with:
        how = {"run": hidden_patches, "bool_masked_pos": np.arange(30).reshape(2, 15) % 4 == 1}
    encoder_cases.agrees(model, tmp_path, x, made_with=made_with, **how)


def hidden_patches(model, x, bool_masked_pos):
    out = model(x, bool_masked_pos=torch.from_numpy(bool_masked_pos))
    return out.last_hidden_state, out.pooler_output


def test_a_classifier_is_left_behind(tmp_path):
    config = transformers.ViTConfig(**SHAPE, image_size=16, patch_size=8)
    model = encoder_cases.randomized(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    x = pixels(1, 3, 16, 16)
    wanted = model.vit(torch.from_numpy(x)).last_hidden_state.detach()
    np.testing.assert_allclose(load_encoder(tmp_path).encode(x), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "size", "how"),
    [
        ({"image_size": 30, "patch_size": 7}, (30, 30), {}),  # 384 is no multiple of 14 either
        (
            {"image_size": 24, "patch_size": 8, "hidden_act": "gelu", "vision_use_head": False},
            (32, 16),
            ANY_SIZE,
        ),
    ],
    ids=["tanh", "no-head-resized"],
)
def test_siglip(tmp_path, fields, size, how):
    config = transformers.SiglipVisionConfig(**SHAPE, **fields)
    model = encoder_cases.randomized(transformers.SiglipVisionModel(config))
    encoder_cases.agrees(model, tmp_path, pixels(2, 3, *size), **({"run": both} | how))


def test_published_siglip_towers_have_a_prefix(tmp_path):
    config = transformers.SiglipVisionConfig(**SHAPE, image_size=16, patch_size=8)
    model = encoder_cases.randomized(transformers.SiglipVisionModel(config))
    model.save_pretrained(tmp_path)
    x, file = pixels(1, 3, 16, 16), tmp_path / "model.safetensors"
    wanted = load_encoder(tmp_path).encode(x)
    save_file({f"vision_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    np.testing.assert_array_equal(load_encoder(tmp_path).encode(x), wanted)


DINO = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
PLAIN = (transformers.Dinov2Config, transformers.Dinov2Model)
REGISTERS = (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel)


@pytest.mark.parametrize(
    ("kinds", "fields", "size"),
    [
        (PLAIN, {"use_swiglu_ffn": True, "use_mask_token": False, "qkv_bias": False}, (28, 28)),
        (PLAIN, {"mlp_ratio": 2}, (60, 15)),
        (REGISTERS, {"num_register_tokens": 2, "layerscale_value": 0.5}, (14, 50)),
    ],
    ids=["gated", "resized", "registers-resized"],
)
def test_dinov2(tmp_path, kinds, fields, size):
    config, model = kinds
    config = config(**DINO, **({"image_size": 28, "patch_size": 7} | fields))
    model = encoder_cases.randomized(model(config))
    encoder_cases.agrees(model, tmp_path, pixels(2, 3, *size), both)


def test_what_does_not_fit_is_refused(tmp_path):
    config = transformers.CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8)
    model = encoder_cases.randomized(transformers.CLIPVisionModel(config))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    with pytest.raises(InputError, match=r"pixels have shape \(2, 3, 40, 32\)"):
        encoder.encode(pixels(2, 3, 40, 32))
    with pytest.raises(InputError, match=r"takes \[B, 3, at least 8, at least 8\]"):
        encoder.encode(pixels(2, 3, 40, 7), interpolate_pos_encoding=True)
    with pytest.raises(InputError, match="must have a mask token"):
        encoder.encode(pixels(2, 3, 32, 32), bool_masked_pos=np.ones((2, 16)))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"quick_gelu"', '"snake"'))
    with pytest.raises(InputError, match="hidden_act is 'snake'"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(
        text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')
    )
    with pytest.raises(InputError, match="layers.2.*matches nothing"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("vit", {"positions": Sines(), "pooling": "tanh"}),
        ("vit", {"pooling": "class"}),
        ("dinov2", {"num_registers": 4, "positions": Learned(any_size=True)}),
        ("clip_vision_model", {"pre_norm": True, "final_norm": False, "patch_bias": True}),
    ],
)
def test_nothing_is_written_that_would_be_read_as_another(tmp_path, kind, fields):
    layers = Transformer(num_layers=1, embed_dim=32, num_heads=4, mlp_dim=128, layer_scale=1.0)
    if kind != "dinov2":
        layers = dataclasses.replace(layers, layer_scale=None)
    encoder = build_encoder(ViT(transformer=layers, image_size=(16, 16), **fields))
    with pytest.raises(InputError, match="has no equal of this encoder's"):
        huggingface.write_encoder(tmp_path, encoder, encoder.shapes, {"model_type": kind})
