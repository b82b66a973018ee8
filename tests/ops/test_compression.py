"""Oracle and invariants: int4 blocks against NumPy, and that nothing of a sum is ever lost."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.ops.compression import BLOCK, GROUP, WIRE, packed, summed, unpacked, wire_bytes
from deepseek_jax.parallel.manual import per_device
from deepseek_jax.parallel.mesh import MeshShape, make_mesh


def rounded(x):
    """NumPy's: each block's values at multiples of its scale, -7 to 7 of them."""
    blocks = np.asarray(x, np.float32).reshape(-1, BLOCK)
    scale = (np.abs(blocks).max(1, keepdims=True) / np.float32(7)).astype(ml_dtypes.bfloat16)
    scale = scale.astype(np.float32)
    steps = np.divide(blocks, scale, where=scale > 0, out=np.zeros_like(blocks))
    return (np.clip(np.rint(steps), -7, 7) * scale).reshape(np.shape(x))


def test_blocks_are_numpys():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 3 * GROUP)) * 10.0 ** rng.integers(-20, 20, (5, 3, 1))
    x = x.astype(np.float32)
    wire = packed(jnp.array(x))
    assert wire.dtype == jnp.uint8
    assert wire.shape == (5, 3, 3 * WIRE)
    np.testing.assert_array_equal(unpacked(wire), rounded(x))
    nothing = jnp.zeros(GROUP)
    np.testing.assert_array_equal(unpacked(packed(nothing)), nothing)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(wrong):
    x = jnp.ones(GROUP).at[3].set(wrong)
    found = np.asarray(unpacked(packed(x)))
    assert np.isnan(found[:BLOCK]).all()
    np.testing.assert_allclose(found[BLOCK:], 1, rtol=1e-2)


def on_slices(count, x, left_out):
    with jax.set_mesh(make_mesh(MeshShape(slice=count, data=1), jax.devices()[:count])):
        return program()(x, left_out)


@functools.cache
def program():
    spec = PartitionSpec("slice")

    def of_device(x, left):
        total, left = summed(x[0], left[0], "slice")
        return total[None], left[None]

    return jax.jit(lambda *given: per_device(of_device, (spec, spec), (spec, spec))(*given))


@pytest.mark.parametrize(("count", "shape"), [(2, (3, 50)), (4, (513,)), (8, (2, 2))])
def test_a_sum_and_what_it_left_out_are_what_was_added(count, shape):
    x = np.random.default_rng(1).standard_normal((count, *shape)).astype(np.float32)
    left = np.random.default_rng(2).standard_normal((count, *shape)).astype(np.float32)
    total, rest = map(np.asarray, on_slices(count, jnp.array(x), jnp.array(left)))
    for other in total[1:]:
        np.testing.assert_array_equal(other, total[0])
    given = (x.astype(np.float64) + left).sum(0)
    np.testing.assert_allclose(total[0] + rest.sum(0), given, atol=1e-5)
    # Every share is rounded once, and their sum again; each by half a step.
    step = (np.abs(x + left).max() * count + np.abs(given).max()) / 7
    assert 0 < np.abs(total[0] - given).max() <= step


def test_over_many_steps_everything_arrives():
    """The same small values beside a large one in their block: rounded to nothing, yet they add
    up; without what was left out they never would."""
    x = np.full((2, BLOCK * 2), 0.01, np.float32)
    x[:, 0] = 1.0
    left, sent, steps = jnp.zeros(x.shape), 0.0, 200
    for _ in range(steps):
        total, left = on_slices(2, jnp.array(x), left)
        sent = sent + np.asarray(total[0], np.float64)
    np.testing.assert_allclose(sent / steps, x.sum(0), rtol=0.1)
    alone = np.asarray(on_slices(2, jnp.array(x), jnp.zeros(x.shape))[0][0])
    assert (alone[1:BLOCK] == 0).all()


def test_the_wire_has_seven_and_a_half_times_fewer_bytes():
    assert 4 * 2**20 / wire_bytes(2**20, 2) == pytest.approx(32 / 4.25)
    assert wire_bytes(1, 4) == 4 * 136, "what fills up groups counts"
