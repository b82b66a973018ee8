"""Invariance and reference: the step on a small objective that is easy to do by hand.

The model predicts y by x @ w under a weighted squared error; a "router" counts rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.axes import Spec
from deepseek_jax.training.optimizer import AdamW, make_optimizer
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import Objective, make_gradients, make_train_step

NUM_EXPERTS = 3
SPECS = {
    "w": Spec(axes=("embed", "mlp"), reduced=(0,), outputs=(1,)),
    "block": {"moe": {"router": {"bias": Spec(axes=("layers", "router"))}}},
}


class Counted(NamedTuple):
    """The fields of layers.moe.Routing that training reads."""

    counts: jax.Array
    dropped: jax.Array
    tokens: jax.Array
    entropy: jax.Array


def loss_fn(params, batch, key):
    del key
    error = (batch["x"] @ params["w"] - batch["y"]) ** 2
    over = weights_fn(batch)
    sums = {"error": (batch["weight"][:, None] * error).sum(), "rows": jnp.abs(params["w"]).sum()}
    counts = (batch["expert"][:, None] == jnp.arange(NUM_EXPERTS)[None]).sum(0, dtype=jnp.int32)
    none = jnp.zeros(1, jnp.int32)
    routing = Counted(counts[None], none, none, jnp.zeros(1))
    return {name: (sums[name], over[name]) for name in sums}, {"block": routing}


def weights_fn(batch):
    return {"error": batch["weight"].sum(), "rows": jnp.float32(1)}


OBJECTIVE = Objective(loss_fn, weights_fn, {"error": 1.0, "rows": 0.01}, {"block": 0.5})


def make_batch(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, 5)).astype(np.float32),
        "y": rng.normal(size=(rows, 4)).astype(np.float32),
        "weight": rng.integers(0, 4, rows).astype(np.float32),  # uneven among microbatches
        "expert": np.array([0, 0, 0, 0, 0, 1, 1, 1])[np.arange(rows) % 8].astype(np.int32),
    }


def make_state(loss_scale=1.0, seed=0):
    params = {
        "w": jax.random.normal(jax.random.key(seed), (5, 4)),
        "block": {"moe": {"router": {"bias": jnp.zeros((1, NUM_EXPERTS))}}},
    }
    return initial_state(params, make_optimizer(AdamW(), SPECS), loss_scale)


def make_step(accumulation_steps=1, objective=OBJECTIVE, **settings):
    gradients = make_gradients(objective, accumulation_steps)
    optimizer = make_optimizer(AdamW(weight_decay=0.0), SPECS)
    rate = lambda step: 0.1 * (step + 1)  # noqa: E731
    return jax.jit(make_train_step(gradients, objective, optimizer, rate, **settings))


KEY = jax.random.key(0)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_big_batch(parts):
    params, batch = make_state().params, make_batch()
    one = make_gradients(OBJECTIVE)(params, batch, KEY, jnp.float32(1))
    many = make_gradients(OBJECTIVE, parts)(params, batch, KEY, jnp.float32(1))
    np.testing.assert_allclose(one[0]["w"], many[0]["w"], atol=1e-6, rtol=1e-6)
    for term in ("error", "rows"):
        np.testing.assert_allclose(one[1][term], many[1][term], rtol=1e-6, err_msg=term)
    np.testing.assert_array_equal(one[2]["block"].counts, many[2]["block"].counts)


def test_the_gradient_is_that_of_the_weighted_mean():
    params, batch = make_state().params, make_batch()
    grads, means, _ = make_gradients(OBJECTIVE, 4)(params, batch, KEY, jnp.float32(1))
    w = np.asarray(params["w"], np.float64)
    slope = 2 * batch["weight"][:, None] * (batch["x"] @ w - batch["y"]) / batch["weight"].sum()
    np.testing.assert_allclose(grads["w"], batch["x"].T @ slope + 0.01 * np.sign(w), atol=1e-5)
    error = (batch["weight"][:, None] * (batch["x"] @ w - batch["y"]) ** 2).sum()
    np.testing.assert_allclose(means["error"], error / batch["weight"].sum(), rtol=1e-5)


def test_a_batch_without_any_weight_trains_on_nothing():
    batch = make_batch() | {"weight": np.zeros(8, np.float32)}
    state, metrics = make_step(2)(make_state(), batch, KEY)
    assert float(metrics["error"]) == 0.0
    assert np.isfinite(np.asarray(state.params["w"])).all()


def test_metrics_say_what_was_done():
    state, metrics = make_step()(make_state(), make_batch(), KEY)
    state, metrics = make_step()(state, make_batch(), KEY)
    total = metrics["error"] + 0.01 * metrics["rows"]
    assert float(metrics["total_loss"]) == pytest.approx(float(total), rel=1e-6)
    assert float(metrics["learning_rate"]) == pytest.approx(0.2)
    assert int(state.step) == 2
    assert "loss_scale" not in metrics


def test_what_is_checked_is_measured_in_the_step():
    batch = make_batch()
    _, metrics = make_step(2)(make_state(), batch, KEY)
    seen = metrics["checked"]
    assert seen["gradients"].keys() == {"", "block/moe/router"}  # of modules: w stands in none
    assert float(seen["gradients"][""]) == pytest.approx(float(metrics["grad_norm"]) ** 2)
    assert float(seen["gradients"]["block/moe/router"]) == 0
    assert {term: float(weight) for term, (_, weight) in seen["terms"].items()} == {
        "error": batch["weight"].sum(),
        "rows": 1,
    }
    assert float(seen["terms"]["error"][0]) == float(metrics["error"])
    np.testing.assert_array_equal(
        seen["blocks"]["block"]["counts"], metrics["expert_load"]["block"]
    )
    _, metrics = make_step(loss_scale_growth=2)(make_state(), batch, KEY)
    assert metrics["checked"]["gradients"] == {}  # overflows are how a loss scale is found


def test_clipping_bounds_the_whole_gradient_and_reports_it_unclipped():
    """AdamW hides lengths, so its first moment is read: 0.1 of the clipped gradient."""
    state, metrics = make_step(clip_norm=0.25)(make_state(), make_batch(), KEY)
    free, same = make_step()(make_state(), make_batch(), KEY)
    norm = float(metrics["grad_norm"])
    assert norm == pytest.approx(float(same["grad_norm"]))
    assert norm > 0.25
    assert float(jnp.linalg.norm(state.opt_state["mu"]["w"])) == pytest.approx(0.025, rel=1e-5)
    assert float(jnp.linalg.norm(free.opt_state["mu"]["w"])) == pytest.approx(0.1 * norm, rel=1e-5)
    loose, _ = make_step(clip_norm=2 * norm)(make_state(), make_batch(), KEY)
    np.testing.assert_array_equal(loose.opt_state["mu"]["w"], free.opt_state["mu"]["w"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # the last overflows in the gradient
@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(bad, parts):
    step = make_step(parts)
    state, _ = step(make_state(), make_batch(), KEY)
    batch = make_batch(1)
    batch["x"][3] = bad
    batch["weight"][3] = 1
    after, metrics = step(state, batch, KEY)
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (2, 1, 1.0)
    after, metrics = step(after, batch, KEY)
    assert int(after.skipped) == 2
    after, metrics = step(after, make_batch(2), KEY)
    assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (4, 0, 0.0)
    assert (np.asarray(after.params["w"]) != np.asarray(state.params["w"])).any()


def half_loss(params, batch, key):
    """The same error with a float16 product, whose gradient overflows at 65504."""
    error = (batch["x"] @ params["w"] - batch["y"]).astype(jnp.float16)
    sums, routing = loss_fn(params, batch, key)
    total = (batch["weight"][:, None] * (error * error).astype(jnp.float32)).sum()
    return sums | {"error": (total, sums["error"][1])}, routing


HALF = OBJECTIVE._replace(loss_fn=half_loss, coefficients={"error": 1.0})


@pytest.mark.parametrize("clip_norm", [None, 0.25])
def test_loss_scaling_changes_no_update(clip_norm):
    """AdamW hides lengths: its first moment does not."""
    settings = {"objective": HALF, "clip_norm": clip_norm}
    plain, norm = make_step(**settings)(make_state(), make_batch(), KEY)
    scaled, metrics = make_step(**settings, loss_scale_growth=2)(
        make_state(256.0), make_batch(), KEY
    )
    np.testing.assert_allclose(
        scaled.opt_state["mu"]["w"], plain.opt_state["mu"]["w"], atol=1e-3, rtol=1e-2
    )
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm["grad_norm"]), rel=1e-2)
    assert float(metrics["loss_scale"]) == 256.0


def test_loss_scale_doubles_every_so_many_finite_steps():
    step = make_step(objective=HALF, loss_scale_growth=3)
    state, scales = make_state(1.0), []
    for _ in range(8):
        state, metrics = step(state, make_batch(), KEY)
        scales.append(float(metrics["loss_scale"]))
    assert scales == [1, 1, 1, 2, 2, 2, 4, 4]


def test_loss_scale_halves_on_overflow_and_doubles_after_finite_steps():
    step = make_step(objective=HALF, loss_scale_growth=3)
    state, scales, skips = make_state(2.0**17), [], []
    for _ in range(12):
        state, metrics = step(state, make_batch(), KEY)
        scales.append(float(metrics["loss_scale"]))
        skips.append(float(metrics["skipped"]))
    halvings = skips.index(0.0)
    assert halvings >= 1
    assert scales[: halvings + 1] == [2.0 ** (17 - i) for i in range(halvings + 1)]
    assert skips[:halvings] == [float(i + 1) for i in range(halvings)]
    assert scales[halvings : halvings + 4] == [scales[halvings]] * 3 + [2 * scales[halvings]]


def test_router_bias_moves_by_the_sign_of_whole_batch_counts():
    """Counts 5, 3, 0 against a mean of 8/3; rows 4 to 8 alone would say otherwise."""
    for parts in (1, 2, 8):
        state, metrics = make_step(parts)(make_state(), make_batch(), KEY)
        bias = state.params["block"]["moe"]["router"]["bias"]
        np.testing.assert_array_equal(bias, [[-0.5, -0.5, 0.5]])
        np.testing.assert_array_equal(metrics["expert_load"]["block"], [[5, 3, 0]])


def test_router_bias_rests_where_load_is_even_and_where_no_rate_is_given():
    batch = make_batch(rows=6) | {"expert": np.array([0, 1, 2, 0, 1, 2], np.int32)}
    for objective in (OBJECTIVE, OBJECTIVE._replace(bias_rates={})):
        state, _ = make_step(objective=objective)(make_state(), batch, KEY)
        assert not np.asarray(state.params["block"]["moe"]["router"]["bias"]).any()
        batch = make_batch()


def test_router_bias_is_exact_where_floats_are_not():
    """Counts past 2^24 that differ from their mean by one."""
    counts = np.array([2**26 + 1, 2**26, 2**26 - 1], np.int32)

    def loss(params, batch, key):
        sums, routing = loss_fn(params, batch, key)
        return sums, {"block": routing["block"]._replace(counts=jnp.asarray(counts)[None])}

    state, _ = make_step(objective=OBJECTIVE._replace(loss_fn=loss))(
        make_state(), make_batch(), KEY
    )
    np.testing.assert_array_equal(
        state.params["block"]["moe"]["router"]["bias"], [[-0.5, 0.0, 0.5]]
    )
