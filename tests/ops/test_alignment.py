"""Reference: alignment, learned weights and signs of collapse against torch and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.ops.alignment import (
    alignment_terms,
    collapse_signs,
    collapse_warning,
    guessing_loss,
    total_loss,
    uncertainty_terms,
)
from deepseek_jax.ops.contrastive import contrastive_terms

RNG = np.random.default_rng(0)


def test_alignment_is_torchs_cosine_over_the_mask():
    features, targets = (RNG.normal(size=(3, 5, 7)).astype(np.float32) for _ in range(2))
    mask = RNG.random((3, 5)) < 0.6
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (features, targets)]
    expected = (1 - torch.nn.functional.cosine_similarity(*inputs, dim=-1))[
        torch.tensor(mask)
    ].sum()
    expected.backward()
    holes = [jnp.where(mask[..., None], x, np.nan) for x in (features, targets)]

    def loss(*x):
        return alignment_terms(*x, jnp.asarray(mask))

    (value, weight), pull = jax.vjp(loss, *holes)
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    assert float(weight) == mask.sum()
    for mine, other in zip(pull((jnp.float32(1), jnp.float32(0))), inputs, strict=True):
        np.testing.assert_allclose(mine, other.grad, rtol=1e-3, atol=1e-6)


def test_the_total_is_kendalls_and_balances_any_scale():
    losses = {"contrastive": 3.0, "caption": 0.2, "alignment": 0.9}
    losses = {name: jnp.float32(x) for name, x in losses.items()}
    lambdas = {"contrastive": 1.0, "caption": 2.0, "alignment": 0.5}
    assert float(total_loss(losses, lambdas)) == pytest.approx(3.0 + 0.4 + 0.45)
    s = {"contrastive": jnp.float32(0.7), "caption": jnp.float32(-1.1)}
    sigma = {name: np.exp(float(x) / 2) for name, x in s.items()}
    expected = 3.0 / sigma["contrastive"] ** 2 + np.log(sigma["contrastive"])
    expected += 2 * (0.2 / sigma["caption"] ** 2 + np.log(sigma["caption"])) + 0.45
    assert float(total_loss(losses, lambdas, s)) == pytest.approx(expected, rel=1e-5)
    best = {name: jnp.log(2 * losses[name]) for name in s}
    slopes = jax.grad(lambda s: total_loss(losses, lambdas, s))(best)
    np.testing.assert_allclose([*slopes.values()], 0, atol=1e-6)
    with pytest.raises(KeyError):
        total_loss({}, lambdas)
    with pytest.raises(ValueError, match="caption"):
        total_loss(losses, {"contrastive": 1.0}, s)


def test_weighted_terms_add_up_over_microbatches_and_rest_without_rows():
    s = {"caption": jnp.float32(0.4)}
    parts = [{"caption": (jnp.float32(a), jnp.float32(w))} for a, w in ((5.0, 2.0), (1.0, 6.0))]
    sums = [uncertainty_terms(part, s)["caption"] for part in parts]
    mean = sum(a for a, _ in sums) / sum(w for _, w in sums)
    assert float(mean) == pytest.approx(np.exp(-0.4) * 6 / 8 + 0.2, rel=1e-6)
    none = {"caption": (jnp.float32(0), jnp.float32(0))}
    slope = jax.grad(lambda s: uncertainty_terms(none, s)["caption"][0])(s)
    assert float(slope["caption"]) == 0


def test_signs_of_collapse_are_those_of_all_pairs():
    x = RNG.normal(size=(20, 6)) + 0.5
    valid = np.arange(20) < 15
    found = collapse_signs(
        jnp.asarray(np.where(valid[:, None], x, np.nan), jnp.float32), jnp.asarray(valid)
    )
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True))[:15]
    cosines = unit @ unit.T
    pairs = cosines[~np.eye(15, dtype=bool)]
    assert float(found["mean_cosine"]) == pytest.approx(pairs.mean(), abs=1e-6)
    s = np.linalg.svd(unit, compute_uv=False) ** 2
    assert float(found["effective_rank"]) == pytest.approx(s.sum() ** 2 / (s**2).sum(), rel=1e-5)
    assert float(found["log_batch"]) == pytest.approx(np.log(15))
    point = collapse_signs(jnp.ones((8, 5)))
    assert float(point["mean_cosine"]) == pytest.approx(1, rel=1e-5)
    assert float(point["effective_rank"]) == pytest.approx(1, rel=1e-5)
    spread = collapse_signs(jnp.eye(6))
    assert float(spread["mean_cosine"]) == pytest.approx(0)
    assert float(spread["effective_rank"]) == pytest.approx(6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_guessing_is_what_one_point_costs_at_best(kind):
    rows = 9
    bias = np.log(1 / (rows - 1)) - np.exp(1.0)  # sigmoid(exp(1) * 1 + bias) = 1 / rows
    point = jnp.ones((rows, 4))
    total, weight = contrastive_terms(point, point, jnp.float32(1), jnp.float32(bias), kind=kind)[
        "loss"
    ]
    expected = float(guessing_loss(kind, jnp.float32(rows)))
    assert float(total / weight) == pytest.approx(expected, rel=1e-5)
    assert float(guessing_loss(kind, jnp.float32(1))) == 0


def test_warnings_name_what_is_wrong():
    assert collapse_warning(0.3) is None
    assert collapse_warning(0.3, 3.0, np.log(64)) is None
    assert "0.990" in collapse_warning(0.99)
    assert "guessing" in collapse_warning(0.3, 4.16, np.log(64))
    assert "finite" in collapse_warning(float("nan"))
