"""Reference: our sampling against HF's logits processors; invariance: rows are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from deepseek_jax.ops import sampling

LOGITS = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 50, (4, 12))
SEEN = np.zeros((4, 50), bool)
np.put_along_axis(SEEN, IDS, True, axis=1)


def _theirs(processor):
    return processor(torch.tensor(IDS), torch.tensor(LOGITS)).numpy()


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_is_hf(penalty):
    ours = sampling.penalized(jnp.asarray(LOGITS), jnp.asarray(SEEN), penalty)
    np.testing.assert_allclose(
        ours, _theirs(hf.RepetitionPenaltyLogitsProcessor(penalty)), rtol=1e-6
    )


@pytest.mark.parametrize("top_k", [1, 7, 50, 1000])
def test_top_k_is_hf(top_k):
    ours = sampling.top_k_only(jnp.asarray(LOGITS), top_k)
    np.testing.assert_array_equal(ours, _theirs(hf.TopKLogitsWarper(top_k)))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_top_p_is_hf(top_p):
    ours = sampling.top_p_only(jnp.asarray(LOGITS), top_p)
    np.testing.assert_array_equal(ours, _theirs(hf.TopPLogitsWarper(top_p)))


def test_draws_follow_hfs_distribution():
    """All four in HF's order: drawn frequencies match the probabilities HF would sample from."""
    ids, scores = torch.tensor(IDS[:1]), torch.tensor(LOGITS[:1])
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(1.2),
        hf.TemperatureLogitsWarper(2.0),
        hf.TopKLogitsWarper(12),
        hf.TopPLogitsWarper(0.8),
    ):
        scores = processor(ids, scores)
    expected = torch.softmax(scores[0], -1).numpy()
    num = 20000
    tokens = sampling.draw(
        jnp.broadcast_to(LOGITS[:1], (num, 50)),
        jax.random.split(jax.random.key(0), num),
        sampling.Sampling(temperature=2.0, top_k=12, top_p=0.8, repetition_penalty=1.2),
        jnp.broadcast_to(SEEN[:1], (num, 50)),
    )
    found = np.bincount(np.asarray(tokens), minlength=50) / num
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / num))


def test_no_temperature_takes_the_likeliest():
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = sampling.draw(jnp.asarray(LOGITS), keys, sampling.Sampling(top_k=3, top_p=0.5))
    np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))


def test_a_row_is_drawn_alike_whoever_shares_its_batch():
    chosen = sampling.Sampling(temperature=1.0, top_p=0.95)
    key, positions = jax.random.key(3), jnp.array([5, 9, 2, 7])
    together = sampling.draw(jnp.asarray(LOGITS), sampling.row_keys(key, positions), chosen)
    alone = sampling.draw(jnp.asarray(LOGITS[:2]), sampling.row_keys(key, positions[:2]), chosen)
    np.testing.assert_array_equal(together[:2], alone)
    keys = [jax.random.key_data(sampling.row_keys(key, p)) for p in (positions, positions + 1)]
    assert (keys[0] != keys[1]).any(1).all()  # and another position draws afresh


def test_another_temperature_compiles_nothing():
    drawn = jax.jit(sampling.draw)
    keys = jax.random.split(jax.random.key(0), 4)
    for temperature, top_k in ((0.5, 3), (0.7, 9)):
        drawn(jnp.asarray(LOGITS), keys, sampling.Sampling(temperature=temperature, top_k=top_k))
    assert drawn._cache_size() == 1
