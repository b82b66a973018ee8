"""Reference and invariance: placements against planted clusters, brute force and bounds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.core.errors import InputError
from deepseek_jax.ops.experts import routed_experts
from deepseek_jax.ops.placement import (
    Devices,
    _Search,
    clustered,
    packed,
    replicated,
    slots_of,
    traffic,
)
from deepseek_jax.ops.routing import coactivation


def routes(seed, num_tokens, num_experts, num_active, home=None):
    """Different experts [N, A]; with `home` [E], those of one of its sets each."""
    rng = np.random.default_rng(seed)
    keys = rng.random((num_tokens, num_experts))
    if home is not None:
        keys += home != rng.integers(0, home.max() + 1, num_tokens)[:, None]
    return keys.argsort(1)[:, :num_active]


def test_coactivation_is_counted_token_by_token():
    chosen = routes(0, 50, 6, 3)
    chosen[::7, 1:] = 6  # none
    expected = np.zeros((6, 6), int)
    for token in chosen:
        for a, b in itertools.product(token[token < 6], repeat=2):
            expected[a, b] += 1
    found = jax.jit(coactivation, static_argnums=1)(jnp.asarray(chosen.reshape(5, 10, 3)), 6)
    np.testing.assert_array_equal(found, expected)


def test_traffic_counts_each_device_and_node_once():
    devices = Devices(num_devices=4, num_nodes=2)
    chosen = np.array([[0, 1, 2], [0, 2, 4], [6, 7, 0], [5, 3, 1]])  # 2, 3, 2 and 3 devices
    cost = traffic(chosen, np.arange(8), devices)
    assert cost == (10 / 4, (1 + 2 + 2 + 2) / 4, 5 / 3)
    assert traffic(chosen[:0], np.arange(8), devices)[:2] == (1, 1)


def test_copies_serve_tokens_in_turn_and_the_output_is_the_same():
    """Experts' weights taken by slot, tokens sent to slots: what routed_experts gives without."""
    rng = np.random.default_rng(0)
    chosen, slots = routes(0, 40, 4, 2), np.array([2, 0, 1, 2, 3, 2])
    served = slots_of(chosen, slots)
    np.testing.assert_array_equal(slots[served], chosen)
    where = np.argwhere(chosen == 2)[:, 0]
    expected = np.array([0, 3, 5])[where % 3]
    np.testing.assert_array_equal(served[chosen == 2], expected)
    x, weights = (rng.normal(size=(40, n)).astype(np.float32) for n in (8, 2))
    leaves = [rng.normal(size=s).astype(np.float32) for s in ((4, 8, 6), (4, 8, 6), (4, 6, 8))]
    plain = routed_experts(*map(jnp.asarray, (x, chosen.astype(np.int32), weights, *leaves)))[0]
    copied = (x, served.astype(np.int32), weights, *(leaf[slots] for leaf in leaves))
    np.testing.assert_allclose(routed_experts(*map(jnp.asarray, copied))[0], plain, rtol=1e-5)
    with pytest.raises(InputError, match="lacks experts"):
        slots_of(chosen, np.array([0, 1, 2, 2]))


@pytest.mark.parametrize(("num_groups", "num_nodes"), [(1, 1), (1, 2), (4, 2), (2, 4)])
def test_planted_clusters_are_found(num_groups, num_nodes):
    """Every token's experts have one home; shuffled, they find each other again."""
    devices, rng = Devices(num_devices=8, num_nodes=num_nodes), np.random.default_rng(1)
    size = 32 // num_groups
    blocks = rng.permuted(np.arange(32).reshape(num_groups, size), axis=1)
    hidden = blocks[rng.permutation(num_groups)].reshape(-1)
    home = np.empty(32, int)
    home[hidden] = np.arange(32) // 4
    chosen = routes(2, 2000, 32, 3, home)
    pairs = np.asarray(coactivation(jnp.asarray(chosen), 32))
    order = clustered(pairs, devices, num_groups=num_groups)
    before, after = (traffic(chosen, slots, devices) for slots in (np.arange(32), order))
    assert after.devices == after.nodes == 1 < before.devices
    assert after.imbalance < 1.15


def test_whole_groups_change_places_where_that_is_all_that_can():
    """Two experts a group, one group a device, two devices a node: groups i and i + 8 match."""
    home = np.tile(np.repeat(np.arange(8), 2), 2)
    chosen = routes(0, 1000, 32, 4, home)
    devices = Devices(num_devices=16, num_nodes=8)
    pairs = np.asarray(coactivation(jnp.asarray(chosen), 32))
    order = clustered(pairs, devices, num_groups=16)
    assert traffic(chosen, np.arange(32), devices).nodes > 1.9
    assert traffic(chosen, order, devices).nodes == 1


def test_what_a_swap_gains_is_what_it_changes():
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 50, (12, 12))
    group, devices = np.arange(12) // 4, Devices(num_devices=6, num_nodes=2)
    search = _Search.of((pairs + pairs.T).astype(float), devices, group, 1.0)
    order = rng.permutation(12)
    gains = search._gains(search._devices(order))
    for a, b in itertools.combinations(range(12), 2):
        other = order.copy()
        other[[a, b]] = order[[b, a]]
        change = search.worth(other) - search.worth(order)
        assert gains[order[a], order[b]] == pytest.approx(change, abs=1e-6)


def test_a_cluster_of_hot_experts_is_torn_apart():
    """Four experts fire together and take 16 times the others' tokens: the limit comes first."""
    hot = routes(0, 1600, 4, 2)
    chosen = np.concatenate([hot, routes(1, 400, 16, 2)])
    pairs = np.asarray(coactivation(jnp.asarray(chosen), 16))
    devices = Devices(num_devices=4)
    even = traffic(chosen, clustered(pairs, devices), devices)
    crowded = traffic(chosen, clustered(pairs, devices, slack=99.0), devices)
    assert even.imbalance < 1.1 and crowded.devices < even.devices and crowded.imbalance > 3


SHAPES = st.tuples(
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3)]),  # devices, nodes
    st.sampled_from([1, 2, 3, 4]),  # groups
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 10**6),
)


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_placements_keep_their_promises(shape):
    (num_devices, num_nodes), num_groups, each, spare, seed = shape
    devices = Devices(num_devices=num_devices, num_nodes=num_nodes)
    num_experts = int(np.lcm(num_devices, num_groups)) * each
    num_active = min(3, num_experts)
    chosen = routes(seed, 30, num_experts, num_active)
    pairs = np.asarray(coactivation(jnp.asarray(chosen), num_experts))
    order = clustered(pairs, devices, num_groups=num_groups)
    assert sorted(order) == list(range(num_experts))
    groups = order.reshape(num_groups, -1) // (num_experts // num_groups)
    assert (groups == groups[:, :1]).all()
    search = _Search.of(pairs.astype(float), devices, np.zeros(num_experts, int), 1.1)
    assert search.worth(order) >= search.worth(np.arange(num_experts)) - 1e-9
    num_slots = num_experts + spare * num_devices
    load = np.diag(pairs) + 0.5
    slots = replicated(load, num_slots, devices, num_groups=num_groups)
    assert len(slots) == num_slots and set(slots) == set(range(num_experts))
    if num_groups % num_nodes == 0 and num_nodes > 1:  # a group lies in one node
        node = devices.nodes(devices.of_slots(num_slots))
        owner = {}
        for expert, where in zip(slots // (num_experts // num_groups), node, strict=True):
            assert owner.setdefault(expert, where) == where


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=6, max_size=8), st.integers(0, 4), st.booleans())
def test_copies_and_packing_are_close_to_the_best_there_is(load, spare, three):
    """The busiest replica is as small as it can be; the busiest device at most 4/3 of the least."""
    load = np.array(load[:6] if three else load[: len(load) // 2 * 2], float)
    num_devices = 3 if three else 2
    num_slots = len(load) + spare * num_devices
    slots = replicated(load, num_slots, Devices(num_devices=num_devices))
    copies = np.bincount(slots)
    busiest = (load / copies).max()
    # With every replica below `busiest`, more slots would be needed than there are.
    assert np.floor(load / busiest * (1 + 1e-12) + 1).sum() > num_slots
    bins = packed(load, num_devices)
    assert (np.bincount(bins) == len(load) // num_devices).all()
    ways = map(np.array, set(itertools.permutations(np.sort(bins[:6]).tolist())))
    if len(load) == 6:
        best = min(np.bincount(way, load).max() for way in ways)
        assert np.bincount(bins, load).max() <= best * 4 / 3 + 1e-9


def test_replicas_even_out_what_moving_cannot():
    load = np.array([900.0, *np.full(15, 100.0)])
    devices = Devices(num_devices=4)

    def imbalance(slots):
        each = (load / np.bincount(slots))[slots].reshape(4, -1).sum(1)
        return each.max() / each.mean()

    assert imbalance(np.arange(16)) == imbalance(replicated(load, 16, devices)) == 2
    assert imbalance(replicated(load, 20, devices)) < 1.11


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Devices(num_devices=6, num_nodes=4), "6 devices are not shared out .* 4 nodes"),
        (lambda: Devices(num_devices=0), "0 devices"),
        (lambda: Devices(num_devices=3).of_slots(8), "8 experts are not .* 3 devices"),
        (lambda: replicated(np.ones(8), 4, Devices(num_devices=4)), "4 slots are too few for 8"),
        (lambda: replicated(np.ones(8), 9, Devices(num_devices=4)), "9 experts are not"),
        (lambda: clustered(np.ones((8, 8)), Devices(num_devices=3)), "8 experts are not"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
