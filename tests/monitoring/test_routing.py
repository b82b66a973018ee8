"""Reference: router telemetry against plain NumPy, and at its extremes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.monitoring.routing import router_metrics


class Routing(NamedTuple):
    counts: jax.Array
    dropped: jax.Array
    tokens: jax.Array
    entropy: jax.Array


def block(counts, dropped=None, tokens=None, entropy=None):
    counts = jnp.asarray(counts, jnp.int32)
    rows = counts.shape[0]
    return Routing(
        counts,
        jnp.zeros(rows, jnp.int32) if dropped is None else jnp.asarray(dropped, jnp.int32),
        jnp.full(rows, 10, jnp.int32) if tokens is None else jnp.asarray(tokens, jnp.int32),
        jnp.zeros(rows) if entropy is None else jnp.asarray(entropy, jnp.float32),
    )


def measured(routing):
    return {name: float(value) for name, value in jax.jit(router_metrics)(routing).items()}


def test_against_numpy():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 9, (3, 8)), rng.integers(0, 9, (1, 8))
    first[1, 2] = second[0, :3] = 0
    entropy = rng.uniform(0, 10, 4)
    found = measured(
        {
            "segment_1/block": block(first, [1, 0, 4], [10, 20, 30], entropy[:3]),
            "mtp_0/block": block(second, [2], [5], entropy[3:]),
        }
    )
    counts = np.concatenate([first, second]).astype(np.float64)
    share = counts / counts.mean(1, keepdims=True)
    expected = {
        "router/max_violation": np.mean(share.max(1) - 1),
        "router/entropy": np.mean(entropy / [10, 20, 30, 5]),
        "router/utilization_std": np.mean(share.std(1)),
        "router/dead_experts": (counts == 0).sum(),
        "router/dropped_fraction": 7 / (counts.sum() + 7),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_even_load():
    found = measured({"a": block(np.full((2, 4), 5), entropy=[10, 10])})
    assert found.pop("router/entropy") == 1
    assert list(found.values()) == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_one_expert_takes_all():
    found = measured({"a": block([[8, 0, 0, 0]], dropped=[8])})
    assert found["router/max_violation"] == 3 and found["router/dead_experts"] == 3
    assert found["router/dropped_fraction"] == 0.5
    assert found["router/utilization_std"] == pytest.approx(3**0.5)


def test_nothing_dispatched_is_finite():
    found = measured({"a": block(np.zeros((1, 4)), tokens=[0])})
    assert found["router/max_violation"] == 0 and found["router/dead_experts"] == 4
    assert np.isfinite(list(found.values())).all()


def test_counts_beyond_32_bits_in_sum():
    found = measured({"a": block(np.full((1, 4), 2_000_000_000), dropped=[2_000_000_000])})
    assert found["router/dropped_fraction"] == pytest.approx(0.2)
    assert found["router/max_violation"] == pytest.approx(0, abs=1e-6)


def test_without_experts():
    assert router_metrics({}) == {}
