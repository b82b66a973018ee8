"""Invariance: what a cache keeps and shows; impossible configs are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.attention import GQA, Place, attend, cache_mask, write_cache
from deepseek_jax.layers.mla import MLA
from deepseek_jax.ops.attention import causal_attention
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import heads_spec

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


@pytest.mark.parametrize("packed", [True, False])
def test_a_kernel_runs_on_each_devices_own_rows_and_heads(packed, monkeypatch):
    """The TPU's kernel, interpreted, on a mesh: it is no program that XLA could split."""
    for module in ("layers", "ops"):
        monkeypatch.setattr(f"deepseek_jax.{module}.attention.preferred", lambda q: "splash")
    rng = np.random.default_rng(0)
    shapes = [(4, 128, n, w) for n, w in ((4, 24), (2, 24), (2, 16), (4, 16))]
    *inputs, slope = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    segments = jnp.repeat(jnp.array([[1, 2, 0]] * 4), jnp.array([50, 70, 8]), axis=1)
    given = segments if packed else None

    def run(function, **options):
        out, pull = jax.vjp(lambda *x: function(*x, given, scale=0.2, **options), *inputs)
        return out, *pull(slope)

    plain = run(causal_attention, implementation="reference")
    with jax.set_mesh(make_mesh(MeshShape(fsdp=2, data=2, tensor=2))):

        def placed(q, k, v, segments, **options):
            return attend(q, k, v, Place(None, None, segments), **options)

        program = jax.jit(lambda: run(placed))
        assert "shard_map" in str(jax.make_jaxpr(program)())
        for mine, other in zip(program(), plain, strict=True):
            np.testing.assert_allclose(mine, other, atol=2e-5)


@pytest.mark.parametrize("axes", [{"context": 2, "data": 4}, {"tensor": 4, "data": 2}, {"data": 8}])
def test_where_sequences_rows_or_heads_do_not_split_evenly_no_kernel_runs(axes, monkeypatch):
    for module in ("layers", "ops"):
        monkeypatch.setattr(f"deepseek_jax.{module}.attention.preferred", lambda q: "splash")
    q, k, v = (jnp.zeros((4, 128, n, 16)) for n in (4, 2, 2))

    def program():
        return jax.make_jaxpr(lambda: attend(q, k, v, Place(None, None), scale=1.0))()

    with jax.set_mesh(make_mesh(MeshShape(**axes))):
        assert heads_spec(4, 4, 2) is None
        assert "pallas_call" not in str(program())
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        assert "pallas_call" in str(program())
