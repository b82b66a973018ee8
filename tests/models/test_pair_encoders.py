"""Reference: text towers and pairs of towers against transformers' own."""

import dataclasses

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deepseek_jax.checkpoint import encoders, huggingface
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.two_tower import build_towers
from deepseek_jax.serving import language
from deepseek_jax.serving.encoder import load_encoder

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = SHAPE | {"vocab_size": 50, "max_position_embeddings": 12}


def texts():
    """Rows [3, 10] that end with 49 at places 7, 4 and 9, and what is real of them."""
    tokens = np.random.default_rng(0).integers(3, 49, (3, 10))
    mask = np.ones_like(tokens)
    for row, end in enumerate((7, 4, 9)):
        tokens[row, end] = 49
        mask[row, end + 1 :] = 0
    return tokens, mask


def both(model, x, attention_mask=None):
    mask = None if attention_mask is None else torch.from_numpy(attention_mask)
    out = model(input_ids=x, attention_mask=mask)
    return out.last_hidden_state, out.pooler_output


@pytest.mark.parametrize("end", [49, 2], ids=["first-end", "largest"])
def test_clip_text(tmp_path, end):
    config = transformers.CLIPTextConfig(**TEXT, eos_token_id=end)
    model = encoder_cases.randomized(transformers.CLIPTextModel(config))
    tokens, _ = texts()
    encoder_cases.agrees(model, tmp_path, tokens, both)


def test_what_is_padded_changes_nothing(tmp_path):
    config = transformers.CLIPTextConfig(**TEXT, eos_token_id=49)
    model = encoder_cases.randomized(transformers.CLIPTextModel(config))
    model.save_pretrained(tmp_path)
    encoder, (tokens, mask) = load_encoder(tmp_path), texts()
    other = np.where(mask, tokens, (tokens + 5) % 49)
    found = [encoder.encoded(x, attention_mask=mask) for x in (tokens, other)]
    np.testing.assert_array_equal(found[0].pooled, found[1].pooled)
    whole = np.asarray(encoder.encoded(tokens, attention_mask=mask).hidden)[mask > 0]
    theirs = both(model, torch.from_numpy(tokens), mask)[0].detach().numpy()[mask > 0]
    np.testing.assert_allclose(whole, theirs, atol=1e-4)


def clip(folder):
    config = transformers.CLIPConfig(
        text_config=TEXT | {"eos_token_id": 49},
        vision_config=SHAPE | {"image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    model = encoder_cases.randomized(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    return model, load_encoder(folder)


def test_clip(tmp_path):
    model, ours = clip(tmp_path)
    pixels = np.random.default_rng(1).normal(size=(3, 3, 16, 16)).astype(np.float32)
    tokens, mask = texts()
    theirs = model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask),
        pixel_values=torch.from_numpy(pixels),
    )
    image, text = ours.embed_image(pixels), ours.embed_text(tokens, mask)
    np.testing.assert_allclose(image, theirs.image_embeds.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(text, theirs.text_embeds.detach().numpy(), atol=1e-5)
    pair = ours.towers.apply(
        ours.params,
        jnp.asarray(pixels.transpose(0, 2, 3, 1)),
        jnp.asarray(tokens),
        jnp.asarray(mask > 0),
    )
    logits = jnp.exp(pair.log_scale) * pair.image @ pair.text.T
    np.testing.assert_allclose(logits, theirs.logits_per_image.detach().numpy(), atol=1e-4)

    written(model, ours, tmp_path / "again")


def written(model, ours, folder):
    huggingface.write_encoder(folder, ours.towers, ours.params, ours.original)
    other, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_siglip(tmp_path):
    config = transformers.SiglipConfig(
        text_config=TEXT | {"projection_size": 32},
        vision_config=SHAPE | {"image_size": 16, "patch_size": 8},
    )
    model = encoder_cases.randomized(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(1.2)
    model.save_pretrained(tmp_path / "saved")
    ours = load_encoder(tmp_path / "saved")
    pixels = np.random.default_rng(1).normal(size=(3, 3, 16, 16)).astype(np.float32)
    tokens, _ = texts()
    theirs = model(input_ids=torch.from_numpy(tokens), pixel_values=torch.from_numpy(pixels))
    image, text = ours.embed_image(pixels), ours.embed_text(tokens)
    np.testing.assert_allclose(image, theirs.image_embeds.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(text, theirs.text_embeds.detach().numpy(), atol=1e-5)
    images = jnp.asarray(pixels.transpose(0, 2, 3, 1))
    pair = ours.towers.apply(ours.params, images, jnp.asarray(tokens))
    logits = jnp.exp(pair.log_scale) * pair.image @ pair.text.T + pair.bias
    np.testing.assert_allclose(logits, theirs.logits_per_image.detach().numpy(), atol=1e-4)
    written(model, ours, tmp_path / "again")


def test_siglips_text(tmp_path):
    config = transformers.SiglipTextConfig(**TEXT, projection_size=24)
    model = encoder_cases.randomized(transformers.SiglipTextModel(config))
    encoder_cases.agrees(model, tmp_path, texts()[0], both)


def test_fresh_towers_start_as_clip_and_siglip_do(tmp_path):
    config = clip(tmp_path)[1].config
    params = build_towers(config).init(jax.random.key(0))
    np.testing.assert_allclose(params["logit_scale"], np.log(1 / 0.07), rtol=1e-6)
    params = build_towers(dataclasses.replace(config, loss="sigmoid")).init(jax.random.key(0))
    np.testing.assert_allclose(np.exp(params["logit_scale"]), 10, rtol=1e-6)
    assert params["logit_bias"] == -10


def test_texts_that_cannot_be_are_refused(tmp_path):
    ours = clip(tmp_path)[1]
    for tokens, why in (
        (np.zeros((2, 13), int), "texts have 13 tokens; this tower takes 12"),
        (np.full((2, 4), 50), r"outside the vocabulary 0\.\.49"),
        (np.zeros((2, 4)), "the text must be integers"),
    ):
        with pytest.raises(InputError, match=why):
            ours.embed_text(tokens)


@pytest.mark.parametrize("end", [None, [2, 3]])
def test_a_text_ends_with_one_token(end):
    with pytest.raises(InputError, match="eos_token_id is .* one number"):
        encoders.config_of({"model_type": "clip_text_model", "eos_token_id": end})


def test_language_commands_name_what_they_were_given(tmp_path):
    clip(tmp_path)
    for open_it in (huggingface.open_folder, language.load):
        with pytest.raises(InputError, match=r"holds an encoder \(clip\)"):
            open_it(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"model_type": "clip"', '"model_type": "x"')
    )
    with pytest.raises(InputError, match=r"model_type 'x' is not one of llama, .*janus.* clip"):
        language.load(tmp_path)
