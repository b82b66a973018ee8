"""Reference: contrastive losses against transformers' CLIP and SigLIP, and torch in float64.

Invariance: what is not valid or a duplicate; degenerate embeddings; memory. Over devices:
tests/layers/test_contrastive.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deepseek_jax.ops.contrastive import (
    START,
    contrastive_terms,
    dense_losses,
    l2_normalized,
    temperature,
)

RNG = np.random.default_rng(0)
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = TINY | {"vocab_size": 40, "max_position_embeddings": 8}
VISION = TINY | {"image_size": 8, "patch_size": 4}


def mean(terms, name="loss"):
    total, weight = terms[name]
    return total / weight


@pytest.mark.parametrize(("kind", "rows"), [("softmax", 2), ("softmax", 5), ("sigmoid", 4)])
def test_losses_and_gradients_are_those_of_transformers(kind, rows):
    torch.manual_seed(rows)
    if kind == "softmax":
        text = transformers.CLIPTextConfig(**TEXT, eos_token_id=39, bos_token_id=1)
        vision = transformers.CLIPVisionConfig(**VISION)
        config = transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12
        )
        model = transformers.CLIPModel(config)
        assert model.logit_scale.item() == pytest.approx(START[kind][0], abs=1e-4)
    else:
        text = transformers.SiglipTextConfig(**TEXT, eos_token_id=39, bos_token_id=1)
        vision = transformers.SiglipVisionConfig(**VISION)
        config = transformers.SiglipConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict()
        )
        model = transformers.SiglipModel(config)
        start = torch.tensor(START[kind]) * torch.tensor([1.0, 0.3])  # of -10, loss is positives'
        model.logit_scale.data, model.logit_bias.data = start[:1].clone(), start[1:].clone()
    given = []
    for part in ("vision_model", "text_model") if kind == "sigmoid" else (
        "visual_projection", "text_projection"):  # fmt: skip
        getattr(model, part).register_forward_hook(lambda _, __, out: given.append(out))
    pixels, tokens = torch.randn(rows, 3, 8, 8), torch.randint(2, 38, (rows, 6))
    tokens[:, -1] = 39
    out = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
    images, texts = (getattr(x, "pooler_output", x) for x in given)
    images.retain_grad(), texts.retain_grad()
    out.loss.backward()
    inputs = [jnp.asarray(x.detach().numpy()) for x in (images, texts)]
    learned = [model.logit_scale] + ([model.logit_bias] if kind == "sigmoid" else [])
    inputs += [jnp.asarray(x.detach().numpy().reshape(())) for x in learned]
    slopes_of = jax.value_and_grad(
        lambda *x: mean(contrastive_terms(*x, kind=kind, chunk=2)), range(len(inputs))
    )
    value, grads = jax.jit(slopes_of)(*inputs)
    assert float(value) == pytest.approx(out.loss.item(), abs=1e-5)
    for mine, other in zip(grads, (images, texts, *learned), strict=True):
        other = other.grad.numpy().reshape(mine.shape)
        np.testing.assert_allclose(mine, other, atol=1e-3 * np.abs(other).max() + 1e-8)


def batch(rows, width=6):
    first, second = (RNG.normal(size=(rows, width)).astype(np.float32) for _ in range(2))
    groups = RNG.integers(0, max(2, rows // 2), rows).astype(np.int32)
    valid = RNG.random(rows) < 0.8
    valid[0] = True
    given = first, second, np.float32(1.2), np.float32(-0.7), groups, valid
    return tuple(map(jnp.asarray, given))


def theirs(first, second, log_temperature, bias, groups, valid, kind):
    """Sum over valid rows and its gradients, in float64, from the definition, row by row."""
    groups, valid = np.asarray(groups), np.asarray(valid)
    inputs = [
        torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
        for x in (first, second, log_temperature, bias)
    ]
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in inputs[:2])
    logits = inputs[2].exp() * a @ b.T + inputs[3]
    total = 0.0
    for i in np.flatnonzero(valid):
        others = [j for j in np.flatnonzero(valid) if groups[j] != groups[i]]
        if kind == "softmax":
            for line in (logits[i], logits[:, i]):
                total = total + (torch.logsumexp(line[[i, *others]], 0) - line[i]) / 2
        else:
            total = total - torch.nn.functional.logsigmoid(logits[i, i])
            total = total - torch.nn.functional.logsigmoid(-logits[i, others]).sum()
    total.backward()
    return total.item(), [x.grad.numpy() for x in inputs]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("rows", "chunk"), [(1, 4), (12, 4), (13, 5), (13, 100)])
def test_masks_are_those_of_the_definition_in_float64(kind, rows, chunk):
    given = batch(rows)
    value, grads = theirs(*given, kind)

    def chunked(*x):
        return contrastive_terms(*x, *given[4:], kind=kind, chunk=chunk)["loss"][0]

    def dense(*x):
        return dense_losses(*x, *given[4:], kind).sum()

    for form in (chunked, dense):
        found, slopes = jax.jit(jax.value_and_grad(form, range(4)))(*given[:4])
        assert float(found) == pytest.approx(value, rel=1e-5, abs=1e-5)
        for mine, other in zip(slopes, grads, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_rows_that_are_not_valid_and_duplicates_have_no_say(kind):
    first, second, *learned, _, _ = batch(6)

    def loss(*given):
        return contrastive_terms(*given[:2], *learned, *given[2:], kind=kind)["loss"][0]

    slopes_of = jax.jit(jax.value_and_grad(loss, (0, 1)))

    def both(first, second, groups, valid):
        return slopes_of(first, second, jnp.array([*groups]), valid)

    value, slopes = both(first[:4], second[:4], range(4), jnp.ones(4, bool))
    broken = [jnp.where(jnp.arange(6)[:, None] < 4, x, np.nan) for x in (first, second)]
    more, wider = both(*broken, range(6), jnp.arange(6) < 4)
    assert float(more) == pytest.approx(float(value), rel=1e-6)
    for mine, other in zip(wider, slopes, strict=True):
        np.testing.assert_allclose(mine[:4], other, atol=1e-6)
        assert not np.asarray(mine[4:]).any()
    # One caption: a row of the batch twice costs its own loss again, and nothing else.
    twice = [jnp.concatenate([x[:4], x[:1]]) for x in (first, second)]
    same, _ = both(*twice, (0, 1, 2, 3, 0), jnp.ones(5, bool))
    assert float(same) > float(value)
    alone, slopes = both(first, second, (0,) * 6, jnp.ones(6, bool))  # no negatives at all
    assert np.isfinite(alone)
    assert all(np.isfinite(x).all() for x in slopes)
    if kind == "softmax":
        assert float(alone) == 0


def test_reports_are_those_of_all_pairs():
    first, second, log_temperature, _, groups, valid = batch(40, 3)
    second = second + first
    terms = functools.partial(contrastive_terms, kind="softmax", chunk=7)
    found = jax.jit(terms)(first, second, log_temperature, None, groups, valid)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    cosines, groups, valid = np.asarray(a @ b.T), np.asarray(groups), np.asarray(valid)
    negative = valid[:, None] & valid[None] & (groups[:, None] != groups[None])
    for name, square in (("recall_at_1", cosines), ("recall_at_1_back", cosines.T)):
        best = np.where(negative, square, -2).max(1)
        hits = (np.diagonal(cosines) > best)[valid]
        assert 0 < hits.mean() < 1
        assert float(mean(found, name)) == pytest.approx(hits.mean())
    rows = np.where(negative, cosines, 0).sum(1) / np.maximum(negative.sum(1), 1)
    assert float(mean(found, "negative_cosine")) == pytest.approx(rows[valid].mean(), abs=1e-6)
    own = np.diagonal(cosines)[valid].mean()
    assert float(mean(found, "positive_cosine")) == pytest.approx(own, abs=1e-6)
    assert float(found["loss"][1]) == valid.sum()


def test_collapsed_embeddings_find_nothing_and_cost_the_logarithm_of_the_batch():
    same = jnp.asarray(np.tile(RNG.normal(size=(1, 33)), (16, 1)), jnp.float32)
    terms = functools.partial(contrastive_terms, kind="softmax", chunk=5)
    found = jax.jit(terms)(same, 2 * same, jnp.float32(3.0))
    assert float(mean(found)) == pytest.approx(np.log(16), rel=1e-5)
    assert float(found["recall_at_1"][0]) == float(found["recall_at_1_back"][0]) == 0


def test_lengths_leave_no_range_and_zero_stays_zero():
    x = jnp.array([[3.0, 4.0], [3e-25, 4e-25], [3e25, -4e25], [0.0, 0.0]])
    value, slope = jax.jit(
        lambda x: (l2_normalized(x), jax.grad(lambda x: l2_normalized(x).sum())(x))
    )(x)
    np.testing.assert_allclose(value, [[0.6, 0.8], [0.6, 0.8], [0.6, -0.8], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(slope[0], np.array([0.16, -0.12]) / 5, rtol=1e-5)
    assert np.isfinite(slope).all()
    assert not np.asarray(slope[3]).any()
    assert l2_normalized(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32


def test_the_temperature_stops_at_100_and_comes_down_again():
    assert float(temperature(jnp.float32(9.0))) == pytest.approx(100, rel=1e-5)
    slope = jax.grad(lambda x, sign: sign * temperature(x))
    assert float(slope(jnp.float32(9.0), -1.0)) == 0  # descent would go further up
    assert float(slope(jnp.float32(9.0), 1.0)) == pytest.approx(100, rel=1e-5)
    assert float(slope(jnp.float32(2.0), -1.0)) == pytest.approx(-np.exp(2), rel=1e-5)


def test_all_logits_never_exist():
    given = batch(64, 3)

    def largest(chunk):
        def loss(first, second):
            terms = contrastive_terms(first, second, *given[2:], kind="softmax", chunk=chunk)
            return terms["loss"][0]

        program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*given[:2]))
        return max(int(a) * int(b) for a, b in re.findall(r"f32\[(\d+),(\d+)\]", program))

    assert largest(64) == 64 * 64  # the test can see them
    assert largest(4) == 64 * 4
