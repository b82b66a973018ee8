"""Invariance: experts in another order give the same loss, logits, slopes, and train on alike."""

import dataclasses
import functools

import cases
import jax
import numpy as np
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.router import Balance
from deepseek_jax.models.build import build
from deepseek_jax.models.placement import AXES, moved
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.optimizer import Muon, make_optimizer
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import make_gradients, make_train_step

SLOW = pytest.mark.slow
MORE = ("softmax", "softmax_grouped", "sigmoid", "sigmoid_grouped")
ROUTERS = ("hierarchical", *(pytest.param(r, marks=SLOW) for r in MORE))
KEY = jax.random.key(0)


def whole(router):
    """Two stacked MoE layers after a dense one, and a prediction layer; all losses on."""
    config = cases.decoder("gqa", router, num_layers=3, num_dense_layers=1, num_mtp_layers=1)
    balance = Balance(sequence_weight=0.1, uniform_weight=0.1, z_weight=0.01, bias_rate=0.05)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, balance=balance))


def random_orders(config, seed=0):
    """For each block and layer: its groups turned, and the experts within them in any order."""
    rng, groups = np.random.default_rng(seed), config.moe.router.num_groups

    def order():
        blocks = np.roll(np.arange(config.moe.num_experts).reshape(groups, -1), 1, axis=0)
        return rng.permuted(blocks, axis=1).reshape(-1)

    return {"segment_1/block": np.stack([order(), order()]), "mtp_0/block": order()[None]}


def inverse(orders):
    return {path: np.argsort(order) for path, order in orders.items()}


def equal(ours, theirs, **tolerance):
    for (path, one), other in zip(tree.flatten(ours).items(), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, err_msg=path, **tolerance)


@functools.cache
def prepared(router):
    config = whole(router)
    case = cases.case(config)
    objective = make_language(Language(), case.model)
    return case, objective, random_orders(config), config.moe.router.num_groups


@pytest.mark.parametrize("router", ROUTERS)
def test_loss_logits_and_slopes_stay(router):
    case, objective, orders, groups = prepared(router)
    params = moved(case.params, orders, groups)
    for path, leaf in tree.flatten(params).items():
        name = path.split("/block/")[-1]
        same = np.array_equal(leaf, tree.flatten(case.params)[path])
        assert same == (name not in AXES or path.startswith("segment_0")), path
    one, other = (case.apply(p, case.batch) for p in (case.params, params))
    np.testing.assert_allclose(one.hidden, other.hidden, atol=1e-5)
    np.testing.assert_allclose(one.mtp[0], other.mtp[0], atol=1e-5)
    for path, order in orders.items():
        was = np.take_along_axis(np.asarray(one.routing[path].counts), order, 1)
        np.testing.assert_array_equal(other.routing[path].counts, was)
    gradients = jax.jit(make_gradients(objective))
    (slopes, means, _), (others, theirs, _) = (
        gradients(p, case.batch, KEY, np.float32(1)) for p in (case.params, params)
    )
    equal(moved(others, inverse(orders), groups), slopes, rtol=1e-4, atol=2e-5)
    equal(theirs, means, rtol=1e-5)
    assert any(np.abs(x).max() > 1e-3 for p, x in tree.flatten(slopes).items() if "experts" in p)


def test_a_state_moves_as_a_whole_and_trains_on_as_if_it_had_not():
    case, objective, orders, groups = prepared("sigmoid_grouped")
    optimizer = make_optimizer(Muon(), case.model.specs)
    rate = lambda step: 0.01  # noqa: E731
    step = jax.jit(make_train_step(make_gradients(objective), objective, optimizer, rate))
    state, _ = step(initial_state(case.params, optimizer, 1.0), case.batch, KEY)
    apart = jax.jit(functools.partial(moved, orders=orders, num_groups=groups))(state)
    for _ in range(2):
        state, _ = step(state, case.batch, KEY)
        apart, _ = step(apart, case.batch, KEY)
    back = moved(apart, inverse(orders), groups)
    bias = "params/segment_1/block/moe/router/bias"
    np.testing.assert_array_equal(tree.flatten(back)[bias], tree.flatten(state)[bias])
    equal(back, state, atol=1e-3)
    for part in ("params", "opt_state/mu"):  # what lay elsewhere is elsewhere
        path = f"{part}/segment_1/block/moe/experts/up"
        one, other = (np.asarray(tree.flatten(x)[path]) for x in (apart, state))
        assert np.abs(one - other).max() > 0.1 * np.abs(other).max(), path


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ({"segment_1/block": np.arange(8)[None]}, "segment_1/block: 1 orders for 2 layers"),
        ({"segment_0/block": np.arange(8)[None]}, "segment_0/block: not a block with experts"),
        ({"segment_1/block": np.zeros((2, 8), int)}, "is no order of 8 experts"),
        ({"segment_1/block": np.tile([2, 1, 0, 3, 4, 5, 6, 7], (2, 1))}, "router's 4 groups apart"),
    ],
)
def test_what_is_no_order_is_refused(orders, message):
    params = build(whole("sigmoid_grouped"), Precision(compute="float32")).init(KEY)
    with pytest.raises(InputError, match=message):
        moved(params, orders, 4)
