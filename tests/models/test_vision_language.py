"""Reference: decoders that see, against transformers' DeepSeek-VL and Janus and a NumPy VL2."""

import dataclasses
import json

import cases
import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vision_language_cases as seeing

import deepseek_jax
from deepseek_jax.checkpoint import vision_language
from deepseek_jax.checkpoint.safetensors import Source, open_tensors
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.vision_language import (
    TEXT,
    DownsampleProjector,
    MLPProjector,
    VisionLanguage,
    build_vision_language,
    image_ends,
    joined,
)
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings


@pytest.mark.parametrize("kind", ["deepseek_vl", "janus"])
def test_converted(tmp_path, kind):
    model = seeing.converted(kind)
    model.save_pretrained(tmp_path)
    ours = deepseek_jax.load(tmp_path)
    tokens, mask, pixels = seeing.rows()
    theirs = model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask),
        pixel_values=torch.from_numpy(pixels),
    ).logits
    slopes = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    slopes *= mask[..., None]
    given = jax.tree.map(jnp.asarray, ours.inputs(tokens, pixels))

    def total(params):
        out = ours.model.apply(params, jnp.asarray(tokens), **given, segments=jnp.asarray(mask))
        logits = ours.model.logits(params, out.hidden)
        return jnp.vdot(logits, slopes), logits

    grads, mine = jax.jit(jax.grad(total, has_aux=True))(ours.params)
    real = mask > 0
    theirs_there = theirs.detach().numpy()[real]
    scale = abs(theirs_there).max()
    np.testing.assert_allclose(np.asarray(mine)[real], theirs_there, atol=1e-4 * scale, rtol=0)

    (theirs * torch.from_numpy(slopes)).sum().backward()
    named = encoder_cases.slopes_on_disk(model, tmp_path / "slopes")
    noise = 1e-6 * max(abs(slope).max() for slope in named.values())
    grads = {
        path: Source(x.shape, x.dtype, lambda index, x=x: x[index])
        for path, x in encoder_cases.on_disk(grads, ours.model.layers).items()
    }
    family = vision_language.FAMILIES[kind]
    made = {e.name: e.read() for e in vision_language.entries(family, ours.model, grads)}
    drawn = {name for name in named if name.split(".")[1].startswith(("vq", "generation"))}
    assert made.keys() == named.keys() - drawn
    for name, mine in made.items():
        atol = max(1e-3 * abs(named[name]).max(), noise)
        np.testing.assert_allclose(mine, named[name], atol=atol, rtol=0, err_msg=name)

    original = json.loads((tmp_path / "config.json").read_text())
    vision_language.write(tmp_path / "again", ours.model, ours.params, original)
    other, info = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert {*info["missing_keys"]} <= drawn
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, weight in model.state_dict().items():
        if name not in drawn:
            assert torch.equal(weight, other.state_dict()[name]), name
    assert deepseek_jax.load(tmp_path / "again").config == ours.config


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


@pytest.mark.parametrize("size", seeing.VL2)
def test_vl2(tmp_path, size):
    decoder, weights = seeing.vl2_folder(size, tmp_path)
    ours = deepseek_jax.load(tmp_path)
    tokens, views, embedded = seeing.vl2_rows(weights)
    given = ours.inputs(tokens, views, seeing.GRIDS)
    features = ours.model.features(ours.params, jnp.asarray(given["images"]))
    found = np.take_along_axis(
        np.asarray(features), given["sources"][..., None] % features.shape[1], axis=1
    )
    image = tokens == seeing.IMAGE
    assert (given["sources"] > TEXT).tolist() == image.tolist()
    np.testing.assert_allclose(found[image], embedded[image], atol=1e-5 * abs(embedded).max())
    theirs = seeing.torch_logits(decoder, embedded)
    mine = ours.logits(tokens, images=views, grids=seeing.GRIDS)
    np.testing.assert_allclose(mine, theirs, atol=1e-4 * abs(theirs).max(), rtol=0)

    original = json.loads((tmp_path / "config.json").read_text())
    vision_language.write(tmp_path / "again", ours.model, ours.params, original)
    again = {name: tensor.read() for name, tensor in open_tensors(tmp_path / "again").items()}
    unused = {name for name in weights if "attn_pool" in name}
    assert again.keys() == weights.keys() - unused
    for name, array in again.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    assert deepseek_jax.load(tmp_path / "again").config == ours.config


def test_squares_are_torchs():
    x = np.random.default_rng(0).normal(size=(2, 4 * 6, 5)).astype(np.float32)
    pixels = torch.from_numpy(x).reshape(2, 4, 6, 5).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.unfold(pixels, kernel_size=2, stride=2).permute(0, 2, 1)
    np.testing.assert_array_equal(joined(jnp.asarray(x), (4, 6), 2), theirs.numpy())
