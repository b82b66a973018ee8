"""Invariance: remat, unrolling and precision; round trip: what a model says of its parameters."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.build import build
from deepseek_jax.models.counts import attention_products, num_params, train_flops_per_token
from deepseek_jax.models.decoder import layer_table

CONFIG = cases.decoder(
    "mla_q_rank", "sigmoid_grouped", num_shared_experts=1, num_layers=5, num_dense_layers=2,
    num_mtp_layers=1, init_scale=0.2,
)  # fmt: skip


def loss_of(case, model):
    """(params) -> a loss through every output of the model."""

    def loss(params):
        output = cases.forward(model, params, case.batch)
        balance = sum(routing.sequence_loss.sum() for routing in output.routing.values())
        return sum((hidden**2).mean() for hidden in (output.hidden, *output.mtp)) + balance

    return loss


@pytest.fixture(scope="module")
def plain():
    """Loss and gradients of the plain model."""
    case = cases.case(CONFIG)
    differentiate = jax.jit(jax.value_and_grad(loss_of(case, case.model)))
    return case, differentiate(case.params)


@pytest.mark.parametrize(("remat", "unroll"), [("dots", 1), ("full", 2), ("none", 8)])
def test_remat_and_unrolling_change_nothing(plain, remat, unroll):
    case, (value, gradients) = plain
    config = dataclasses.replace(CONFIG, remat=remat, unroll=unroll)
    model = build(config, Precision(compute="float32"))
    differentiate = jax.jit(jax.value_and_grad(loss_of(case, model)))
    other_value, other_gradients = differentiate(case.params)
    assert float(value) == pytest.approx(float(other_value), rel=1e-6)
    for path, gradient in tree.flatten(gradients).items():
        other = tree.flatten(other_gradients)[path]
        np.testing.assert_allclose(gradient, other, atol=1e-6, rtol=1e-5, err_msg=path)


def test_remat_keeps_less():
    """Bytes that the backward pass waits for: none > dots > full."""

    def kept(remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        model = build(config, Precision(compute="float32"))
        case = cases.case(CONFIG)
        pull = jax.eval_shape(lambda p: jax.vjp(loss_of(case, model), p)[1], case.params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    everything, dots, little = kept("none"), kept("dots"), kept("full")
    assert everything > 1.2 * dots > 1.2 * little


@pytest.fixture(scope="module")
def initial():
    """A model whose parameters are stored in bfloat16, and two starts of it."""
    model = build(CONFIG, Precision(compute="float32", params="bfloat16"))
    return model, [model.init(jax.random.key(seed)) for seed in (3, 4)]


def test_initial_parameters(initial):
    model, (params, other) = initial
    flat = tree.flatten(params)
    shapes = tree.flatten(model.shapes)
    assert {p: (x.shape, x.dtype) for p, x in flat.items()} == {
        p: (x.shape, x.dtype) for p, x in shapes.items()
    }
    for path, leaf in flat.items():
        if path.endswith("scale"):
            assert (leaf == 1).all()
        elif path.endswith("bias"):
            assert not leaf.any()
        else:
            assert float(leaf.std()) == pytest.approx(0.2, rel=0.2), path
            assert abs(float(leaf.mean())) < 0.2 * 5 / np.sqrt(leaf.size), path
    values = [
        np.asarray(leaf).reshape(-1)[:8].tobytes() for p, leaf in flat.items() if "weight" in p
    ]
    assert len(set(values)) == len(values)  # no two leaves alike
    stacked = np.asarray(params["segment_1"]["block"]["moe"]["experts"]["gate"], np.float32)
    matrices = stacked.reshape(-1, *stacked.shape[2:])
    assert len({m.tobytes() for m in matrices}) == len(matrices)  # layers and experts differ
    for path, leaf in tree.flatten(params).items():
        if "weight" in path:
            assert (leaf != tree.flatten(other)[path]).mean() > 0.9


def test_a_leaf_starts_the_same_in_another_model(initial):
    """It depends on the key and its path: changing one part leaves the others as they were."""
    _, (params, _) = initial
    smaller = dataclasses.replace(CONFIG, num_mtp_layers=0, num_layers=2)
    smaller = build(smaller, Precision(params="bfloat16")).init(jax.random.key(3))
    for path in ("head", "embedding"):
        np.testing.assert_array_equal(smaller[path]["weight"], params[path]["weight"])


def test_specs_describe_every_leaf():
    model = build(CONFIG)
    shapes, specs = tree.flatten(model.shapes), tree.flatten(model.specs)
    assert shapes.keys() == specs.keys()
    for path, spec in specs.items():
        shape = shapes[path].shape
        assert len(spec.axes) == len(shape), path
        assert (spec.axes[0] == "layers") == ("/block/" in path), path
        assert not set(spec.reduced) & set(spec.outputs), path
        matrix = not path.endswith(("scale", "bias"))
        assert bool(spec.reduced) == bool(spec.outputs) == matrix, path
        if matrix:  # what is neither summed nor produced is a batch of matrices
            batch = set(range(len(shape))) - set(spec.reduced) - set(spec.outputs)
            assert {spec.axes[i] for i in batch} <= {"layers", "experts"}, path


def test_every_layer_stands_in_the_table_once():
    table = layer_table(CONFIG)
    assert table == {
        "segment_0/block": (0, 1), "segment_1/block": (2, 3, 4), "mtp_0/block": (5,),
    }  # fmt: skip
    shapes = tree.flatten(build(CONFIG).shapes)
    for path, layers in table.items():
        assert shapes[f"{path}/mlp_norm/scale"].shape[0] == len(layers)
    assert layer_table(cases.decoder("gqa", None, num_layers=3)) == {"segment_0/block": (0, 1, 2)}


def test_abstract_initialization_makes_no_arrays():
    model = build(CONFIG)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    assert tree.flatten(abstract).keys() == tree.flatten(model.shapes).keys()


@pytest.mark.parametrize("name", ["gqa_bias", "mla", "mla_q_rank"])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_of_parameters_and_flops(name, tied):
    """By hand from the shapes of the papers."""
    config = cases.decoder(
        name, "softmax", num_shared_experts=2, num_layers=3, num_dense_layers=1, tie_embeddings=tied
    )
    d, f, expert, v = 32, 48, 16, 61
    attention = {
        "gqa_bias": 4 * d * 4 * 8,
        "mla": d * 4 * 12 + d * 20 + 16 * 4 * 14 + 4 * 6 * d,
        "mla_q_rank": d * 12 + 12 * 4 * 12 + d * 20 + 16 * 4 * 14 + 4 * 6 * d,
    }[name]
    small = {"gqa_bias": 3 * 4 * 8, "mla": 16, "mla_q_rank": 16 + 12}[name] + 2 * d
    shared, routed, router = 3 * d * 2 * expert, 3 * d * expert, d * 8
    common = 3 * (attention + small) + 3 * d * f + 2 * (shared + router) + d + v * d * (2 - tied)
    model = build(config)
    assert num_params(model) == (common + 2 * 8 * routed, common + 2 * 2 * routed)
    matmuls = 3 * attention + 3 * d * f + 2 * (shared + router + 2 * routed) + v * d
    width = {"gqa_bias": 16, "mla": 18, "mla_q_rank": 18}[name]
    scores = 3 * 4 * width * (100 + 1) / 2
    assert train_flops_per_token(model, 100) == pytest.approx(6 * (matmuls + scores))


def half_precision(config, compute):
    """Each real token's cosine between hidden states in half precision and the reference's."""
    case = cases.case(config)
    model = build(config, Precision(compute=compute))
    run = jax.jit(lambda p, b: cases.forward(model, p, b))
    output = run(case.params, case.batch)
    assert output.hidden.dtype == jnp.dtype(compute)
    assert model.logits(case.params, output.hidden).dtype == jnp.float32
    for routing in output.routing.values():
        floats = (routing.entropy, routing.sequence_loss, routing.uniform_loss, routing.z_loss)
        assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    real = case.batch["segments"] > 0
    expected = np.concatenate([case.expected.hidden[real], *(h[real] for h in case.expected.mtp)])
    ours = np.concatenate([np.asarray(h)[real] for h in (output.hidden, *output.mtp)]).astype(float)
    norms = np.sqrt((ours**2).sum(-1) * (expected**2).sum(-1))
    return (ours * expected).sum(-1) / norms


@pytest.mark.parametrize("length", [3, 100])
def test_a_sparse_attention_counts_what_it_keeps(length):
    """Pairs counted one by one; an indexer's own scores are of all of them."""
    seen = np.arange(1, length + 1)
    window, index, gate = (
        cases.ATTENTIONS[name] for name in ("gqa_window", "mla_indexer", "gqa_gate")
    )
    keys = 4 * (8 + 8)
    found = {a: attention_products(a, length) for a in (window, index, gate)}
    assert found[window] == pytest.approx(keys * np.minimum(seen, 3).mean())
    latent, scores = 4 * (8 + 4 + 6) * np.minimum(seen, 4).mean(), 16 * (6 + 1) * seen.mean()
    assert found[index] == pytest.approx(latent + scores)
    assert found[gate] == pytest.approx(keys * np.ceil(0.4 * seen - 1e-9).mean())


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_half_precision_agrees_with_float32(compute):
    """Every token where nothing is chosen; with choices, all but the few near a tie."""
    everyone = cases.decoder(
        "mla_q_rank", "everyone", num_shared_experts=1, num_layers=3, num_dense_layers=1
    )
    assert half_precision(everyone, compute).min() > 0.999
    routed = half_precision(CONFIG, compute)
    assert np.median(routed) > 0.9995
    assert (routed > 0.999).mean() > 0.8


def test_parameters_may_be_stored_in_bfloat16_but_the_router_bias_stays(initial):
    for path, leaf in tree.flatten(initial[1][0]).items():
        expected = "float32" if path.endswith("router/bias") else "bfloat16"
        assert leaf.dtype == jnp.dtype(expected), path


def test_a_wrong_leaf_is_named():
    case = cases.case(CONFIG)
    params = jax.tree.map(lambda x: x, case.params)
    params["segment_1"]["block"]["moe"]["router"]["weight"] = jnp.zeros((3, 32, 9))
    with pytest.raises(ValueError, match=r"router/weight must have shape .*\(32, 8\).*\(32, 9\)"):
        case.model.apply(params, jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"unroll": 0}, "unroll"),
        ({"num_dense_layers": 3}, "num_dense_layers is 3"),
        ({"num_dense_layers": -1}, "num_dense_layers is -1"),
        ({"num_mtp_layers": -1}, "num_mtp_layers is -1"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"init_scale": -1.0}, "init_scale"),
    ],
)
def test_impossible_decoders_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        cases.decoder("mla", "sigmoid", **({"num_layers": 2} | fields))
