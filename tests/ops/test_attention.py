"""Reference: attention's fast form against its plain one and torch's, forward and backward."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from deepseek_jax.core.target import compiling_for
from deepseek_jax.ops import attention
from deepseek_jax.ops.attention import (
    causal_attention,
    causal_mask,
    full_attention,
    masked_attention,
    preferred,
)

B, T, N, K, H, HV = 2, 300, 4, 2, 6, 5  # three blocks of queries, the last one short
RNG = np.random.default_rng(0)
Q = RNG.normal(size=(B, T, N, H)).astype(np.float32)
KEYS = RNG.normal(size=(B, T, K, H)).astype(np.float32)
VALUES = RNG.normal(size=(B, T, K, HV)).astype(np.float32)
SLOPE = RNG.normal(size=(B, T, N, HV)).astype(np.float32)
SCALE = 0.7
SEGMENTS = np.stack(
    [np.repeat([1, 2, 3, 0], [150, 100, 30, 20]), np.repeat([1, 2], [129, 171])]
).astype(np.int32)
WINDOWS = [None, 1, 5, 140, 1000]


def naive(q, k, v, segments, window):
    """[N, ...] float64, the whole square."""
    group = N // K
    k, v = (np.repeat(x.astype(np.float64), group, axis=2) for x in (k, v))
    segments = np.ones((B, T), int) if segments is None else segments
    allowed = reference.allowed_pairs(segments, window)
    return reference.attend(q.astype(np.float64), k, v, allowed, SCALE)[0]


@functools.cache
def compiled(implementation, window, packed):
    """(q, k, v) -> the result and its gradients against SLOPE."""
    segments = jnp.asarray(SEGMENTS) if packed else None

    def attend(*inputs):
        out, pull = jax.vjp(
            lambda *x: causal_attention(
                *x, segments, scale=SCALE, window=window, implementation=implementation
            ),
            *inputs,
        )
        return out, pull(jnp.asarray(SLOPE, out.dtype))

    return jax.jit(attend)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_are_the_reference_forward_and_backward(window, packed):
    inputs = tuple(map(jnp.asarray, (Q, KEYS, VALUES)))
    out, slopes = compiled("blocks", window, packed)(*inputs)
    plain_out, plain_slopes = compiled("reference", window, packed)(*inputs)
    expected = naive(Q, KEYS, VALUES, SEGMENTS if packed else None, window)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(plain_out, expected, atol=1e-5)
    for mine, other in zip(slopes, plain_slopes, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_plain_attention_is_torchs_forward_and_backward():
    def heads_first(x):
        return torch.tensor(x, dtype=torch.float64).swapaxes(1, 2).requires_grad_()

    inputs = [heads_first(x) for x in (Q, KEYS, VALUES)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=True, scale=SCALE, enable_gqa=True
    )
    out.backward(torch.tensor(SLOPE, dtype=torch.float64).swapaxes(1, 2))
    ours, slopes = compiled("reference", None, False)(*map(jnp.asarray, (Q, KEYS, VALUES)))
    np.testing.assert_allclose(ours, out.detach().swapaxes(1, 2), atol=1e-5)
    for mine, other in zip(slopes, inputs, strict=True):
        np.testing.assert_allclose(mine, other.grad.swapaxes(1, 2), atol=1e-4)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "width", "length", "choice"),
    [
        ("cpu", "", "float32", 64, 128, "blocks"),
        ("tpu", "", "float32", 192, 256, "splash"),
        ("tpu", "", "float32", 192, 200, "blocks"),
        ("gpu", "8.0", "bfloat16", 128, 100, "cudnn"),
        ("gpu", "8.0", "bfloat16", 192, 100, "blocks"),
        ("gpu", "9.0", "bfloat16", 192, 100, "cudnn"),
        ("gpu", "10.0", "float16", 256, 100, "cudnn"),
        ("gpu", "9.0", "bfloat16", 264, 100, "blocks"),
        ("gpu", "9.0", "bfloat16", 60, 100, "blocks"),
        ("gpu", "9.0", "float32", 64, 100, "blocks"),
    ],
)
def test_the_fastest_is_chosen_in_one_place(platform, capability, dtype, width, length, choice):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    with compiling_for([device]):
        assert preferred(jnp.zeros((1, length, 1, width), dtype)) == choice


def test_what_is_chosen_is_run():
    inputs = tuple(map(jnp.asarray, (Q, KEYS, VALUES)))
    (out, slopes), blocks = compiled(None, 5, True)(*inputs), compiled("blocks", 5, True)(*inputs)
    for mine, other in zip((out, *slopes), (blocks[0], *blocks[1]), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype_and_a_float32_softmax(dtype):
    inputs = tuple(jnp.asarray(x, dtype) for x in (Q, KEYS, VALUES))
    out, slopes = compiled("blocks", 140, True)(*inputs)
    assert {x.dtype for x in (out, *slopes)} == {jnp.dtype(dtype)}
    expected = naive(Q, KEYS, VALUES, SEGMENTS, 140)
    ours = np.asarray(out, np.float64)
    assert (ours * expected).sum() / np.sqrt((ours**2).sum() * (expected**2).sum()) > 0.9999


def test_no_square_waits_for_the_backward_pass():
    def kept(implementation):
        pull = jax.eval_shape(
            lambda *x: jax.vjp(
                lambda *x: causal_attention(*x, None, scale=1.0, implementation=implementation), *x
            )[1],
            *map(jnp.asarray, (Q, KEYS, VALUES)),
        )
        return max(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept("reference") >= B * N * T * T  # the test can see one
    assert kept("blocks") <= Q.size


def test_scores_of_any_size_stay_finite():
    inputs = tuple(jnp.asarray(100 * x) for x in (Q, KEYS, VALUES))
    for array in jax.tree.leaves(compiled("blocks", 140, True)(*inputs)):
        assert np.isfinite(array).all()


def test_the_mask_by_hand():
    segments = jnp.asarray([[1, 1, 1, 2, 0]])
    mask = causal_mask(segments, 5, 2)[0].astype(int)
    by_hand = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(mask, by_hand)
    np.testing.assert_array_equal(causal_mask(None, 4, None)[0], np.tril(np.ones((4, 4))))


def test_a_row_that_may_attend_to_nothing_is_finite():
    """Padding while decoding; its gradient must not be NaN either."""
    inputs = tuple(jnp.asarray(x[:, :3]) for x in (Q, KEYS, VALUES))
    mask = jnp.zeros((1, 3, 3), bool)
    out, pull = jax.vjp(lambda *x: masked_attention(*x, mask, SCALE), *inputs)
    for array in (out, *pull(out)):
        assert np.isfinite(array).all()


@pytest.mark.parametrize(
    ("heads", "widths", "window", "packed"),
    [((4, 2), (48, 32), None, True), ((2, 2), (64, 64), 40, False)],
    ids=["grouped, MLA's widths, packed", "window"],
)
def test_splash_is_the_reference_forward_and_backward(heads, widths, window, packed):
    """The TPU kernel, interpreted."""
    length = 128
    shapes = [
        (1, length, n, w) for n, w in zip((*heads, heads[1]), (*widths[:1], *widths), strict=True)
    ]
    q, k, v = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in shapes)
    slope = jnp.asarray(RNG.normal(size=(1, length, heads[0], widths[1])), jnp.float32)
    segments = jnp.repeat(jnp.array([[1, 2, 0]]), jnp.array([50, 70, 8]), axis=1)

    def attend(implementation):
        out, pull = jax.vjp(
            lambda *x: causal_attention(
                *x,
                segments if packed else None,
                scale=0.2,
                window=window,
                implementation=implementation,
            ),
            q, k, v,
        )  # fmt: skip
        return out, *pull(slope)

    for mine, other in zip(attend("splash"), attend("reference"), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


@pytest.mark.parametrize("kind", ["none", "rows", "pairs"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [3, 384])
def test_attention_to_all_is_torchs(kind, causal, queries, monkeypatch):
    """Values and slopes, whole or by blocks of queries, of rows without a real token too (they
    attend to all alike)."""
    monkeypatch.setattr(attention, "QUERIES", queries)
    rng = np.random.default_rng(0)
    q, k, v, signs = (rng.normal(size=(3, 7, 2, 4)).astype(np.float32) for _ in range(4))
    mask = {
        "none": None,
        "rows": np.arange(7)[None] < np.array([7, 4, 0])[:, None],
        "pairs": rng.random((1, 7, 7)) < 0.5,
    }[kind]
    seen = np.ones((3, 7, 7), bool) if mask is None else np.broadcast_to(
        mask[:, None] if mask.ndim == 2 else mask, (3, 7, 7)
    )  # fmt: skip
    seen = seen & np.tril(np.ones((7, 7), bool)) if causal else seen
    theirs = [torch.from_numpy(x.swapaxes(1, 2).copy()).requires_grad_() for x in (q, k, v)]
    scores = theirs[0] @ theirs[1].mT * 0.3
    scores = scores.masked_fill(~torch.from_numpy(seen.copy())[:, None], -1e30)
    out = scores.softmax(-1) @ theirs[2]
    (out * torch.from_numpy(signs.swapaxes(1, 2).copy())).sum().backward()

    def total(q, k, v):
        found = full_attention(q, k, v, mask, scale=0.3, causal=causal)
        return jnp.vdot(found, signs), found

    mask = None if mask is None else jnp.asarray(mask)
    run = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    slopes, found = run(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(found, out.detach().numpy().swapaxes(1, 2), atol=2e-6)
    for mine, other in zip(slopes, theirs, strict=True):
        np.testing.assert_allclose(mine, other.grad.numpy().swapaxes(1, 2), atol=5e-6)
