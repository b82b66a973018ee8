"""Reference: what is kept, and the indexer's divergence, against NumPy, torch and scipy.

The gate's fast form against the whole square, forward and backward; what a gate keeps depends on no
later token, on nothing of another document, and not on where the gate was computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from deepseek_jax.ops import sparse
from deepseek_jax.ops.attention import causal_attention, causal_mask


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def segments_of(rng, batch, length):
    """Rows of documents of random lengths, the last of them padding."""
    rows = np.zeros((batch, length), np.int32)
    for row in rows:
        cuts = np.sort(rng.choice(np.arange(1, length), min(3, length - 1), replace=False))
        for number, part in enumerate(np.split(np.arange(length), cuts)[:-1], 1):
            row[part] = number
    return rows


@pytest.mark.parametrize(("length", "num_heads"), [(5, 3), (40, 16), (300, 4)])
def test_index_scores_are_their_formula(length, num_heads):
    rng = np.random.default_rng(0)
    q, k = normal(rng, 2, length, num_heads, 6), normal(rng, 2, length + 3, 6)
    w = normal(rng, 2, length, num_heads)
    expected = np.einsum("btih,bsh->btis", *(np.asarray(x, float) for x in (q, k)))
    expected = (np.maximum(expected, 0) * w[..., None]).sum(2)
    ours = jax.jit(sparse.index_scores)(q, k, w)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-5)

    def loss(*inputs):
        return (sparse.index_scores(*inputs) ** 2).sum()

    inputs = [
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in map(np.asarray, (q, k, w))
    ]
    products = torch.einsum("btih,bsh->btis", *inputs[:2]).relu()
    ((products * inputs[2][..., None]).sum(2) ** 2).sum().backward()
    for ours, theirs in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, w), inputs, strict=True):
        error = np.abs(ours - theirs.grad.numpy()).max() / theirs.grad.abs().max()
        assert error < 1e-5


@pytest.mark.parametrize("top_k", [1, 3, 8, 9])
def test_the_best_are_exactly_top_k_earlier_first(top_k):
    """Scores with many equals, rows with fewer allowed than top_k, rows with none."""
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (3, 8, 8)).astype(np.float32)
    mask = np.tril(np.ones((8, 8), bool), -1) & (rng.random((3, 8, 8)) < 0.8)
    found = np.asarray(sparse.best(jnp.asarray(scores), jnp.asarray(mask), top_k))
    for b, t in np.ndindex(3, 8):
        allowed = [s for s in range(8) if mask[b, t, s]]
        expected = sorted(allowed, key=lambda s, b=b, t=t: (-scores[b, t, s], s))[:top_k]
        assert sorted(np.flatnonzero(found[b, t])) == sorted(expected)


@pytest.mark.parametrize("top_k", [4, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_the_divergence_is_that_of_scipy(top_k, packed):
    """More than one block of queries; dense where top_k is longer than the row."""
    rng, length = np.random.default_rng(2), 150
    index = normal(rng, 2, length, 16, 6), normal(rng, 2, length, 6), normal(rng, 2, length, 16)
    q, k = normal(rng, 2, length, 3, 8), normal(rng, 2, length, 3, 8)
    segments = jnp.asarray(segments_of(rng, 2, length)) if packed else None
    indexed = functools.partial(sparse.indexed, top_k=top_k, scale=0.3)
    keep, apart = jax.jit(indexed)(index, q, k, segments)
    mask = jnp.broadcast_to(causal_mask(segments, length, None), (2, length, length))
    scores = np.asarray(sparse.index_scores(*index), float)
    np.testing.assert_array_equal(keep, sparse.best(jnp.asarray(scores), mask, top_k))
    assert (keep.sum(-1) == np.minimum(mask.sum(-1), top_k)).all()
    hidden = np.where(keep, 0, -np.inf)
    logits = (
        np.einsum("btnh,bsnh->bnts", *(np.asarray(x, float) for x in (q, k))) * 0.3
        + hidden[:, None]
    )
    attention = scipy.special.softmax(logits, axis=-1).mean(1)
    guess = scipy.special.softmax(scores + hidden, axis=-1)
    expected = scipy.special.rel_entr(attention, guess).sum(-1)
    valid = np.ones((2, length), bool) if segments is None else np.asarray(segments) > 0
    np.testing.assert_allclose(apart, expected[valid].sum(), rtol=1e-5)

    slopes = jax.grad(lambda *x: indexed(*x, segments)[1], (0, 1, 2))(index, q, k)
    assert all(np.abs(slope).max() > 1e-3 for slope in slopes[0])
    assert not np.any(slopes[1]) and not np.any(slopes[2])


def test_attention_to_what_is_kept_is_the_reference():
    """Forward and backward, over several blocks of queries."""
    rng, length = np.random.default_rng(3), 150
    q, k, v = (normal(rng, 2, length, n, 8) for n in (4, 2, 2))
    segments = jnp.asarray(segments_of(rng, 2, length))
    keep = jnp.asarray(rng.random((2, length, length)) < 0.3) | jnp.eye(length, dtype=bool)[None]
    weight = normal(rng, 2, length, 4, 8)

    def run(form, *inputs):
        out = causal_attention(*inputs, segments, scale=0.4, keep=keep, implementation=form)
        return (out * weight).sum(), out

    both = [
        jax.value_and_grad(functools.partial(run, form), (0, 1, 2), has_aux=True)(q, k, v)
        for form in ("reference", None)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), *both)
    loose = causal_attention(q, k, v, segments, scale=0.4)
    assert np.abs(loose - both[0][0][1]).max() > 0.1


@pytest.mark.parametrize(
    ("length", "packed", "ratio", "dtype"),
    [
        (7, True, 0.3, jnp.float32),
        (96, False, 0.3, jnp.float32),
        (150, True, 0.05, jnp.float32),
        (150, True, 0.3, jnp.bfloat16),
        (70, True, 1.0, jnp.float32),
    ],
)
def test_the_fast_gate_is_the_whole_square(length, packed, ratio, dtype):
    """Forward and backward; a third of the tokens share a gate, so that ranks tie."""
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(normal(rng, 2, length, n, 8), dtype) for n in (4, 2, 2))
    gate = 3 * normal(rng, 2, length)
    gate = jnp.asarray(np.where(rng.random(gate.shape) < 0.3, 0.5, gate), jnp.float32)
    segments = jnp.asarray(segments_of(rng, 2, length)) if packed else None
    weight = normal(rng, 2, length, 4, 8)

    def square(q, k, v, gate, segments, ratio, scale):
        mask = causal_mask(segments, length, None)
        keep = sparse.gate_mask(gate, mask, jnp.arange(length)[None], ratio)
        return sparse.gated_reference(q, k, v, gate, keep, scale)

    def loss(form, *inputs):
        out = form(*inputs, segments, ratio=ratio, scale=0.4)
        out = out[0] if isinstance(out, tuple) else out
        return (out.astype(jnp.float32) * weight).sum(), out

    both = [
        jax.jit(jax.value_and_grad(functools.partial(loss, form), (0, 1, 2, 3), has_aux=True))
        for form in (square, sparse.gated)
    ]
    ours, theirs = (run(q, k, v, gate) for run in both)
    atol = 2e-5 if dtype == jnp.float32 else 0.05
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=atol * max(1, np.abs(one).max()), rtol=0)
    assert np.abs(np.asarray(ours[1][3])).max() > 1e-3
    _, kept = sparse.gated(q, k, v, gate, segments, ratio=ratio, scale=0.4)
    mask = causal_mask(segments, length, None)
    own = jnp.arange(length)[None]
    keep = np.asarray(sparse.gate_mask(gate, mask, own, ratio))
    seen = np.broadcast_to(mask, keep.shape).sum(-1)
    assert (keep.sum(-1) - np.ceil(ratio * seen - 1e-9) <= 1).all(), "but its own token"
    valid = np.ones(gate.shape, bool) if segments is None else np.asarray(segments) > 0
    assert kept == keep.sum(-1)[valid].sum()
    assert (ratio < 1) == (kept < seen[valid].sum())


def test_a_gate_keeps_the_best_and_itself():
    gate = jnp.asarray([[1.0, 3.0, 2.0, 3.0, 0.0]])
    mask = causal_mask(None, 5, None)
    found = sparse.gate_mask(gate, mask, jnp.arange(5)[None], 0.4)[0].astype(int).tolist()
    assert found == [
        [1, 0, 0, 0, 0],  # ceil(0.4)
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],  # 2 of 3
        [0, 1, 0, 1, 0],
        [0, 1, 0, 1, 1],  # the better two, and its own
    ]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_room_is_not_rounded_up_by_noise(ratio):
    exact = [-(-n * round(10 * ratio) // 10) for n in range(200)]
    assert sparse.room(ratio, 199).tolist() == exact
