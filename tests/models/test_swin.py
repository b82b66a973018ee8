"""Reference: Swin against transformers' own, forward, slopes and written back.

Also sharded = single-device, bfloat16, and what is refused.
"""

import encoder_cases
import encoder_meshes
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deepseek_jax.core.errors import InputError
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.swin import Swin
from deepseek_jax.serving.encoder import INPUTS, load_encoder

SMALL = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4, "mlp_ratio": 2.0,
}  # fmt: skip


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def theirs(**fields):
    return encoder_cases.randomized(transformers.SwinModel(transformers.SwinConfig(**fields)))


def both(model, x):
    out = model(x)
    return out.last_hidden_state, out.pooler_output


CASES = {
    # Fields of the config, and height and width of the images.
    "pairs": ({"depths": [4], "num_heads": [2]}, (16, 32)),
    # Patches, windows and merging are all filled up.
    "odd": (
        {
            "depths": [3, 1], "window_size": 3, "patch_size": 3, "num_channels": 1,
            "qkv_bias": False, "hidden_act": "gelu_new",
        },
        (25, 38),
    ),
    "window-is-the-map": (
        {
            "depths": [2], "num_heads": [2], "image_size": [8, 16],
            "use_absolute_embeddings": True,
        },
        (8, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_swin(tmp_path, case):
    fields, size = CASES[case]
    fields = SMALL | fields
    x = pixels(2, fields.get("num_channels", 3), *size)
    model = theirs(**fields)
    ours = encoder_cases.agrees(model, tmp_path, x, both)
    if case == "odd":
        found = ours.encoded(x, keep=True).layers
        other = model(torch.from_numpy(x), output_hidden_states=True).hidden_states
        for mine, one in zip(found, other, strict=True):
            np.testing.assert_allclose(mine, one.detach(), atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("size", [(12, 24), (22, 10)], ids=str)
def test_absolute_positions_are_resized_as_transformers_does(tmp_path, size):
    fields = {"depths": [2], "num_heads": [2], "image_size": 16, "window_size": 3}
    model = theirs(**SMALL | fields | {"use_absolute_embeddings": True})

    def run(model, x, interpolate_pos_encoding):
        out = model(x, interpolate_pos_encoding=interpolate_pos_encoding)
        return out.last_hidden_state, out.pooler_output

    x = pixels(2, 3, *size)
    encoder_cases.agrees(model, tmp_path, x, run, interpolate_pos_encoding=True)


def test_a_window_larger_than_the_map_shrinks_and_uses_the_middle_of_its_table(tmp_path):
    """transformers shrinks the window and not its bias, and fails: here its index is cut too."""
    model = theirs(**SMALL | {"depths": [2], "num_heads": [2], "window_size": 5})
    side = np.arange(25).reshape(5, 5)[:3, :3].ravel()
    for block in model.encoder.layers[0].blocks:
        bias = block.attention.relative_position_bias
        whole = bias.relative_position_index.view(25, 25)
        bias.relative_position_index, bias.window_area = whole[side][:, side].reshape(-1), 9
    encoder_cases.agrees(model, tmp_path, pixels(2, 3, 10, 6), both)


def test_sharded_is_single_device_and_bfloat16_is_near():
    config = Swin(patch_size=2, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window=3)
    encoder_meshes.same_on_a_mesh(config, {"images": pixels(4, 10, 14, 3)})


def test_what_does_not_fit_is_refused(tmp_path):
    fields = SMALL | {"depths": [2], "num_heads": [2], "use_absolute_embeddings": True}
    theirs(**fields).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    with pytest.raises(InputError, match=r"\(2, 3, 30, 32\); this encoder takes \[B, 3, 32, 32\]"):
        encoder.encode(pixels(2, 3, 30, 32))
    with pytest.raises(InputError, match=r"takes \[B, 3, a multiple of 2, a multiple of 2\]"):
        encoder.encode(pixels(2, 3, 30, 31), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="positions for whole patches of 2"):
        encoder.encoder.apply(encoder.params, images=jnp.zeros((1, 31, 30, 3)))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"window_size": 4', '"window_size": 3'))
    with pytest.raises(InputError, match=r"relative_position_bias_table has shape \(49, 2\)"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"patch_size": 2', '"patch_size": [2, 4]'))
    with pytest.raises(InputError, match="only squares"):
        load_encoder(tmp_path)
    config = Swin(depths=(2, 2), num_heads=(2, 4), embed_dim=8)
    with pytest.raises(InputError, match=r"\(1, 4, 9, 9\); this encoder takes \[B, 3, H, W\]"):
        INPUTS[Swin](config, pixels(1, 4, 9, 9))
    with pytest.raises(InputError, match=r"\(1, 3, 0, 9\)"):
        INPUTS[Swin](config, pixels(1, 3, 0, 9))
    with pytest.raises(ValueError, match="4 channels, and this encoder 3"):
        build_encoder(config).apply({}, images=jnp.zeros((1, 8, 8, 4)))
    with pytest.raises(ValueError, match="a number a stage"):
        Swin(depths=(2, 2), num_heads=(2,))
    with pytest.raises(ValueError, match="stage 1 is 192 wide"):
        Swin(depths=(2, 2), num_heads=(3, 5))


def test_published_names(tmp_path):
    """A classifier's and a pretraining model's folders: a prefix, and what is left out."""
    config = transformers.SwinConfig(**SMALL | {"depths": [1], "num_heads": [2]}, encoder_stride=2)
    x = pixels(1, 3, 16, 16)
    for kind in (transformers.SwinForImageClassification, transformers.SwinForMaskedImageModeling):
        model = encoder_cases.randomized(kind(config))
        model.save_pretrained(tmp_path / kind.__name__)
        hidden = model.swin(torch.from_numpy(x)).last_hidden_state.detach().numpy()
        mine = load_encoder(tmp_path / kind.__name__).encode(x)
        np.testing.assert_allclose(mine, hidden, atol=1e-4)
