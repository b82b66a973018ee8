"""Reference: gradients of the whole loss against finite differences of the float64 NumPy model.

Each weight is checked along its own gradient (the slope there is the gradient's length: every
element counts) and along a random direction. Invariance: no gradient flows from past to future.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from deepseek_jax.core import tree
from deepseek_jax.ops.losses import cross_entropy

STEP = 1e-5
TERMS = ("main", "mtp", "sequence", "uniform", "z", "index")
SLOPES = {"main": 1.0, "mtp": 0.7, "sequence": 0.5, "uniform": 0.6, "z": 0.1, "index": 0.8}
Z_WEIGHT = 0.03

COMBINATIONS = [(r, d) for r in cases.ROUTERS for d in cases.DISPATCHES]
# Every attention and every router x dispatch, not every triple: attention knows no router.
SMALL = {
    f"{attention}-{router}-{dispatch}": cases.decoder(
        attention, router, dispatch, num_shared_experts=i % 3, tie_embeddings=i % 2 == 0
    )
    for i, ((router, dispatch), attention) in enumerate(
        zip(COMBINATIONS, list(cases.ATTENTIONS) * 2, strict=False)
    )
}
WHOLE = {
    "v3": cases.decoder(
        "mla_yarn",
        "sigmoid_grouped",
        num_shared_experts=1,
        num_layers=3,
        num_dense_layers=1,
        num_mtp_layers=2,
        remat="dots",
    ),
    "window": cases.decoder(
        "gqa_window",
        "two_groups_of_three",
        "capacity",
        num_experts=12,
        num_layers=2,
        num_mtp_layers=1,
        tie_embeddings=True,
        unroll=2,
    ),
}
SPARSE = cases.decoder("mla_indexer", "sigmoid_grouped", num_layers=2, num_mtp_layers=1)
CONFIGS = SMALL | WHOLE | {"sparse": SPARSE}
PAST = 5


def terms(case, params, batch):
    """The JAX model's loss, term by term; `past` is of the hidden states up to position PAST."""
    output = cases.forward(case.model, params, batch)
    head = case.model.head(params)

    def entropy(hidden, depth, z_weight):
        weights = jnp.asarray(batch["weights"][..., depth]).reshape(-1)
        targets = jnp.asarray(batch["targets"][..., depth]).reshape(-1)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return cross_entropy(flat, head, targets, weights, z_weight, 11)[0] / weights.sum()

    blocks = output.routing.values()
    return {
        "main": entropy(output.hidden, 0, Z_WEIGHT),
        "mtp": sum(entropy(hidden, d, 0.0) for d, hidden in enumerate(output.mtp, start=1)),
        "sequence": sum(block.sequence_loss.sum() for block in blocks),
        "uniform": sum(block.uniform_loss.sum() for block in blocks),
        "z": sum((block.z_loss / block.tokens).sum() for block in blocks),
        "index": sum(jnp.sum(block.divergence) for block in output.selection.values()),
        "past": (output.hidden[:, : PAST + 1] ** 2).sum(),
    }


def reference_terms(params, config, batch, before=None):
    """The same from the NumPy model."""
    result = cases.reference_forward(params, config, batch, before)

    def entropy(logits, depth, z_weight):
        weights = batch["weights"][..., depth]
        losses = reference.token_losses(logits, batch["targets"][..., depth])
        losses = losses + z_weight * reference.logsumexp(logits) ** 2
        return (weights * losses).sum() / weights.sum()

    blocks = [layer for layers in result.routing.values() for layer in layers]
    return {
        "main": entropy(result.logits, 0, Z_WEIGHT),
        "mtp": sum(entropy(logits, d, 0.0) for d, logits in enumerate(result.mtp_logits, start=1)),
        "sequence": sum(block.sequence_loss for block in blocks),
        "uniform": sum(block.uniform_loss for block in blocks),
        "z": sum(block.z_loss / block.tokens for block in blocks),
        "index": sum(layer.divergence for layers in result.selection.values() for layer in layers),
    }


def total(values):
    return sum(SLOPES[name] * values[name] for name in TERMS)


def assert_gradients(case, gradients):
    flat = tree.flatten(reference.float64(case.params))
    ours = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(gradients).items()}
    assert flat.keys() == ours.keys()
    rng = np.random.default_rng(0)

    def slope(path, direction):
        def loss(step):
            moved = unflatten(flat | {path: flat[path] + step * direction})
            return total(reference_terms(moved, case.config, case.batch, case.expected))

        return (loss(STEP) - loss(-STEP)) / (2 * STEP)

    for path, gradient in ours.items():
        length = np.sqrt((gradient**2).sum())
        if path.endswith("router/bias"):
            assert length == 0, path  # chooses, never trains
            continue
        assert length > 1e-4, path
        random = rng.normal(size=gradient.shape)
        random /= np.sqrt((random**2).sum())
        for direction in (gradient / length, random):
            expected = (gradient * direction).sum()
            assert abs(slope(path, direction) - expected) <= 1e-4 * length, path


def unflatten(flat):
    out = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return out


@functools.cache
def gradients_of(case):
    """(params, batch, slopes) -> gradients of the sloped sum of the terms, and the terms."""

    def loss(params, batch, slopes):
        values = terms(case, params, batch)
        return sum(slopes[name] * value for name, value in values.items()), values

    return jax.jit(jax.grad(loss, has_aux=True))


def slopes_of(**slopes):
    return {name: jnp.float32(slopes.get(name, 0)) for name in (*TERMS, "past")}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_reference(name):
    """Also: every auxiliary and MTP loss has the reference's value, and each alone a gradient."""
    case = cases.case(CONFIGS[name])
    gradients, values = gradients_of(case)(case.params, case.batch, slopes_of(**SLOPES))
    expected = reference_terms(case.params, case.config, case.batch)
    for term in TERMS:
        np.testing.assert_allclose(values[term], expected[term], rtol=1e-5, err_msg=term)
    assert_gradients(case, gradients)


@pytest.mark.parametrize("name", WHOLE)
def test_every_loss_alone_reaches_every_router(name):
    case = cases.case(WHOLE[name])
    for term in ("mtp", "sequence", "uniform", "z"):
        gradients, values = gradients_of(case)(case.params, case.batch, slopes_of(**{term: 1}))
        assert values[term] > 1e-3
        flat = tree.flatten(gradients)
        routers = [np.abs(leaf).max() for path, leaf in flat.items() if "router/weight" in path]
        assert len(routers) == len(case.expected.routing), "those of the MTP layers too"
        assert min(routers) > 1e-6, term
        assert np.abs(flat["embedding/weight"]).max() > 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_from_the_past_to_later_tokens(name):
    """Tokens after PAST get ids of their own, so their embeddings' gradients are theirs alone."""
    case = cases.case(CONFIGS[name])
    table_size = case.config.vocab_size
    tokens = np.random.default_rng(1).integers(0, 30, case.batch["tokens"].shape)
    tokens[:, PAST + 1 :] += 30
    batch = case.batch | {"tokens": tokens.astype(np.int32)}
    gradients, _ = gradients_of(case)(case.params, batch, slopes_of(past=1))
    gradient = np.asarray(gradients["embedding"]["weight"])
    used = np.isin(np.arange(table_size), tokens[:, : PAST + 1])
    assert np.abs(gradient[used]).max(-1).min() > 1e-5
    assert not gradient[30:].any()
