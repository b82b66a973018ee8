"""Reference: ring attention over zigzag rows against the plain form, forward and backward.

Small blocks, so that a chunk has several, as long rows do.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.ops import ring
from deepseek_jax.ops.attention import causal_attention
from deepseek_jax.parallel.manual import per_device
from deepseek_jax.parallel.mesh import MeshShape, make_mesh

B, T, N, K, H, HV = 2, 48, 4, 2, 6, 5
RNG = np.random.default_rng(0)
Q, KEYS, VALUES, SLOPE = (
    RNG.normal(size=(B, T, n, width)).astype(np.float32)
    for n, width in ((N, H), (K, H), (K, HV), (N, HV))
)
SEGMENTS = np.stack([np.repeat([1, 2, 0], [29, 15, 4]), np.repeat([1, 2, 3], [5, 40, 3])])
SCALE = 0.7


@functools.cache
def plain(window, packed):
    segments = jnp.asarray(SEGMENTS) if packed else None
    options = {"scale": SCALE, "window": window, "implementation": "reference"}
    out, pull = jax.vjp(lambda *x: causal_attention(*x, segments, **options), Q, KEYS, VALUES)
    return out, *pull(jnp.asarray(SLOPE))


@pytest.mark.parametrize(
    ("parts", "window", "packed"), [(2, None, False), (4, 7, True), (8, None, True)]
)
def test_the_ring_is_plain_attention_forward_and_backward(parts, window, packed, monkeypatch):
    monkeypatch.setattr(ring, "BLOCK", 2)
    mesh = make_mesh(MeshShape(data=1, context=parts), jax.devices()[:parts])

    def of_one(segments, *inputs):
        *inputs, segments = (ring.zigzag(x, "context", 1) for x in (*inputs, segments))
        given = segments if packed else None
        out = ring.ring_attention(*inputs, given, "context", SCALE, window)
        return ring.zigzag(out, "context", 1, back=True)

    own = PartitionSpec(None, "context")

    def run(*inputs):
        return per_device(of_one, (own,) * 4, own)(jnp.asarray(SEGMENTS), *inputs)

    def with_slopes(*inputs):
        out, pull = jax.vjp(run, *inputs)
        return out, *pull(jnp.asarray(SLOPE))

    with jax.set_mesh(mesh):
        found = jax.jit(with_slopes)(Q, KEYS, VALUES)
    for mine, other in zip(found, plain(window, packed), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_zigzag_puts_every_chunk_where_its_order_says_and_back():
    mesh = make_mesh(MeshShape(data=1, context=8))
    own = PartitionSpec("context")

    def of_one(x):
        turned = ring.zigzag(x, "context", 0)
        return turned, ring.zigzag_order(len(x), "context"), ring.zigzag(turned, "context", 0, True)

    with jax.set_mesh(mesh):
        turned, order, back = jax.jit(per_device(of_one, (own,), (own,) * 3))(jnp.arange(T))
    np.testing.assert_array_equal(turned, order)
    np.testing.assert_array_equal(back, np.arange(T))
    assert [*turned[:6]] == [0, 1, 2, 45, 46, 47]  # the first chunk and the last
