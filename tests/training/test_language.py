"""Reference, invariance and learning: the language objective on a tiny V3-shaped decoder."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.router import Balance
from deepseek_jax.models.build import build
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.optimizer import AdamW, make_optimizer
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import make_gradients, make_train_step

KEY = jax.random.key(0)
BALANCE = Balance(bias_rate=0.01, sequence_weight=0.2, uniform_weight=0.3, z_weight=0.4)
ROUTER = ("router/sequence_loss", "router/uniform_loss", "router/z_loss")
# Rows of 12: packed, short, full; the four microbatches hold very different numbers of tokens.
ROWS = ((5, 7), (3,), (12,), (2, 2, 2), (12,), (12,), (1,), (4, 8))


def tiny(**fields):
    fields = {"num_layers": 2, "num_dense_layers": 1, "num_mtp_layers": 1} | fields
    config = cases.decoder("mla", "sigmoid", num_shared_experts=1, **fields)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, balance=BALANCE))


@pytest.fixture(scope="module")
def model():
    return build(tiny(), Precision(compute="float32"))


@pytest.fixture(scope="module")
def params(model):
    return cases.random_params(model.shapes, 0)


@pytest.fixture(scope="module")
def batch():
    return cases.make_batch(ROWS, 12, 2, 0, 61)


@pytest.fixture(scope="module")
def objective(model):
    return make_language(Language(mtp_weight=0.5, z_weight=0.1, chunk=7), model)


@pytest.fixture(scope="module")
def gradients(objective):
    """(params, batch, coefficients, parts) -> (gradients, means, routing)."""

    def compute(params, batch, coefficients, parts):
        chosen = objective._replace(coefficients=coefficients)
        return make_gradients(chosen, parts)(params, batch, KEY, jnp.float32(1))

    return jax.jit(compute, static_argnums=3)


def test_coefficients_come_from_the_configs(objective):
    assert objective.coefficients == {
        "cross_entropy": 1.0,
        "mtp_loss": 0.5,
        "router/sequence_loss": 0.2,
        "router/uniform_loss": 0.3,
        "router/z_loss": 0.4,
    }
    assert objective.bias_rates == {"segment_1/block": 0.01, "mtp_0/block": 0.01}


def test_terms_are_means_of_what_the_model_gives(model, params, batch, objective, gradients):
    means = gradients(params, batch, objective.coefficients, 1)[1]
    output = jax.jit(model.apply)(
        params,
        batch["tokens"],
        segments=batch["segments"],
        positions=batch["positions"],
        next_tokens=batch["targets"][..., :1],
    )
    expected, square = {}, None
    for depth, (name, hidden) in enumerate(
        {"loss": output.hidden, "mtp_loss": output.mtp[0]}.items()
    ):
        logits = np.asarray(hidden, np.float64) @ params["head"]["weight"].astype(np.float64)
        lse = np.log(np.exp(logits).sum(-1))
        chosen = np.take_along_axis(logits, batch["targets"][..., depth, None], -1)[..., 0]
        weights = batch["weights"][..., depth]
        expected[name] = (weights * (lse - chosen)).sum() / weights.sum()
        square = (weights * lse**2).sum() / weights.sum() if square is None else square
    expected["z_loss"] = square
    expected["cross_entropy"] = expected["loss"] + 0.1 * square
    over = {"sequence_loss": len(ROWS), "uniform_loss": 1, "z_loss": sum(map(sum, ROWS))}
    for name, weight in over.items():
        sums = [float(getattr(block, name).sum()) for block in output.routing.values()]
        assert len(sums) == 2
        expected[f"router/{name}"] = sum(sums) / weight
    assert sorted(means) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(means[name], value, rtol=2e-5, err_msg=name)


def test_four_microbatches_give_the_gradient_of_one(params, batch, objective, gradients):
    sums = {k: v for k, v in objective.coefficients.items() if k != "router/uniform_loss"}
    coefficients = dict.fromkeys(objective.coefficients, 0.0) | sums
    one = gradients(params, batch, coefficients, 1)
    many = gradients(params, batch, coefficients, 4)
    whole = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(one[0])))
    for path, leaf in tree.flatten(one[0]).items():
        error = np.linalg.norm(leaf - tree.flatten(many[0])[path])
        assert error <= 1e-6 * whole, path
    for term, mean in one[1].items():
        if term != "router/uniform_loss":
            np.testing.assert_allclose(mean, many[1][term], rtol=1e-6, err_msg=term)
    for path, block in one[2].items():
        np.testing.assert_array_equal(block.counts, many[2][path].counts)
        assert int(block.counts.sum()) == 2 * sum(map(sum, ROWS))  # tokens x top-2


def test_every_term_is_positive_and_moves_what_it_should(params, batch, objective, gradients):
    parts = {
        "cross_entropy": "segment_0/block/attention/q/weight",
        "mtp_loss": "mtp_0/projection/weight",
        **dict.fromkeys(ROUTER, "segment_1/block/moe/router/weight"),
    }
    for term, path in parts.items():
        alone = dict.fromkeys(objective.coefficients, 0.0) | {term: 1.0}
        grads, means, _ = gradients(params, batch, alone, 1)
        assert float(means[term]) > 0, term
        assert np.abs(tree.flatten(grads)[path]).max() > 1e-6, term
        assert not np.abs(tree.flatten(grads)["segment_1/block/moe/router/bias"]).any(), term


def test_mtp_switched_off_needs_no_mtp_layer(model):
    objective = make_language(Language(mtp_weight=0.0), model)
    assert "mtp_loss" not in objective.coefficients
    assert objective.bias_rates == {"segment_1/block": 0.01}


def test_every_depth_has_its_name_and_share():
    model = build(tiny(num_mtp_layers=3))
    coefficients = make_language(Language(mtp_weight=0.3), model).coefficients
    assert [coefficients[f"mtp_loss{d}"] for d in ("", "_2", "_3")] == pytest.approx([0.1] * 3)


def test_experts_without_a_layer_are_refused():
    model = build(tiny(num_dense_layers=2, num_mtp_layers=0))
    with pytest.raises(InputError, match="leaves none of the 2 layers"):
        make_language(Language(), model)


def test_a_tiny_model_learns_a_batch_by_heart(model, batch):
    optimizer = make_optimizer(AdamW(weight_decay=0.0), model.specs)
    objective = make_language(Language(), model)
    step = jax.jit(
        make_train_step(
            make_gradients(objective), objective, optimizer, lambda _: 5e-3, clip_norm=1.0
        ),
        donate_argnums=0,
    )
    state = initial_state(model.init(KEY), optimizer, 1.0)
    losses = []
    for _ in range(150):
        state, metrics = step(state, batch, KEY)
        losses.append((float(metrics["loss"]), float(metrics["mtp_loss"])))
    assert losses[0][0] == pytest.approx(np.log(61), rel=0.02)
    assert losses[-1][0] < 0.6  # the first token of a document tells nothing of the second
    assert losses[-1][1] < 0.6
    for block in ("segment_1/block", "mtp_0/block"):
        bias = np.asarray(tree.flatten(state.params)[f"{block}/moe/router/bias"])
        steps = bias / BALANCE.bias_rate
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
        assert np.abs(steps).max() > 1


def sparse_model(attention, **fields):
    return build(cases.decoder(attention, "sigmoid", num_layers=2, num_dense_layers=1, **fields))


def trained(model, config, params, batch, steps, rate=5e-3):
    """(parameters, each step's metrics) of some steps on one batch."""
    objective = make_language(config, model)
    since = {path: 0 for path in tree.flatten(model.specs) if objective.trains(path)}
    optimizer = make_optimizer(AdamW(weight_decay=0.1), model.specs, since)
    step = jax.jit(make_train_step(make_gradients(objective), objective, optimizer, lambda _: rate))
    state, history = initial_state(params, optimizer, 1.0), []
    for _ in range(steps):
        state, metrics = step(state, batch, KEY)
        numbers = {name: x for name, x in metrics.items() if name not in ("expert_load", "checked")}
        history.append(jax.tree.map(float, numbers))
    return state.params, history


def test_an_indexer_warms_up_alone_and_then_learns_beside_the_model(batch):
    """First dense, nothing else moves; then it keeps four tokens, and each has its own loss."""
    model = sparse_model("mla_indexer", num_mtp_layers=1)
    start = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, 0))
    warm, history = trained(model, Language(indexer_warmup=True), start, batch, 60, 2e-2)
    first, last = (history[i]["attention/indexer_loss"] for i in (0, -1))
    assert 0 < last < 0.5 * first
    assert {metrics["attention/kept"] for metrics in history} == {1.0}
    assert history[0]["loss"] == pytest.approx(history[-1]["loss"], rel=1e-5)
    before, after = tree.flatten(start), tree.flatten(warm)
    for path, leaf in after.items():
        moved = np.abs(np.asarray(leaf) - before[path]).max()
        assert (moved > 1e-4) == ("/indexer/" in path), path

    both, history = trained(model, Language(mtp_weight=0.5), warm, batch, 60)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert 0.3 < history[0]["attention/kept"] < 0.9
    assert history[-1]["attention/indexer_loss"] < 3 * history[0]["attention/indexer_loss"]
    for path, leaf in tree.flatten(both).items():
        assert np.abs(np.asarray(leaf) - after[path]).max() > 1e-5, path


def test_an_indexers_loss_moves_it_alone_and_no_other_loss_does(batch):
    model = sparse_model("mla_indexer", num_mtp_layers=1)
    params = cases.random_params(model.shapes, 0)
    objective = make_language(Language(mtp_weight=0.5), model)
    for term, coefficient in objective.coefficients.items():
        chosen = objective._replace(coefficients={term: coefficient})
        run = jax.jit(make_gradients(chosen))
        grads, means, _ = run(params, batch, KEY, jnp.float32(1))
        assert float(means[term]) > 0, term
        index = term == "attention/indexer_loss"
        for path, leaf in tree.flatten(grads).items():
            if index or "/indexer/" in path:
                moves = index and "/indexer/" in path
                assert (np.abs(np.asarray(leaf)).max() > 1e-6) == moves, (term, path)


def test_the_part_of_pairs_that_is_kept_is_counted(batch):
    """Over microbatches too; a dense model has no such term."""
    for attention, least, most in (("gqa_gate", 0.4, 0.75), ("mla_indexer", 0.5, 0.9)):
        model = sparse_model(attention)
        run = make_gradients(make_language(Language(), model), 4)
        params = cases.random_params(model.shapes, 0)
        means = jax.jit(run)(params, batch, KEY, jnp.float32(1))[1]
        expected = cases.reference_forward(params, model.config, batch).selection.values()
        layers = [layer for block in expected for layer in block]
        pairs = sum(n * (n + 1) // 2 for row in ROWS for n in row) * len(layers)
        assert float(means["attention/kept"]) == pytest.approx(
            sum(layer.kept for layer in layers) / pairs
        )
        assert least < float(means["attention/kept"]) < most
    assert "attention/kept" not in make_language(Language(), build(tiny())).weights_fn(batch)


def test_a_gate_learns(batch):
    model = sparse_model("gqa_gate")
    _, history = trained(model, Language(), model.init(KEY), batch, 60)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_only_an_indexer_can_warm_up():
    for config in (Language(indexer_warmup=True, indexer_weight=0), Language(indexer_warmup=True)):
        with pytest.raises(InputError, match="needs a model whose attention has an indexer"):
            make_language(config, sparse_model("gqa_gate"))
