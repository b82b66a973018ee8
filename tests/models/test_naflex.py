"""Reference: SigLIP2's NaFlex tower against transformers' own. Invariance: padding is nothing."""

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deepseek_jax.core.errors import InputError
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


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"num_patches": 16}, 14),
        ({"num_patches": 49, "hidden_act": "gelu", "vision_use_head": False}, 12),
    ],
    ids=["head", "full-rows"],
)
def test_siglip2(tmp_path, fields, length):
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SHAPE, **fields))
    patches, more = batch(GRIDS if length == 14 else GRIDS[:2], length)
    encoder_cases.agrees(encoder_cases.randomized(model), tmp_path, patches, run, **more)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    config = transformers.Siglip2VisionConfig(**SHAPE, num_patches=16)
    folder = tmp_path_factory.mktemp("siglip2")
    encoder_cases.randomized(transformers.Siglip2VisionModel(config)).save_pretrained(folder)
    return load_encoder(folder)


def test_padding_changes_nothing(encoder):
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
