"""Reference: resizing against torch's interpolate, sines and rotations against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

from deepseek_jax.ops import grid
from deepseek_jax.ops.rope import rotate

RNG = np.random.default_rng(0)
# No new width of 1: there torch 2.13 on CPU, antialiasing, repeats the first row.
SIZES = [
    ((4, 4), (4, 4)),
    ((4, 6), (9, 5)),
    ((7, 5), (2, 13)),
    ((16, 16), (1, 3)),
    ((1, 2), (5, 3)),
]


def interpolated(x, size, **how):
    images = x.permute(2, 0, 1)[None]
    made = torch.nn.functional.interpolate(images, size=size, align_corners=False, **how)
    return made[0].permute(1, 2, 0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resizing_is_torchs(method, antialias):
    for old, new in SIZES:
        x = RNG.normal(size=(*old, 3)).astype(np.float32)
        slope = RNG.normal(size=(*new, 3)).astype(np.float32)
        theirs = torch.from_numpy(x).requires_grad_()
        wanted = interpolated(theirs, new, mode=method, antialias=antialias)
        wanted.backward(torch.from_numpy(slope))

        def both(x, slope, size=new):
            found, back = jax.vjp(lambda x: grid.resized(x, size, method, antialias), x)
            return found, back(slope)[0]

        found, grad = jax.jit(both)(x, slope)
        np.testing.assert_allclose(found, wanted.detach(), atol=3e-6, rtol=0)
        np.testing.assert_allclose(grad, theirs.grad, atol=2e-5, rtol=0)
        if old == new:
            np.testing.assert_array_equal(found, x)


def test_each_row_has_its_own_size():
    x, length = RNG.normal(size=(4, 4, 3)).astype(np.float32), 12
    shapes = np.array([[3, 4], [1, 12], [5, 2], [1, 1]])
    found = jax.jit(lambda s: grid.resized_each(jnp.asarray(x), s, length, "bilinear"))(shapes)
    for row, (height, width) in zip(np.asarray(found), shapes.tolist(), strict=True):
        how = {"mode": "bilinear", "antialias": True}
        wanted = interpolated(torch.from_numpy(x), (height, width), **how).reshape(-1, 3).numpy()
        np.testing.assert_allclose(row[: len(wanted)], wanted, atol=3e-6, rtol=0)
        for rest in row[len(wanted) :]:
            np.testing.assert_array_equal(rest, row[0])


def test_sines():
    found = grid.sines((3, 5), 16, 10_000.0)
    for place in range(15):
        row, column = divmod(place, 5)
        for half, at in enumerate([column, row]):
            for i in range(4):
                angle = np.float64(at) / 10_000.0 ** (i / 4)
                first = half * 8 + i
                np.testing.assert_allclose(found[place, first], np.sin(angle), atol=1e-7)
                np.testing.assert_allclose(found[place, first + 4], np.cos(angle), atol=1e-7)


def test_rotations():
    rows, columns = np.divmod(np.arange(15)[None].repeat(2, 0), 5)
    x = RNG.normal(size=(2, 15, 3, 8))
    cosine, sine = grid.axial_rotation(jnp.asarray(rows), jnp.asarray(columns), 8, 100.0)
    found = rotate(jnp.asarray(x, jnp.float32), cosine, sine)
    frequencies = 100.0 ** -np.array([0, 0.5])
    angles = np.concatenate([rows[..., None] * frequencies, columns[..., None] * frequencies], -1)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    wanted = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(found, wanted, atol=2e-6)

    config = qwen.Qwen2VLVisionConfig(
        embed_dim=24, num_heads=3, rope_parameters={"rope_type": "axial", "rope_theta": 100.0}
    )
    config.num_attention_heads = 3
    places = torch.from_numpy(np.stack([rows[0], columns[0]]))
    theirs = qwen.Qwen2VLVisionRotaryEmbedding(config)(places, places[None])
    query = torch.from_numpy(x[0]).float()
    other, _ = qwen.apply_rotary_pos_emb_vision(query, query, *(part[0] for part in theirs))
    np.testing.assert_allclose(found[0], other, atol=2e-6)
