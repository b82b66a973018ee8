"""Reference: SAM's image encoder against transformers' own, forward, slopes and written back.

Also sharded = single-device, bfloat16, and what is refused.
"""

import dataclasses
import math

import encoder_cases
import encoder_meshes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deepseek_jax.checkpoint import sam_encoders
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.sam import SAM, Run, runs
from deepseek_jax.serving.encoder import load_encoder

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 20,
    "patch_size": 4, "window_size": 2, "global_attn_indexes": [1], "output_channels": 12,
    "mlp_ratio": 1.5,
}  # fmt: skip


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def theirs(**fields):
    config = transformers.SamVisionConfig(**SMALL | fields)
    return encoder_cases.randomized(transformers.SamVisionModel(config))


def run(model, x):
    """In [B, T, D], as ours: theirs is a map."""
    return model(x).last_hidden_state.flatten(2).transpose(1, 2), None


CASES = {
    # Windows are filled up (5 places in windows of 2), positions of both kinds.
    "windows-and-one-whole": {},
    "two-whole-together": {
        "num_hidden_layers": 4, "global_attn_indexes": [0, 1], "window_size": 5,
        "qkv_bias": False, "hidden_act": "gelu_new", "num_channels": 1, "mlp_dim": 40,
    },
    "no-positions-in-windows-larger-than-the-map": {
        "use_abs_pos": False, "use_rel_pos": False, "window_size": 7, "global_attn_indexes": [],
        "num_hidden_layers": 2,
    },
    "whole-alone": {"window_size": 0, "num_hidden_layers": 2, "image_size": 23},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sam(tmp_path, case):
    model = theirs(**CASES[case])
    x = pixels(2, model.config.num_channels, model.config.image_size, model.config.image_size)
    ours = encoder_cases.agrees(model, tmp_path, x, run)
    if case == "two-whole-together":
        found = ours.encoded(x, keep=True)
        hidden = model(torch.from_numpy(x), output_hidden_states=True).hidden_states[1:]
        for mine, one in zip(found.layers, hidden, strict=True):
            one = one.flatten(1, 2).detach()
            np.testing.assert_allclose(mine, one, atol=1e-4 * one.abs().max().item())
        np.testing.assert_array_equal(found.features, found.layers[0])


def test_the_first_block_that_sees_all_ends_a_run():
    published = sam_encoders.sam_vision({})
    assert [*runs(published)] == [Run(False, 2), Run(True, 1)] * 4
    together = dataclasses.replace(published, whole_layers=(0, 1, 2, 11))
    assert [*runs(together)] == [Run(True, 1), Run(True, 2), Run(False, 8), Run(True, 1)]
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(build_encoder(published).shapes))
    assert total == sum(
        x.numel() for x in transformers.SamVisionModel(transformers.SamVisionConfig()).parameters()
    )


def test_sharded_is_single_device_and_bfloat16_is_near():
    transformer = Transformer(num_layers=3, embed_dim=32, num_heads=4, mlp_dim=48)
    config = SAM(
        transformer=transformer, image_size=20, patch_size=4, window=3, whole_layers=(1,),
        output_dim=16,
    )  # fmt: skip
    encoder_meshes.same_on_a_mesh(config, {"images": pixels(4, 20, 20, 3)})


def test_what_does_not_fit_is_refused(tmp_path):
    theirs().save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    with pytest.raises(
        InputError, match=r"\(2, 3, 24, 20\); this encoder takes \[B, \(3, 20, 20\)"
    ):
        encoder.encode(pixels(2, 3, 24, 20))
    with pytest.raises(ValueError, match=r"\(24, 20, 3\), and this encoder's \(20, 20, 3\)"):
        encoder.encoder.apply(encoder.params, images=jnp.zeros((1, 24, 20, 3)))
    text = (tmp_path / "config.json").read_text()
    for before, after, why in (
        ('"window_size": 2', '"window_size": 3', r"rel_pos_h has shape \(3, 8\), not \(5, 8\)"),
        ('"image_size": 20', '"image_size": [20, 24]', "must be squares"),
        ('"attention_dropout": 0.0', '"attention_dropout": 0.5', "only 0.0 is understood"),
        ('"use_rel_pos": true', '"use_rel_pos": false', "rel_pos_h matches nothing"),
    ):
        assert before in text
        (tmp_path / "config.json").write_text(text.replace(before, after))
        with pytest.raises(InputError, match=why):
            load_encoder(tmp_path)
    transformer = Transformer(num_layers=3, embed_dim=32, num_heads=4, mlp_dim=48)
    for given, why in (
        ({"whole_layers": (3,)}, "must lie in the 3 layers"),
        ({"image_size": 8}, "must be at least patch_size"),
        ({"window": 0}, "must be at least 1"),
        ({"transformer": dataclasses.replace(transformer, causal=True)}, "no gate, post_norm"),
    ):
        with pytest.raises(ValueError, match=why):
            SAM(**{"transformer": transformer, "whole_layers": (), **given})
