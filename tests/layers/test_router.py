"""Impossible routers and mixtures are refused with a sentence that names the numbers."""

import pytest

from deepseek_jax.layers.moe import Capacity, MoE
from deepseek_jax.layers.router import Balance, Hierarchical, Sigmoid, Softmax


def softmax(**fields):
    return Softmax(**({"num_active_experts": 2} | fields))


def sigmoid(**fields):
    return Sigmoid(**({"num_active_experts": 2} | fields))


def hierarchical(**fields):
    return Hierarchical(**({"num_active_experts": 2, "num_groups": 4} | fields))


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (softmax(num_active_experts=9), r"num_active_experts is 9.*num_experts = 8"),
        (softmax(num_active_experts=0), "num_active_experts is 0"),
        (sigmoid(num_active_experts=-1), "num_active_experts is -1"),
        (softmax(num_groups=3), r"num_groups \(3\) must divide num_experts \(8\)"),
        (softmax(num_groups=0), "num_groups"),
        (sigmoid(num_groups=4, num_active_groups=5), "num_active_groups is 5"),
        (sigmoid(num_groups=4, num_active_groups=0), "num_active_groups is 0"),
        (softmax(num_active_experts=3, num_groups=4, num_active_groups=1), "hold only 2 experts"),
        (sigmoid(num_groups=8, num_active_groups=2), "one expert a group"),
        (hierarchical(num_active_experts=3, num_active_groups=2), "multiple of num_active_groups"),
        (hierarchical(num_active_experts=4), "hold only 2 experts"),
    ],
)
def test_an_impossible_router_is_refused(router, message):
    with pytest.raises(ValueError, match=message):
        MoE(num_experts=8, expert_dim=16, router=router)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"expert_dim": 0}, "expert_dim"),
        ({"num_shared_experts": -1}, "num_shared_experts"),
    ],
)
def test_an_impossible_mixture_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoE(**({"num_experts": 8, "expert_dim": 16, "router": softmax()} | fields))


def test_a_capacity_above_zero_is_wanted():
    with pytest.raises(ValueError, match="factor is 0"):
        Capacity(factor=0.0)


@pytest.mark.parametrize("name", ["bias_rate", "sequence_weight", "uniform_weight", "z_weight"])
def test_a_negative_balance_is_refused(name):
    with pytest.raises(ValueError, match=name):
        Balance(**{name: -0.1})


def test_the_articles_shapes_are_possible():
    v3 = sigmoid(num_active_experts=8, num_groups=8, num_active_groups=4)
    v2 = softmax(num_active_experts=6, num_groups=8, num_active_groups=3)
    shapes = {
        16: softmax(num_active_experts=4),
        1024: hierarchical(num_groups=32),
        256: v3,
        160: v2,
    }
    for count, router in shapes.items():
        made = MoE(num_experts=count, expert_dim=8, router=router)
        assert made.num_experts % made.router.num_groups == 0
        assert made.router is router
