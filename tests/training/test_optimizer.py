"""Reference: AdamW against PyTorch's, Muon against a float64 NumPy one; who gets what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.core import tree
from deepseek_jax.core.axes import Spec
from deepseek_jax.core.errors import InputError
from deepseek_jax.training.optimizer import (
    AdamW,
    Muon,
    Slower,
    applied,
    make_optimizer,
    orthogonal_factor,
)

MATRIX = {"reduced": (0,), "outputs": (1,)}
HEADS = Spec(axes=("embed", "heads", "head"), reduced=(0,), outputs=(1, 2))
EXPERTS = Spec(axes=("experts", "expert_mlp", "embed"), reduced=(1,), outputs=(2,))
SPECS = {
    "embedding": {"weight": Spec(axes=("vocab", "embed"), **MATRIX)},
    "head": {"weight": Spec(axes=("embed", "vocab"), **MATRIX)},
    "block": {
        "norm": {"scale": Spec(axes=("layers", "embed"))},
        "q": {"weight": HEADS.stacked()},
        "down": EXPERTS.stacked(),
        "moe": {"router": {"bias": Spec(axes=("layers", "router"))}},
    },
}
SHAPES = {
    "embedding": {"weight": (11, 6)},
    "head": {"weight": (6, 11)},
    "block": {
        "norm": {"scale": (2, 6)},
        "q": {"weight": (2, 6, 2, 5)},
        "down": (2, 3, 8, 6),
        "moe": {"router": {"bias": (2, 3)}},
    },
}
MATRICES = ("block/q/weight", "block/down")
DECAYED = ("embedding/weight", "head/weight", *MATRICES)
RATES = (0.01, 0.02, 0.005, 0.01)


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def run(config, params, gradients):
    """Parameters after every step, as {path: array}, and the last state."""
    optimizer = make_optimizer(config, SPECS)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads, rate):
        updates, state = optimizer.update(grads, state, params, learning_rate=rate)
        return applied(params, updates), state

    history = []
    for grads, rate in zip(gradients, RATES, strict=True):
        params, state = step(params, state, grads, rate)
        history.append(tree.flatten(params))
    return history, state


@pytest.fixture(scope="module")
def gradients():
    return [random_tree(seed, scale=0.3) for seed in range(1, 5)]


@pytest.mark.parametrize("slower", [(), (("block/*", 0.5), ("*/q/*", 0.1))])
def test_adamw_takes_the_steps_of_pytorchs(gradients, slower):
    """Where parts learn at other rates: as its parameter groups with theirs."""
    slower = tuple(Slower(paths=paths, factor=factor) for paths, factor in slower)
    config = AdamW(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, slower=slower)
    start = random_tree(0)
    history, _ = run(config, start, gradients)
    leaves = {name: torch.tensor(leaf) for name, leaf in tree.flatten(start).items()}
    free = [n for n in leaves if n not in DECAYED and not n.endswith("router/bias")]
    factors = dict.fromkeys(leaves, 1.0)
    if slower:
        factors |= {n: 0.1 if "/q/" in n else 0.5 for n in leaves if n.startswith("block/")}
    groups = [
        {"params": [leaves[n]], "weight_decay": 0.3 * (n in DECAYED), "factor": factors[n]}
        for n in (*DECAYED, *free)
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    for ours, grads, rate in zip(history, gradients, RATES, strict=True):
        for group in theirs.param_groups:
            group["lr"] = rate * group["factor"]
        for name, grad in tree.flatten(grads).items():
            leaves[name].grad = torch.tensor(grad)
        theirs.step()
        for name in (*DECAYED, *free):
            np.testing.assert_allclose(ours[name], leaves[name], atol=2e-6, err_msg=name)


def numpy_muon_step(weight, grad, momentum, rate, config):
    """One matrix, float64, iterated on whichever side it has."""
    momentum = config.momentum * momentum + grad  # the paper's sum
    x = grad + config.momentum * momentum
    x = x / np.linalg.norm(x)
    for _ in range(config.newton_schulz_steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    update = 0.2 * np.sqrt(max(weight.shape)) * x + config.weight_decay * weight
    return weight - rate * update, momentum


def as_matrices(name, leaf):
    leaf = np.asarray(leaf, np.float64)
    return leaf.reshape(2, 6, 10) if name == "block/q/weight" else leaf.reshape(6, 8, 6)


def test_muon_equals_a_float64_reference_on_stacked_experts_and_heads(gradients):
    config = Muon(momentum=0.9, weight_decay=0.1)
    start = random_tree(0)
    history, _ = run(config, start, gradients)
    for name in MATRICES:
        weights = list(as_matrices(name, tree.flatten(start)[name]))
        momenta = [0.0] * len(weights)
        for ours, grads, rate in zip(history, gradients, RATES, strict=True):
            each = as_matrices(name, tree.flatten(grads)[name])
            rows = [
                numpy_muon_step(w, g, m, rate, config)
                for w, g, m in zip(weights, each, momenta, strict=True)
            ]
            weights, momenta = zip(*rows, strict=True)
            mine = as_matrices(name, ours[name])
            np.testing.assert_allclose(mine, np.stack(weights), atol=3e-5, err_msg=name)


def test_muon_leaves_the_rest_to_adamw(gradients):
    start = random_tree(0)
    muon, state = run(Muon(b1=0.8, weight_decay=0.3), start, gradients)
    adamw, _ = run(AdamW(b1=0.8, weight_decay=0.3), start, gradients)
    for name in ("embedding/weight", "head/weight", "block/norm/scale"):
        np.testing.assert_array_equal(muon[-1][name], adamw[-1][name], err_msg=name)
    assert sorted(tree.flatten(state["nu"])) == [
        "block/norm/scale", "embedding/weight", "head/weight"
    ]  # fmt: skip


@pytest.mark.parametrize("config", [AdamW(), Muon()])
def test_the_router_bias_has_no_memory_and_never_moves(config, gradients):
    start = random_tree(0)
    history, state = run(config, start, gradients)
    name = "block/moe/router/bias"
    np.testing.assert_array_equal(history[-1][name], tree.flatten(start)[name])
    assert not [path for path in tree.flatten(state) if "router/bias" in path]


def test_an_update_of_muon_has_adamws_size(gradients):
    zero = jax.tree.map(np.zeros_like, random_tree(0))
    history, _ = run(Muon(weight_decay=0.0), zero, gradients[:1] * 4)
    update = np.asarray(history[0]["block/down"]) / RATES[0]
    assert np.sqrt((update**2).mean()) == pytest.approx(0.2, rel=0.25)


def test_singular_values_come_near_one_and_zero_stays_zero():
    matrices = np.random.default_rng(0).normal(size=(3, 8, 20)).astype(np.float32)
    values = np.linalg.svd(orthogonal_factor(jnp.asarray(matrices), 5), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert not np.asarray(orthogonal_factor(jnp.zeros((1, 2, 3)), 5)).any()


@pytest.mark.parametrize("config", [AdamW, Muon])
def test_memory_is_stored_in_the_dtypes_asked_for(config, gradients):
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(0))
    chosen = config(momentum_dtype="bfloat16", variance_dtype="float16")
    history, state = run(chosen, start, gradients)
    assert {x.dtype for x in jax.tree.leaves(state["mu"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state["nu"])} == {jnp.dtype("float16")}
    assert {x.dtype for x in history[-1].values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (AdamW, "learning_rate", -1.0),
        (AdamW, "warmup_steps", -1),
        (AdamW, "b2", 1.0),
        (AdamW, "clip_norm", 0.0),
        (AdamW, "max_skipped", 0),
        (Muon, "momentum", 1.0),
        (Muon, "newton_schulz_steps", 0),
    ],
)
def test_impossible_settings_are_refused(config, field, value):
    with pytest.raises(ValueError, match=rf"optimizer\.{field} is {value}; it must be"):
        config(**{field: value})


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"factor \(-1\) must be at least 0"):
        Slower(paths="block/*", factor=-1)
    misspelled = AdamW(slower=(Slower(paths="blok/*", factor=0.1),))
    with pytest.raises(InputError, match=r"optimizer.slower: 'blok/\*' .*are block/\*"):
        make_optimizer(misspelled, SPECS)
