"""Reference: rotary positions and YaRN against transformers' functions and published constants."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deepseek_jax.ops.rope import Yarn, inverse_frequencies, rotate, rotation, softmax_factor

YARNS = {
    "v3": (64, 10000.0, Yarn(factor=40.0, original_length=4096)),
    "v2": (
        64,
        10000.0,
        Yarn(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
    ),
    "odd": (16, 500.0, Yarn(factor=8.0, original_length=64, mscale=0.6, mscale_all_dim=0.9)),
    "narrow": (8, 100.0, Yarn(factor=4.0, original_length=32, beta_fast=2.0, beta_slow=2.0)),
}


def theirs(dim, theta, yarn):
    """transformers' inverse frequencies and the factor on cosine and sine."""
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": yarn.factor}
    rope |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "mscale": yarn.mscale}
    rope |= {
        "mscale_all_dim": yarn.mscale_all_dim,
        "original_max_position_embeddings": yarn.original_length,
    }
    length = int(yarn.factor * yarn.original_length)
    config = transformers.LlamaConfig(
        head_dim=dim, rope_parameters=rope, max_position_embeddings=length
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    return frequencies.numpy(), factor


@pytest.mark.parametrize("name", YARNS)
def test_yarn_is_that_of_transformers(name):
    dim, theta, yarn = YARNS[name]
    frequencies, factor = theirs(dim, theta, yarn)
    np.testing.assert_allclose(inverse_frequencies(dim, theta, yarn), frequencies, rtol=1e-6)
    positions = jnp.arange(0, 40, 3)[None]
    cosine, sine = rotation(positions, dim, theta, yarn)
    angles = np.asarray(positions)[..., None] * frequencies.astype(np.float64)
    np.testing.assert_allclose(cosine, np.cos(angles) * factor, atol=1e-5)
    np.testing.assert_allclose(sine, np.sin(angles) * factor, atol=1e-5)


def test_without_yarn_frequencies_are_powers_of_theta():
    ours = inverse_frequencies(16, 10000.0, None)
    np.testing.assert_allclose(ours, 10000.0 ** -(np.arange(8) / 8), rtol=1e-12)


def test_softmax_factors_are_the_released_models():
    """DeepSeek-V3 scales scores by 0.1352338, V2 by 0.1147214, where 192^-0.5 is 0.0721688."""
    v3, v2 = YARNS["v3"][2], YARNS["v2"][2]
    assert 192**-0.5 * softmax_factor(v3) == pytest.approx(0.1352338, rel=1e-6)
    assert 192**-0.5 * softmax_factor(v2) == pytest.approx(0.1147214, rel=1e-6)
    assert softmax_factor(None) == 1
    assert softmax_factor(Yarn(factor=40.0, original_length=4096, mscale_all_dim=0.0)) == 1


def test_halves_turn_as_in_llama():
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 8)).astype(np.float32)
    positions = np.random.default_rng(1).integers(0, 5000, (2, 7))
    cosine, sine = rotation(jnp.asarray(positions), 8, 10000.0, None)
    heads_first = torch.tensor(x).swapaxes(1, 2)
    tables = (torch.tensor(np.concatenate([t, t], -1)) for t in (cosine, sine))
    expected = apply_rotary_pos_emb(heads_first, heads_first, *tables)[0].swapaxes(1, 2)
    np.testing.assert_allclose(rotate(jnp.asarray(x), cosine, sine), expected, atol=1e-6)


def test_interleaved_pairs_turn_as_in_deepseek():
    """Ours come out as halves: the same numbers in another order, so products agree."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, 7, 3, 8)).astype(np.float32) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 5000, (2, 7)))
    cosine, sine = rotation(positions, 8, 10000.0, None)
    complexes = torch.polar(
        torch.ones(2, 7, 4), torch.atan2(*map(torch.tensor, (np.array(sine), np.array(cosine))))
    )
    heads_first = (torch.tensor(x).swapaxes(1, 2) for x in (q, k))
    expected = [x.swapaxes(1, 2).numpy() for x in apply_rotary_emb(*heads_first, complexes)]
    ours = [np.asarray(rotate(jnp.asarray(x), cosine, sine, interleaved=True)) for x in (q, k)]
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine[..., :4], other[..., ::2], atol=1e-5)
        np.testing.assert_allclose(mine[..., 4:], other[..., 1::2], atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distance_alone(interleaved):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(query, key):
        turned = [
            rotate(x, *rotation(jnp.full((1, 1), at), 8, 100.0, None), interleaved)
            for x, at in ((q, query), (k, key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_rotation_keeps_the_dtype_and_turns_in_float32():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    cosine, sine = rotation(jnp.full((1, 1), 3), 4, 10.0, None)
    out = rotate(x, cosine, sine)
    assert out.dtype == jnp.bfloat16
    assert cosine.dtype == jnp.float32
    assert float(out[0, 0, 0, 0]) == pytest.approx(math.cos(3) - math.sin(3), abs=0.01)


@pytest.mark.parametrize(
    "fields", [{"factor": 0.5}, {"original_length": 0}, {"beta_fast": 1.0, "beta_slow": 2.0}]
)
def test_an_impossible_yarn_is_refused(fields):
    with pytest.raises(ValueError, match=r"yarn\.factor"):
        Yarn(**({"factor": 4.0, "original_length": 32} | fields))
