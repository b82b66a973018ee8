"""Invariance: fusion over present modalities. Reference: weights against torch and scipy.

Every kind of weights is one function here of (scores of its kind, present), so that all hold to the
same rules, with hypothesis choosing who is present.
"""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from deepseek_jax.ops.attention import masked_attention
from deepseek_jax.ops.fusion import (
    BOTTLENECK,
    attention_weights,
    bottleneck_mask,
    energy_weights,
    entropy_weights,
    fused,
    modality_dropout,
    present_softmax,
    progressive_mask,
    token_streams,
)

B, M, D = 3, 4, 5
QUERY = jnp.asarray(np.random.default_rng(1).normal(size=(B, D)), jnp.float32)
WEIGHTS = {  # of features [B, M, D], who is present, and a query
    "gate": lambda x, present, _: present_softmax(x[..., 0], present),
    "entropy": lambda x, present, _: entropy_weights(x, present),
    "energy": lambda x, present, _: energy_weights(x, present),
    "attention": lambda x, present, query: attention_weights(query, x, present),
}
FEATURES = arrays.arrays(
    np.float32, (B, M, D), elements=st.floats(-50, 50, width=32), fill=st.nothing()
)
PRESENT = arrays.arrays(bool, (B, M))


@functools.cache
def run(kind):
    """(features, present) -> weights, fused features, and a sum's gradients in x, query."""

    def both(x, query, present):
        weights = WEIGHTS[kind](x, present, query)
        out = fused(x, weights, present)
        return (out * jnp.arange(1.0, D + 1)[None]).sum() + (weights**2).sum(), (weights, out)

    def apply(x, present):
        slopes, found = jax.grad(both, (0, 1), has_aux=True)(x, QUERY, present)
        return *found, *slopes

    compiled = jax.jit(apply)
    return lambda *given: [np.asarray(part) for part in compiled(*map(jnp.asarray, given))]


@pytest.mark.parametrize("kind", WEIGHTS)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(x=FEATURES, present=PRESENT, order=st.permutations(range(M)))
def test_weights_keep_their_rules(kind, x, present, order):
    weights, out, slope, query_slope = run(kind)(x, present)
    assert (weights >= 0).all()
    assert not weights[~present].any()
    np.testing.assert_allclose(weights.sum(1), present.any(1), atol=1e-6)
    assert not out[~present.any(1)].any()
    assert np.isfinite(slope).all()
    assert np.isfinite(query_slope).all()
    assert not slope[~present].any()
    # What is absent may be anything.
    for anything in (np.nan, np.inf, -3e38, 7.0):
        others = run(kind)(np.where(present[..., None], x, np.float32(anything)), present)
        for mine, other in zip(others, (weights, out, slope, query_slope), strict=True):
            np.testing.assert_array_equal(mine, other)
    turned = run(kind)(x[:, order], present[:, order])
    np.testing.assert_allclose(turned[0], weights[:, order], atol=1e-6)
    np.testing.assert_allclose(turned[1], out, atol=1e-4)


def test_weights_are_those_of_torch_and_scipy():
    x = np.random.default_rng(2).normal(size=(B, M, D)) * 3
    present = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]], bool)
    inputs = torch.tensor(x, requires_grad=True)
    query = torch.tensor(np.float64(QUERY), requires_grad=True)
    hole = torch.tensor(~present)
    scores = {
        "gate": inputs[..., 0],
        "entropy": -torch.distributions.Categorical(logits=inputs).entropy(),
        "energy": torch.logsumexp(inputs, -1).detach() / 10,
        "attention": torch.einsum("bd,bmd->bm", query, inputs) / D**0.5,
    }
    for kind, score in scores.items():
        weights = torch.softmax(score.masked_fill(hole, -torch.inf), -1)
        out = (weights[..., None] * inputs).sum(1)
        inputs.grad = None
        ((out * torch.arange(1.0, D + 1)).sum() + (weights**2).sum()).backward()
        found = run(kind)(x.astype(np.float32), present)
        in_query = query.grad if kind == "attention" else torch.zeros_like(query)
        expected = weights, out, inputs.grad, in_query
        for mine, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, other.detach(), rtol=1e-3, atol=1e-5, err_msg=kind)
    p = scipy.special.softmax(x, -1)
    np.testing.assert_allclose(
        -scores["entropy"].detach(), scipy.stats.entropy(p, axis=-1), atol=1e-9
    )


def test_equal_scores_are_late_fusion_by_the_mean():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(B, M, D)), jnp.float32)
    present = jnp.array([[1, 1, 0, 1]] * B, bool)
    weights = present_softmax(jnp.full((B, M), 2.5), present)
    np.testing.assert_allclose(fused(x, weights, present), x[:, [0, 1, 3]].mean(1), atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_dropout_leaves_one_of_those_present(rate):
    present = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
    many = jnp.asarray(np.tile(present, (4000, 1)))
    kept = np.asarray(modality_dropout(jax.random.key(3), many, rate)).reshape(4000, 4, 3)
    assert not kept[:, ~present].any()
    assert kept[:, :3].any(2).all()
    share = kept.mean(0)
    # Kept: not dropped, or all dropped and drawn as the last.
    counts = present.sum(1, keepdims=True)
    expected = present * ((1 - rate) + rate**counts / np.maximum(counts, 1))
    np.testing.assert_allclose(share, expected, atol=0.03)
    with pytest.raises(ValueError, match="between"):
        modality_dropout(jax.random.key(0), many, 1.5)


def reached(masks, t):
    """After these layers, which tokens a change of token t has changed, by a real attention."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, masks[0].shape[1], 1, 4)), jnp.float32)

    def after(x):
        for mask in masks:
            x = x + masked_attention(x, x, x, mask, 0.1)
        return x

    change = np.abs(after(x.at[0, t].add(1.0)) - after(x))[0, :, 0].max(1)
    return set(np.flatnonzero(change > 1e-6).tolist())


def test_streams_meet_where_masks_say():
    streams, valid = token_streams((2, 3)), jnp.ones((1, 5), bool)
    apart, joint = (progressive_mask(streams, j, valid) for j in (False, jnp.bool_(True)))
    assert reached([apart, apart], 0) == {0, 1}
    assert reached([apart, joint], 0) == {0, 1, 2, 3, 4}
    half = progressive_mask(streams, True, jnp.array([[1, 1, 0, 0, 0]], bool))
    assert reached([half], 3) >= {3}
    assert not reached([half], 3) & {0, 1}  # nobody attends an absent modality


def test_bottlenecks_pass_on_in_the_layer_after():
    streams, valid = token_streams((2, 3), 1), jnp.ones((1, 6), bool)
    assert streams[0, -1] == BOTTLENECK
    apart, joint = (bottleneck_mask(streams, j, valid) for j in (False, True))
    assert reached([apart, apart], 0) == {0, 1}
    assert reached([apart, apart], 5) == {5}
    assert reached([joint], 0) == {0, 1, 5}  # own stream and the bottleneck
    assert reached([joint, joint], 0) == {0, 1, 2, 3, 4, 5}
    assert reached([joint], 5) == {0, 1, 2, 3, 4, 5}
