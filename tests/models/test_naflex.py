"""Reference: SigLIP2's NaFlex tower against transformers' own. Invariance: padding is nothing."""

import json

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deepseek_jax.core.config import from_dict, to_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.layers.pooling import pooled
from deepseek_jax.models.build import dtypes_of
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.vit import Axial, Learned, ViT
from deepseek_jax.serving.encoder import load_encoder
from deepseek_jax.serving.inputs import patches_of

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "patch_size": 4,
}  # fmt: skip
GRIDS = np.array([[3, 4], [2, 6], [5, 2], [1, 7]])


def batch(grids=GRIDS, length=14, channels=3):
    """Patches, real where the grids say, noise elsewhere."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(len(grids), length, 16 * channels)).astype(np.float32)
    mask = np.arange(length)[None] < grids.prod(1)[:, None]
    return patches, {"pixel_attention_mask": mask.astype(np.int64), "spatial_shapes": grids}


def run(model, x, pixel_attention_mask, spatial_shapes):
    given = torch.from_numpy(pixel_attention_mask), torch.from_numpy(spatial_shapes)
    out = model(x, *given)
    return out.last_hidden_state, out.pooler_output


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    config = transformers.Siglip2VisionConfig(**SHAPE, num_patches=16)
    model = encoder_cases.randomized(transformers.Siglip2VisionModel(config))
    patches, more = batch()
    return encoder_cases.agrees(model, tmp_path_factory.mktemp("siglip2"), patches, run, **more)


def test_a_tower_without_a_head_and_full_rows(tmp_path):
    config = transformers.Siglip2VisionConfig(
        **SHAPE, num_patches=49, hidden_act="gelu", vision_use_head=False
    )
    model = encoder_cases.randomized(transformers.Siglip2VisionModel(config))
    model.save_pretrained(tmp_path)
    patches, more = batch(GRIDS[:2], 12)
    wanted, none = run(model, torch.from_numpy(patches), **more)
    found = load_encoder(tmp_path).encoded(patches, **more)
    assert none is None and found.pooled is None
    wanted = wanted.detach().numpy()
    np.testing.assert_allclose(found.hidden, wanted, atol=1e-4 * abs(wanted).max(), rtol=0)


def test_siglip2_agrees_and_padding_changes_nothing(encoder):
    patches, more = batch()
    given = jax.tree.map(jnp.asarray, patches_of(encoder.config, patches, **more))

    @jax.jit
    def outputs(params, patches):
        def total(params):
            found = encoder.encoder.apply(params, **(given | {"patches": patches}))
            real = jnp.where(given["mask"][..., None], found.hidden, 0)
            return (real**2).sum() + found.pooled.sum(), (real, found.pooled)

        return jax.value_and_grad(total, has_aux=True)(params)

    other = np.where(more["pixel_attention_mask"][..., None] == 1, patches, 1e3)
    first, second = (outputs(encoder.params, x) for x in (patches, other))
    for one, another in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(one, another, atol=1e-5 * abs(one).max(), rtol=0)


def test_what_does_not_fit_is_refused(encoder):
    patches, more = batch()
    with pytest.raises(InputError, match="takes pixel_attention_mask and spatial_shapes"):
        encoder.encode(patches)
    with pytest.raises(InputError, match=r"takes \[B, T, 48\]"):
        encoder.encode(patches[..., :-1], **more)
    with pytest.raises(InputError, match=r"they have \(4, 13\) and \(4, 2\)"):
        encoder.encode(patches, **(more | {"pixel_attention_mask": np.ones((4, 13))}))
    for grids in ([[3, 5], *GRIDS[1:]], [[0, 5], *GRIDS[1:]]):
        with pytest.raises(InputError, match="height times width at most the 14 patches"):
            encoder.encode(patches, **(more | {"spatial_shapes": np.array(grids)}))


def test_the_mean_is_of_real_patches():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(3, 6, 8)), rng.random((3, 6)) < 0.6
    config = Transformer(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8)
    dtypes = dtypes_of(Precision(compute="float32"))
    found = pooled("mean", config, dtypes, jnp.asarray(x, jnp.float32), jnp.asarray(mask), 2)
    for row, kept, mean in zip(x[:, 2:], mask[:, 2:], found, strict=True):
        np.testing.assert_allclose(mean, row[kept].mean(0), atol=1e-6)


def test_configs_survive_json():
    config = Transformer(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8)
    for one in (
        NaFlex(transformer=config, pooling="mean"),
        ViT(transformer=config, positions=Axial(theta=100.0), num_registers=4),
        ViT(transformer=config, positions=Learned(antialias=True)),
    ):
        assert from_dict(type(one), json.loads(json.dumps(to_dict(one)))) == one
