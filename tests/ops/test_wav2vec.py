"""Reference: wav2vec 2.0's masks, distractors and codes against transformers' and torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.wav2vec2 import modeling_wav2vec2 as theirs

from deepseek_jax.ops.wav2vec import (
    chosen_codes,
    contrastive_hits,
    contrastive_loss,
    contrastive_scores,
    distractors,
    is_dead,
    perplexity,
    span_mask,
)

LENGTH, COUNTS = 120, np.array([120, 120, 77, 40, 9] * 8)


def spans(seed, **how):
    how = {"share": 0.65, "span": 10} | how
    return np.asarray(span_mask(jax.random.key(seed), jnp.asarray(COUNTS), LENGTH, **how))


def test_masks_are_whole_spans_in_real_frames():
    masked = spans(0)
    for row, count in zip(masked, COUNTS, strict=True):
        assert not row[count:].any()
        edges = np.flatnonzero(np.diff(np.pad(row.astype(int), 1)))
        assert (edges[1::2] - edges[::2] >= 10).all()
    assert not masked[COUNTS == 9].any()  # a span does not fit
    assert masked[COUNTS == 40].any(1).all()
    np.testing.assert_array_equal(spans(0), masked)
    assert (spans(1) != masked).any()
    first = span_mask(jax.random.key(0), jnp.asarray(COUNTS[:3]), LENGTH, share=0.65, span=10)
    np.testing.assert_array_equal(first, masked[:3])  # other rows do not matter


def test_as_much_is_masked_as_by_transformers():
    mask = torch.from_numpy((np.arange(LENGTH) < COUNTS[:, None]).astype(np.int64))[COUNTS > 9]
    np.random.seed(0)
    other = [
        theirs._compute_mask_indices(tuple(mask.shape), 0.65, 10, mask, min_masks=2)
        for _ in range(20)
    ]
    mine = [spans(seed, least=2)[COUNTS > 9] for seed in range(20)]
    for count in (120, 77, 40):
        rows = COUNTS[COUNTS > 9] == count
        shares = [np.mean([m[rows].sum(1) for m in masks]) / count for masks in (mine, other)]
        assert abs(shares[0] - shares[1]) < 0.03, (count, shares)
    assert (spans(0, share=0.01, least=2)[0].sum()) > 10


def test_distractors_are_other_masked_frames_of_the_row():
    masked = spans(0)[:10].copy()
    masked[1] = False
    masked[1, 7] = True
    found = np.asarray(distractors(jax.random.key(3), jnp.asarray(masked), 50))
    for row, others in zip(masked, found, strict=True):
        places = np.flatnonzero(row)
        for place in places:
            assert np.isin(others[place], places).all()
            assert len(places) == 1 or (others[place] != place).all()
    places = np.flatnonzero(masked[0])
    seen = np.bincount(found[0, places].ravel(), minlength=LENGTH)[places]
    assert seen.min() > 0.5 * seen.mean() and seen.max() < 1.6 * seen.mean()  # all alike


@pytest.mark.parametrize("hard", [True, False])
def test_codes_are_torchs_gumbel_softmax(hard, monkeypatch):
    rng = np.random.default_rng(0)
    logits, slope = rng.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    key = jax.random.key(1)
    noise = np.array(jax.random.gumbel(key, logits.shape, jnp.float32))
    # torch draws exponential numbers and takes -log of them.
    drawn = torch.from_numpy(np.exp(-noise))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: drawn)
    other = torch.from_numpy(logits).requires_grad_()
    out = torch.nn.functional.gumbel_softmax(other, tau=0.7, hard=hard)
    (out * torch.from_numpy(slope)).sum().backward()

    def total(logits):
        mine = chosen_codes(logits, key, 0.7, hard)
        return jnp.vdot(mine, slope), mine

    grads, mine = jax.grad(total, has_aux=True)(jnp.asarray(logits))
    np.testing.assert_allclose(mine, out.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(grads, other.grad.numpy(), atol=1e-5)


def test_perplexity_and_dead_codebooks():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(40), size=(3, 50, 2)).astype(np.float32)
    weights[:, :, 1] = np.eye(40)[rng.integers(0, 2, size=(3, 50))]  # two codes of forty
    masked = rng.random((3, 50)) < 0.5
    found = perplexity(jnp.asarray(weights), jnp.asarray(masked))
    flat = torch.from_numpy(weights.reshape(-1, 2, 40))
    quantizer = theirs.Wav2Vec2GumbelVectorQuantizer
    both = quantizer._compute_perplexity(flat, torch.from_numpy(masked)).item()
    np.testing.assert_allclose(found.sum(), both, rtol=1e-5)
    np.testing.assert_allclose(found[1], 2, rtol=0.05)
    np.testing.assert_array_equal(is_dead(found, 40, 0.1), [False, True])
    assert not np.isnan(jax.grad(lambda w: perplexity(w, jnp.asarray(masked)).sum())(weights)).any()


def test_a_frame_alone_costs_nothing():
    x = jnp.ones((1, 4, 3))
    masked = jnp.array([[False, True, False, False]])
    others = distractors(jax.random.key(0), masked, 5)
    scores = contrastive_scores(x, x, jnp.zeros((1, 4, 2), int), others)
    np.testing.assert_allclose(contrastive_loss(*scores, masked), 0, atol=1e-6)
    assert contrastive_hits(*scores, masked) == 0


def test_hits_are_frames_that_are_told_from_all_others():
    rng, masked = np.random.default_rng(0), np.array([[True] * 6, [True] * 4 + [False] * 2])
    predicted, targets = rng.normal(size=(2, 2, 6, 3)).astype(np.float32)
    codes, others = rng.integers(0, 3, (2, 6, 1)), rng.integers(0, 4, (2, 6, 3))
    cosine = torch.nn.functional.cosine_similarity
    hits = 0
    for row, frame in np.argwhere(masked):
        us = [u for u in others[row, frame] if codes[row, u] != codes[row, frame]]
        here = torch.from_numpy(predicted[row, frame])
        own, *apart = (
            cosine(here, torch.from_numpy(targets[row, u]), dim=0).item() for u in (frame, *us)
        )
        hits += bool(apart) and own > max(apart)
    given = (jnp.asarray(x) for x in (predicted, targets, codes, others))
    scores = contrastive_scores(*given)
    assert 0 < hits < masked.sum() and contrastive_hits(*scores, jnp.asarray(masked)) == hits
