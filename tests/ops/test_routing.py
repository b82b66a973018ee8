"""Reference: choices, weights and balance losses against the NumPy model and numbers by hand."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from deepseek_jax.ops import routing

RNG = np.random.default_rng(0)
B, T, E = 3, 50, 8
LOGITS = RNG.normal(0, 1.5, (B, T, E)).astype(np.float32)
BIAS = RNG.normal(0, 0.3, E).astype(np.float32)
GROUPS = RNG.normal(0, 1.5, (B, T, 4)).astype(np.float32)
VALID = np.arange(T)[None] < np.array([[T], [20], [0]])


def chosen_by(config, logits):
    """The package's function for a router config."""
    kind = type(config).__name__
    if kind == "Hierarchical":
        groups = jnp.asarray(GROUPS[..., : config.num_groups])
        return routing.hierarchical_routes(config, logits, groups)
    if kind == "Softmax":
        return routing.softmax_routes(config, logits)
    return routing.sigmoid_routes(config, logits, jnp.asarray(BIAS))


def expected_of(config):
    """The reference's route, fed these very logits through an identity weight."""
    x = np.concatenate([LOGITS, GROUPS], -1).astype(np.float64)
    weight, groups = np.eye(E + 4)[:, :E], np.eye(E + 4)[:, E : E + config.num_groups]
    return reference.route(x, {"weight": weight, "groups": groups, "bias": BIAS}, config)


MORE = {
    "hierarchical_pairs": dataclasses.replace(
        cases.ROUTERS["hierarchical"], num_active_groups=2, num_active_experts=4, normalize=True
    ),
    "hierarchical_four": dataclasses.replace(
        cases.ROUTERS["hierarchical"], num_groups=4, num_active_groups=2
    ),
    "all_experts": dataclasses.replace(cases.ROUTERS["sigmoid"], num_active_experts=8),
    "all_groups": dataclasses.replace(
        cases.ROUTERS["softmax_grouped"], num_active_groups=4, normalize=True
    ),
    "one": dataclasses.replace(cases.ROUTERS["softmax"], num_active_experts=1, normalize=True),
}
ROUTERS = cases.ROUTERS | MORE


@pytest.mark.parametrize("name", ROUTERS)
def test_routes_are_the_reference(name):
    config = ROUTERS[name]
    routes = chosen_by(config, jnp.asarray(LOGITS))
    ids, weights, distribution, _, margin = expected_of(config)
    assert margin > 1e-6
    order, expected_order = (np.argsort(x, -1) for x in (routes.experts, ids))
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(routes.experts), order, -1),
        np.take_along_axis(ids, expected_order, -1),
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(routes.weights), order, -1),
        np.take_along_axis(weights, expected_order, -1),
        rtol=2e-5,
    )
    np.testing.assert_allclose(routes.probabilities, distribution, rtol=2e-5)
    np.testing.assert_allclose(routes.probabilities.sum(-1), 1, rtol=1e-5)
    assert routes.experts.dtype == jnp.int32
    if config.normalize:
        np.testing.assert_allclose(routes.weights.sum(-1), config.scale, rtol=1e-5)


def test_group_limits_hold():
    """No token leaves its groups: V2 and V3 limit how many devices a token visits this way."""
    for name in ("softmax_grouped", "sigmoid_grouped"):
        config = ROUTERS[name]
        ids = np.asarray(chosen_by(config, jnp.asarray(LOGITS)).experts)
        visited = [len(set(token)) for token in (ids // 2).reshape(-1, ids.shape[-1])]
        assert max(visited) <= config.num_active_groups


def test_excluded_groups_never_win():
    """Also where every biased score is negative: what is excluded counts as -inf, not as 0."""
    router = routing.Sigmoid(num_active_experts=2, normalize=False, num_groups=4)
    even, low = (
        routing.sigmoid_routes(router, jnp.asarray(LOGITS), jnp.full(E, bias)).experts
        for bias in (0.0, -5.0)
    )
    np.testing.assert_array_equal(np.sort(even, -1), np.sort(low, -1))
    assert (np.asarray(low)[..., 0] // 2 == np.asarray(low)[..., 1] // 2).all()


def test_v3_weights_come_from_unbiased_scores():
    logits = jnp.zeros((1, 1, 4))
    bias = jnp.asarray([0.0, 0.3, 0.2, -1.0])
    router = routing.Sigmoid(num_active_experts=2, normalize=False)
    routes = routing.sigmoid_routes(router, logits, bias)
    assert routes.experts.tolist() == [[[1, 2]]]
    np.testing.assert_allclose(routes.weights, 0.5)


def test_extreme_logits_stay_finite():
    logits = jnp.asarray(LOGITS) * 1e4
    for config in cases.ROUTERS.values():

        def loss(logits, config=config):
            routes = chosen_by(config, logits)
            return routes.weights.sum() + (routes.probabilities**2).sum()

        value, gradient = jax.value_and_grad(loss)(logits)
        assert np.isfinite(value), config
        assert np.isfinite(gradient).all(), config


def balanced(num_active):
    """Ids that load every expert alike, and a flat distribution."""
    ids = (np.arange(16 * num_active) % E).reshape(1, 16, num_active)
    return jnp.asarray(ids, jnp.int32), jnp.full((1, 16, E), 1 / E), jnp.ones((1, 16), bool)


def test_even_load_costs_one_and_collapse_costs_more():
    """V3's equations 17 to 20: f_i = 1 and P_i = 1/E for every expert, so the sum is 1."""
    ids, flat, valid = balanced(2)
    counts = routing.expert_counts(ids, valid, E)
    assert float(routing.sequence_loss(counts, flat, valid, 2)) == pytest.approx(1)
    assert float(routing.uniform_loss(flat, valid)) == pytest.approx(0, abs=1e-6)
    assert float(routing.entropy(flat, valid)) == pytest.approx(16)
    collapsed = jax.nn.one_hot(jnp.zeros((1, 16), jnp.int32), E)
    counts = routing.expert_counts(jnp.zeros((1, 16, 1), jnp.int32), valid, E)
    assert float(routing.sequence_loss(counts, collapsed, valid, 1)) == pytest.approx(E)
    assert float(routing.uniform_loss(collapsed, valid)) == pytest.approx(np.log(E), rel=1e-5)
    assert float(routing.entropy(collapsed, valid)) == pytest.approx(0, abs=1e-6)


def test_losses_are_the_reference_with_padding_and_empty_rows():
    config = ROUTERS["sigmoid"]
    routes = chosen_by(config, jnp.asarray(LOGITS))
    valid = jnp.asarray(VALID)
    counts = routing.expert_counts(routes.experts, valid, E)
    ids, _, distribution, _, _ = expected_of(config)
    expected = [[((ids[b] == e) & VALID[b][:, None]).sum() for e in range(E)] for b in range(B)]
    np.testing.assert_array_equal(counts, expected)
    loss = 0.0
    for b in range(2):  # the third row is empty
        length = VALID[b].sum()
        f = np.array(expected[b]) * E / (2 * length)
        loss += (f * distribution[b, :length].mean(0)).sum()
    ours = routing.sequence_loss(counts, routes.probabilities, valid, 2)
    assert float(ours) == pytest.approx(loss, rel=1e-5)
    mean = distribution[VALID].mean(0)
    ours = routing.uniform_loss(routes.probabilities, valid)
    assert float(ours) == pytest.approx((mean * np.log(mean * E)).sum(), rel=1e-4)
    z = (reference.logsumexp(LOGITS.astype(np.float64))[VALID] ** 2).sum()
    assert float(routing.z_loss(jnp.asarray(LOGITS), valid)) == pytest.approx(z, rel=1e-5)


def test_a_batch_of_padding_gives_zeros_not_nan():
    valid = jnp.zeros((B, T), bool)

    def loss(logits):
        routes = chosen_by(ROUTERS["sigmoid"], logits)
        counts = routing.expert_counts(routes.experts, valid, E)
        return (
            routing.sequence_loss(counts, routes.probabilities, valid, 2)
            + routing.uniform_loss(routes.probabilities, valid)
            + routing.z_loss(logits, valid)
            + routing.entropy(routes.probabilities, valid)
        )

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOGITS))
    assert float(value) == 0
    assert not np.asarray(gradient).any()
