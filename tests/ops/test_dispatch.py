"""By hand: where assignments stand when they are sorted, and sums of what comes back."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops import dispatch
from deepseek_jax.ops.dispatch import collected, make_plan, rank, spread

CHOICES = jnp.asarray([[2, 0], [3, 2], [0, 2], [3, 3]], jnp.int32)  # of 3 destinations; 3 is none


@pytest.mark.parametrize("largest", [dispatch.LARGEST, 1])
def test_a_plan_by_hand_with_either_sort(largest, monkeypatch):
    monkeypatch.setattr(dispatch, "LARGEST", largest)
    plan = make_plan(CHOICES, 3)
    np.testing.assert_array_equal(plan.order, [1, 4, 0, 3, 5, 2, 6, 7])
    np.testing.assert_array_equal(plan.place, [[2, 0], [5, 3], [1, 4], [6, 7]])
    np.testing.assert_array_equal(plan.start, [0, 2, 2])
    np.testing.assert_array_equal(plan.counts, [2, 0, 3])
    there = np.asarray(rank(plan, CHOICES))[np.asarray(CHOICES) < 3]
    np.testing.assert_array_equal(there, [0, 0, 1, 1, 2])


def test_sums_of_half_precision_are_made_in_float32():
    y = jnp.asarray([[256.0], *[[1.0]] * 7], jnp.bfloat16)  # bfloat16 has no 257
    place = jnp.arange(8)[None]
    found = collected(y, jnp.zeros(8, jnp.int32), place)
    assert (found.dtype, float(found[0, 0])) == (jnp.bfloat16, 264.0)
    assert spread(found, jnp.asarray([0, 1]), place).tolist() == [[264.0], [0.0]]  # 1: no token
