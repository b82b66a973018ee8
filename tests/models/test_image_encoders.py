"""Reference: image encoders against transformers' own, forward, slopes and written back."""

import encoder_cases
import numpy as np
import pytest
import transformers

from deepseek_jax.core.errors import InputError
from deepseek_jax.serving.encoder import load_encoder

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip


def pixels(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def both(model, x):
    out = model(x)
    return out.last_hidden_state, out.pooler_output


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 32, "patch_size": 8},
        {"image_size": 28, "patch_size": 14, "hidden_act": "gelu"},
    ],
    ids=["quick-gelu", "gelu"],
)
def test_clip(tmp_path, fields):
    config = transformers.CLIPVisionConfig(**SHAPE, **fields)
    model = encoder_cases.randomized(transformers.CLIPVisionModel(config))
    size = fields["image_size"]
    encoder_cases.agrees(model, tmp_path, pixels(2, 3, size, size), both)


def test_what_does_not_fit_is_refused(tmp_path):
    config = transformers.CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8)
    model = encoder_cases.randomized(transformers.CLIPVisionModel(config))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    with pytest.raises(InputError, match=r"pixels have shape \(2, 3, 40, 32\)"):
        encoder.encode(pixels(2, 3, 40, 32))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"quick_gelu"', '"snake"'))
    with pytest.raises(InputError, match="hidden_act is 'snake'"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(
        text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')
    )
    with pytest.raises(InputError, match="layers.2.*matches nothing"):
        load_encoder(tmp_path)
