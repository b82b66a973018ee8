"""Reference: CTC's losses and slopes against torch's, greedy decoding against its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.ops.ctc import ctc_greedy, ctc_losses, ctc_reduced

COUNTS = np.array([9, 5, 3, 7])
LABELS = np.array([[1, 1, 2, 3], [4, 2, -100, -100], [3, 3, 5, -100], [-100, -100, -100, -100]])


@pytest.mark.parametrize("blank", [0, 5])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_and_slopes_are_torchs(blank, reduction):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 9, 6)).astype(np.float32) * 3
    labels = np.where(blank == LABELS, 0, LABELS) if blank else LABELS

    def total(logits):
        losses, possible = ctc_losses(logits, jnp.asarray(COUNTS), jnp.asarray(labels), blank)
        return ctc_reduced(losses, jnp.asarray(labels), blank, reduction), possible

    (mine, possible), slope = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logits))
    theirs = torch.from_numpy(logits).requires_grad_()
    kept = torch.from_numpy(labels >= 0)
    loss = torch.nn.functional.ctc_loss(
        theirs.log_softmax(-1).transpose(0, 1),
        torch.from_numpy(labels)[kept],
        torch.from_numpy(COUNTS),
        kept.sum(1),
        blank=blank,
        reduction=reduction,
        zero_infinity=True,
    )
    loss.backward()
    np.testing.assert_allclose(mine, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(slope, theirs.grad.numpy(), atol=1e-4 * abs(theirs.grad).max())
    np.testing.assert_array_equal(possible, [True, True, False, True])  # 3, 3, 5 needs 4 frames
    assert not np.asarray(slope)[1, 5:].any() and not np.asarray(slope)[2].any()


def test_padding_may_stand_between_labels():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 5)), jnp.float32)
    one, other = ([[1, -100, 2, 0, 3]], [[1, 2, 3]])
    found = [ctc_losses(logits, jnp.array([8]), jnp.array(x))[0] for x in (one, other)]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_greedy_is_its_definition():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(5, 30, 4)).astype(np.float32)
    counts = np.array([30, 12, 1, 0, 25])
    ids, lengths = ctc_greedy(jnp.asarray(logits), jnp.asarray(counts), 2)
    for row, count, mine, length in zip(logits, counts, ids, lengths, strict=True):
        said = [int(k) for k, _ in itertools.groupby(row[:count].argmax(-1)) if k != 2]
        assert mine.tolist() == said + [-1] * (30 - len(said))
        assert length == len(said)
