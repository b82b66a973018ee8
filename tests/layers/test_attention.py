"""Invariance: what a cache keeps and shows; impossible configs are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.attention import GQA, cache_mask, write_cache
from deepseek_jax.layers.mla import MLA

LATENT = {"num_heads": 2, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}


def test_a_cache_is_written_at_each_tokens_position():
    """Padding (-1) and positions past the end are written nowhere, the last slot included."""
    cache = jnp.full((2, 4, 1), -7.0)
    values = jnp.arange(1.0, 7).reshape(2, 3, 1)
    positions = jnp.asarray([[2, 0, -1], [3, 4, 9]])
    written = write_cache(cache, values, positions)[..., 0]
    np.testing.assert_array_equal(written, [[2, -7, 1, -7], [-7, -7, -7, 4]])
    assert write_cache(cache.astype(jnp.bfloat16), values, positions).dtype == jnp.bfloat16


def test_a_token_sees_the_slots_up_to_its_own_within_the_window():
    positions = jnp.asarray([[0, 3], [-1, 2]])
    mask = cache_mask(positions, 4).astype(int)
    np.testing.assert_array_equal(
        mask, [[[1, 0, 0, 0], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 0]]]
    )
    mask = cache_mask(positions, 4, window=2).astype(int)
    np.testing.assert_array_equal(
        mask, [[[1, 0, 0, 0], [0, 0, 1, 1]], [[0, 0, 0, 0], [0, 1, 1, 0]]]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        ({"num_kv_heads": 8}, "multiple"),
        ({"num_kv_heads": 0}, "at least 1"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"window": 0}, "window is 0"),
        ({"window": -3}, "window is -3"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_an_impossible_gqa_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GQA(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 0}, "at least 1"),
        ({"kv_rank": 0}, "at least 1"),
        ({"q_rank": 0}, "at least 1"),
        ({"value_dim": -1}, "at least 1"),
        ({"rope_dim": 3}, r"rope_dim \(3\) must be even"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ],
)
def test_an_impossible_mla_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MLA(**(LATENT | fields))
