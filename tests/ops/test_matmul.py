"""Products: reference (float64 NumPy), forward and backward, in float32 and bfloat16."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.target import compiling_for
from deepseek_jax.ops.matmul import (
    apart,
    dot,
    matmul,
    per_head,
    put,
    rows,
    scaled,
    thickened,
    turned,
    weight_slope,
)

RNG = np.random.default_rng(0)


def drawn(shape, dtype="float32"):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32).astype(dtype)


def exact(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead", [(7,), (3, 5)])
def test_matmul_and_its_slopes(lead, dtype):
    """A weight's slope is summed and kept in float32 whatever the arithmetic's dtype."""
    x, w, slope = drawn((*lead, 6), dtype), drawn((6, 4)), drawn((*lead, 4), dtype)
    y, pull = jax.vjp(matmul, x, w)
    x_slope, w_slope = pull(slope)
    assert (y.dtype, x_slope.dtype, w_slope.dtype) == (x.dtype, x.dtype, w.dtype)
    x64, w64, slope64 = exact(x, w.astype(dtype), slope)
    rounding = 1e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(exact(y)[0], x64 @ w64, rtol=rounding, atol=1e-6)
    np.testing.assert_allclose(exact(x_slope)[0], slope64 @ w64.T, rtol=rounding, atol=1e-6)
    expected = np.einsum("nd,nf->df", x64.reshape(-1, 6), slope64.reshape(-1, 4))
    np.testing.assert_allclose(w_slope, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weight_slope(x, slope), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_and_its_slopes(dtype):
    x, scale, slope = drawn((3, 5, 6), dtype), drawn(6), drawn((3, 5, 6), dtype)
    y, pull = jax.vjp(scaled, x, scale)
    x_slope, scale_slope = pull(slope)
    x64, scale64, slope64 = exact(x, scale.astype(dtype), slope)
    rounding = 1e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(exact(y)[0], x64 * scale64, rtol=rounding)
    np.testing.assert_allclose(exact(x_slope)[0], slope64 * scale64, rtol=rounding)
    np.testing.assert_allclose(scale_slope, (slope64 * x64).sum((0, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize(
    ("dtypes", "wide"), [(("float32",) * 2, True), (("bfloat16", "float32"), True),
                         (("bfloat16",) * 2, False)]
)  # fmt: skip
def test_float32_is_float32_on_accelerators(dtypes, wide, platform):
    """By default they round it: a TPU to bfloat16, a GPU to TF32."""
    x, w = (drawn(shape, dtype) for shape, dtype in zip(((3, 6), (6, 4)), dtypes, strict=True))
    with compiling_for([types.SimpleNamespace(platform=platform)]):
        text = str(jax.make_jaxpr(lambda x, w: dot("nd,df->nf", x, w))(x, w))
    assert ("HIGHEST" in text) == (wide and platform != "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_and_turned_move_every_bit(dtype):
    x, index = drawn((5, 4, 3), dtype), jnp.array([[4, 0], [2, 2]])
    np.testing.assert_array_equal(exact(rows(x, index))[0], exact(x[index])[0])
    np.testing.assert_array_equal(exact(turned(x))[0], exact(x)[0].swapaxes(1, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_put_writes_every_bit_and_drops_what_lies_outside(dtype):
    x, values = drawn((5, 4, 3), dtype), drawn((2, 2, 3), dtype)
    index = jnp.array([[4], [1]]), jnp.array([[0, 4], [3, 2]])
    expected = exact(x)[0]
    expected[[4, 1, 1], [0, 3, 2]] = exact(values)[0][[0, 1, 1], [0, 0, 1]]
    y = put(x, index, values)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(exact(y)[0], expected)


def test_what_stands_apart_is_not_fused():
    """Else XLA on CPU computes a cosine anew for every row that it multiplies."""

    def program(cosine):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64,), (32, 64))]
        return jax.jit(lambda x, y: cosine(x)[None] * y).lower(*shapes).compile().as_text()

    def together(text):
        return any("cosine(" in part and "multiply(" in part for part in text.split("\n\n"))

    assert together(program(jnp.cos))
    assert not together(program(lambda x: apart(jnp.cos, x)))
    assert not together(program(lambda x: jax.vmap(lambda row: apart(jnp.cos, row))(x[None])[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead", [(1, 1), (3, 1), (2, 5)])
def test_a_product_with_each_heads_part_is_the_einsum(lead, dtype):
    w = drawn((6, 3, 4), dtype)
    for equation, width in (("btnh,cnh->btnc", 4), ("btnc,cnh->btnh", 6)):
        x = drawn((*lead, 3, width), dtype)
        out = per_head(equation, x, w)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, np.einsum(equation, *exact(x, w)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead", [(1, 1), (3, 1), (1, 2), (2, 5)])
def test_thickened_rows_come_back_alone(lead, dtype):
    """Sums stay in float32: 256 + 1 is 256 in bfloat16."""
    x, w = drawn((*lead, 3, 4), dtype), drawn((3, 4, 5), dtype)
    out = thickened(lambda x: dot("btnh,nhd->btd", x, w), x)
    np.testing.assert_allclose(out, np.einsum("btnh,nhd->btd", *exact(x, w)), rtol=1e-5, atol=1e-5)
    ones = jnp.ones((*lead, 1024), dtype)
    total = thickened(lambda x: dot("btd,de->bte", x, jnp.ones((1024, 1), dtype)), ones)
    assert (np.asarray(total) == 1024).all()
