"""Reference: the decoder against the NumPy model; invariance: causality, packing, padding, experts.

Every attention x router x dispatch runs operation by operation (`jax.disable_jit`: compiling 84
models would take minutes); four whole models, scanned and with MTP, run compiled.
"""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from deepseek_jax.layers.moe import Capacity

PRODUCT = [pytest.param(i, *names, id="-".join(names)) for i, names in enumerate(cases.PRODUCT)]
WHOLE = {
    "v3": cases.decoder(
        "mla_yarn", "sigmoid_grouped", num_shared_experts=2, num_layers=3, num_dense_layers=1,
        num_mtp_layers=2,
    ),
    "v2": cases.decoder("mla_q_rank", "softmax_grouped", num_shared_experts=1, num_layers=2),
    "window": cases.decoder(
        "gqa_window", "two_groups_of_three", "capacity", num_experts=12, num_layers=2,
        num_mtp_layers=1, tie_embeddings=True,
    ),
    "v32": cases.decoder("mla_indexer", "sigmoid", num_layers=2, num_mtp_layers=1),
    "gate": cases.decoder("gqa_gate", "softmax", num_layers=2),
    "dense": cases.decoder(
        "gqa_bias", None, num_layers=2, num_mtp_layers=1, tie_embeddings=True
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    """Each whole model's case, compiled once."""
    return {name: cases.case(config) for name, config in WHOLE.items()}


def assert_routing(ours, expected):
    """What was dispatched, exactly; statistics and losses, closely."""
    assert ours.keys() == expected.keys()
    for path, layers in expected.items():
        for r, layer in enumerate(layers):
            got = jax.tree.map(lambda leaf, r=r: np.asarray(leaf[r]), ours[path])
            np.testing.assert_array_equal(got.counts, layer.counts)
            assert (got.dropped, got.tokens) == (layer.dropped, layer.tokens)
            for name in ("entropy", "sequence_loss", "uniform_loss", "z_loss"):
                np.testing.assert_allclose(
                    getattr(got, name), getattr(layer, name), rtol=2e-5, atol=1e-6, err_msg=name
                )


def assert_matches(case, batch, output, expected, atol=2e-5):
    """Logits at every real token, at every depth, and the routing."""
    real = batch["segments"] > 0
    logits = case.logits(output.hidden)
    np.testing.assert_allclose(logits[real], expected.logits[real], atol=atol, rtol=0)
    assert len(output.mtp) == len(expected.mtp)
    for hidden, other in zip(output.mtp, expected.mtp_logits, strict=True):
        logits = case.logits(hidden)
        np.testing.assert_allclose(logits[real], other[real], atol=atol, rtol=0)
    assert_routing(output.routing, expected.routing)
    assert output.selection.keys() == expected.selection.keys()
    for path, layers in expected.selection.items():
        found = output.selection[path]
        np.testing.assert_array_equal(found.kept, [layer.kept for layer in layers])
        apart = [layer.divergence for layer in layers]
        np.testing.assert_allclose(found.divergence, apart, rtol=2e-5, err_msg=path)


def with_new_tokens_after(batch, t):
    """The batch with other tokens (and what is known of them) after position t, in every row."""
    new = {name: np.array(leaf) for name, leaf in batch.items()}
    after = np.arange(batch["tokens"].shape[1]) > t
    real = batch["segments"] > 0
    new["tokens"] = np.where(after & real, batch["tokens"] % 59 + 1, batch["tokens"])
    for d in range(batch["targets"].shape[-1]):
        later = (np.arange(batch["tokens"].shape[1]) + 1 + d > t) & (batch["weights"][..., d] > 0)
        new["targets"][..., d] = np.where(
            later, batch["targets"][..., d] % 59 + 1, batch["targets"][..., d]
        )
    assert (new["tokens"] != batch["tokens"])[:, t + 1 :][real[:, t + 1 :]].all()
    return new


@pytest.mark.parametrize(("index", "attention", "router", "dispatch"), PRODUCT)
def test_every_combination_is_the_reference_and_causal(index, attention, router, dispatch):
    config = cases.decoder(
        attention,
        router,
        dispatch,
        num_shared_experts=index % 3,
        tie_embeddings=index % 2 == 0,
        **({"num_layers": 2, "num_dense_layers": 1} if index % 5 == 0 else {}),
    )
    case = cases.case(config)
    t = 4 + index % 8
    changed = with_new_tokens_after(case.batch, t)
    with jax.disable_jit():
        output = cases.forward(case.model, case.params, case.batch)
        assert_matches(case, case.batch, output, case.expected)
        other = cases.forward(case.model, case.params, changed)
    np.testing.assert_allclose(
        output.hidden[:, : t + 1], other.hidden[:, : t + 1], atol=1e-6, rtol=0
    )
    assert np.abs(output.hidden - other.hidden)[:, t + 1 :].max() > 0.1
    for layer in case.expected.routing[f"segment_{len(config.segments) - 1}/block"]:
        num_active = config.moe.router.num_active_experts
        assert layer.counts.sum() + layer.dropped == layer.tokens * num_active
        assert (layer.dropped > 0) == (dispatch == "capacity")


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_are_the_reference(whole, name):
    case = whole[name]
    assert_matches(case, case.batch, case.apply(case.params, case.batch), case.expected)


@pytest.mark.parametrize("name", ["v3", "window", "v32", "gate"])
def test_longer_rows_are_the_reference(name):
    """More than one block of queries; experts whose tile overflows, or whose room runs out."""
    case = cases.case(WHOLE[name], rows=((150,), (100, 40)), length=150, margin=5e-6)
    layers = [layer for layers in case.expected.routing.values() for layer in layers]
    assert any(layer.counts.max() > 1.5 * layer.counts.mean() or layer.dropped for layer in layers)
    assert_matches(case, case.batch, case.apply(case.params, case.batch), case.expected)


def test_a_thousand_experts_on_two_levels():
    """More experts than choices: only the chosen experts' weights are read."""
    config = cases.decoder("gqa_window", "thousand", num_experts=1024)
    case = cases.case(config, margin=1e-7)
    assert_matches(case, case.batch, case.apply(case.params, case.batch), case.expected)
    counts = case.expected.routing["segment_0/block"][0].counts
    assert (counts > 0).sum() > 60


def test_without_segments_every_row_is_one_document(whole):
    case = whole["v2"]
    tokens = case.batch["tokens"]
    batch = cases.make_batch(((16,),) * len(tokens), 16, 1, 0, 61) | {"tokens": tokens}
    output = case.apply(case.params, batch)
    bare = jax.jit(case.model.apply)(case.params, jnp.asarray(tokens))
    np.testing.assert_allclose(bare.hidden, output.hidden, atol=1e-5, rtol=0)
    assert bare.mtp == ()


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("t", [0, 6, 14])
def test_new_tokens_leave_the_past_alone(whole, name, t):
    case = whole[name]
    first = case.apply(case.params, case.batch)
    second = case.apply(case.params, with_new_tokens_after(case.batch, t))
    np.testing.assert_allclose(first.hidden[:, : t + 1], second.hidden[:, : t + 1], atol=1e-6)
    assert np.abs(first.hidden - second.hidden)[:, t + 1 :].max() > 0.1
    if isinstance(getattr(case.config.moe, "dispatch", None), Capacity):
        return  # an MTP layer sees token t+1 at t: its drops may move one position earlier
    for d, (one, two) in enumerate(zip(first.mtp, second.mtp, strict=True)):
        known = max(t - d, 0)  # depth d has seen tokens up to its position + 1 + d
        # A block more each depth: float32 sums in another order, where a token moves between its
        # expert's tile and the overflow.
        np.testing.assert_allclose(one[:, :known], two[:, :known], atol=1e-6 * (1 + d))


@pytest.mark.parametrize("name", ["v3", "v2", "v32", "gate", "dense"])
def test_packing_changes_no_tokens_loss(whole, name):
    """Capacity is left out: what an expert drops depends on the company by design."""
    case = whole[name]
    packed = cases.make_batch(((5, 6, 5), (9, 7), (16,)), 16, 3, 1, 61)
    alone = [
        {
            key: np.where(
                (packed["segments"][row] == number).reshape(-1, *[1] * (leaf.ndim - 2)),
                leaf[row],
                0,
            )
            for key, leaf in packed.items()
        }
        for row, number in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1))
    ]
    starts = [int(np.argmax(one["segments"] > 0)) for one in alone]
    alone = [  # moved to the row's start
        {key: np.roll(leaf, -start, axis=0) for key, leaf in one.items()}
        for one, start in zip(alone, starts, strict=True)
    ]
    num_targets = 1 + case.config.num_mtp_layers
    losses = []
    for rows in (packed, stack(alone[:3]), stack(alone[3:])):
        rows = rows | {key: rows[key][..., :num_targets] for key in ("targets", "weights")}
        losses.append(token_losses(case, rows))
    for depth in range(num_targets):
        together = losses[0][depth]
        apart = np.concatenate([losses[1][depth], losses[2][depth]])
        assert len(together) == len(apart) > 20
        np.testing.assert_allclose(together, apart, atol=1e-5, rtol=0)


def stack(rows):
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def token_losses(case, batch):
    """Every target's loss, row by row, for each depth."""
    output = case.apply(case.params, batch)
    out = []
    for depth, hidden in enumerate((output.hidden, *output.mtp)):
        logits = np.asarray(case.logits(hidden), np.float64)
        losses = reference.token_losses(logits, batch["targets"][..., depth])
        out.append(losses[batch["weights"][..., depth] > 0])
    return out


@pytest.mark.parametrize("name", WHOLE)
def test_padding_changes_nothing(whole, name):
    case = whole[name]
    padding = case.batch["segments"] == 0
    assert padding.any()
    noise = {name: np.array(leaf) for name, leaf in case.batch.items()}
    noise["tokens"][padding] = 7
    noise["positions"][padding] = 3
    noise["targets"][padding] = 5
    first, second = (case.apply(case.params, batch) for batch in (case.batch, noise))
    np.testing.assert_array_equal(first.hidden[~padding], second.hidden[~padding])
    for one, two in zip(
        jax.tree.leaves(first.routing), jax.tree.leaves(second.routing), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def permuted_experts(params, order, group_order):
    """The same model with its experts (and a two-level router's groups) in another order."""

    def walk(node, path):
        if isinstance(node, dict):
            return {key: walk(leaf, (*path, key)) for key, leaf in node.items()}
        if "experts" in path:
            return node[:, order]
        if "groups" in path:
            return node[..., group_order]
        return node[..., order] if "router" in path else node

    return walk(params, ())


@pytest.mark.parametrize("name", ["v3", "v2", "window"])
def test_permuting_experts_changes_nothing_visible(whole, name):
    case = whole[name]
    rng = np.random.default_rng(3)
    groups = case.config.moe.router.num_groups
    size = case.config.moe.num_experts // groups
    group_order = rng.permutation(groups)
    inside = [rng.permutation(size) for _ in range(groups)]
    order = np.concatenate([g * size + inside[g] for g in group_order])
    assert sorted(order) == list(range(groups * size)) != list(order)
    first = case.apply(case.params, case.batch)
    second = case.apply(permuted_experts(case.params, order, group_order), case.batch)
    for one, two in zip((first.hidden, *first.mtp), (second.hidden, *second.mtp), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6)
    for path, routing in first.routing.items():
        np.testing.assert_array_equal(routing.counts[:, order], second.routing[path].counts)
        back = np.append(order, len(order))[second.routing[path].chosen]
        np.testing.assert_array_equal(routing.chosen, back)
        rest = (r._replace(counts=0, chosen=0) for r in (routing, second.routing[path]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *rest)


def test_the_router_bias_chooses_but_does_not_weigh(whole):
    """A bias that lifts one expert sends every token there, at the weight its sigmoid gives."""
    case = whole["v3"]
    params = jax.tree.map(np.array, case.params)
    params["segment_1"]["block"]["moe"]["router"]["bias"][:, 5] = 50.0
    params = jax.tree.map(jnp.asarray, params)
    output = case.apply(params, case.batch)
    counts = output.routing["segment_1/block"].counts
    tokens = (case.batch["segments"] > 0).sum()
    assert (np.asarray(counts)[:, 5] == tokens).all()
    expected = cases.reference_forward(params, case.config, case.batch)
    assert_matches(dataclasses.replace(case, params=params), case.batch, output, expected)
