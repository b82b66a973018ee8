"""Matrix products with float32 sums, in the forms that every backend runs fast.

XLA on CPU takes bfloat16 operands as they are only in rows: [M, K] times [K, N] or [N, K]. Anything
else it first widens to float32, at a third of the speed. A weight's slope sums over rows, so it
needs one operand turned; `turned` makes that copy where XLA cannot fold it away again.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, Int

from deepseek_jax.core import target

T = TypeVar("T")


def exact(*operands: Array) -> jax.lax.Precision | None:
    """The precision at which a product of float32 is one.

    By default a TPU rounds float32 operands to bfloat16, and a GPU to TF32's 10 bits.
    """
    wide = jnp.result_type(*operands) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide and target.platform() != "cpu" else None


def dot(equation: str, *operands: Array) -> Array:
    """An einsum that sums, and returns, float32; of float32 operands it loses nothing."""
    return jnp.einsum(
        equation, *operands, preferred_element_type=jnp.float32, precision=exact(*operands)
    )


def apart(function: Callable[..., T], *operands: Array) -> T:
    """function(*operands); XLA on CPU fuses nothing of it with what stands around it.

    It removes optimization barriers before it fuses, but leaves such a call alone.
    """
    if target.platform() != "cpu":
        return function(*operands)
    with set_xla_metadata(inlineable="false"):
        return jax.jit(function)(*operands)


def thickened(function: Callable[[Array], Array], x: Float[Array, "B T ..."]) -> Array:
    """function(x), which is one of tokens alone, in a form that is fast for a token or two.

    XLA on CPU multiplies half precision by fewer than 4 rows ten times slower than by 4.
    """
    count = x.shape[0] * x.shape[1]
    if target.platform() != "cpu" or x.dtype.itemsize != 2 or count >= 4:
        return function(x)
    more = ((0, 0), (0, 4 - count), *((0, 0),) * (x.ndim - 2))
    y = function(jnp.pad(x.reshape(1, count, *x.shape[2:]), more))
    return y[:, :count].reshape(*x.shape[:2], *y.shape[2:])


def per_head(
    equation: Literal["btnh,cnh->btnc", "btnc,cnh->btnh"],
    x: Float[Array, "B T N X"],
    w: Float[Array, "C N H"],
) -> Float[Array, "B T N Y"]:
    """The einsum of each head's x with that head's part of a weight; sums, and returns, float32.

    XLA on CPU first transposes a weight whose heads lie in the middle. For single tokens that takes
    longer than one product with all heads, of which each then takes its own.
    """
    if target.platform() != "cpu" or x.shape[1] > 1:
        return dot(equation, x, w)
    lead, (size, num_heads, width) = x.shape[:3], w.shape
    own = jnp.eye(num_heads, dtype=x.dtype)[None, None, :, :, None]
    w = w.reshape(size, -1)
    if equation.startswith("btnh"):
        return dot("btnk,ck->btnc", (x[:, :, :, None] * own).reshape(*lead, -1), w)
    return (dot("btnc,ck->btnk", x, w).reshape(*lead, num_heads, width) * own).sum(3)


def rows(x: Float[Array, "N ..."], index: Int[Array, "..."]) -> Float[Array, "..."]:
    """x[index], for use where nothing is differentiated.

    XLA on CPU moves bfloat16 by widening all of x, gathering, and narrowing again; bits just move.
    """
    if target.platform() != "cpu" or x.dtype.itemsize != 2:
        return x[index]
    # Where a loop picks the index, XLA would copy all of x's bits before it, but for this barrier.
    x, index = jax.lax.optimization_barrier((x, index))
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint16)[index], x.dtype)


def put(
    x: Float[Array, "N ..."], index: tuple[Int[Array, "..."], ...], values: Float[Array, "..."]
) -> Float[Array, "N ..."]:
    """x with values (of its dtype) at index; what lies outside is dropped. For use as `rows` is."""
    if target.platform() != "cpu" or x.dtype.itemsize != 2:
        return x.at[index].set(values, mode="drop")
    bits, values = (jax.lax.bitcast_convert_type(part, jnp.uint16) for part in (x, values))
    return jax.lax.bitcast_convert_type(bits.at[index].set(values, mode="drop"), x.dtype)


def turned(x: Float[Array, "*n R C"]) -> Float[Array, "*n C R"]:
    """The transposed matrices; on CPU a copy of its own, in rows."""
    return laid(jnp.swapaxes(x, -1, -2))


def laid(x: Float[Array, "*n R C"]) -> Float[Array, "*n R C"]:
    """x, on CPU laid in the order of its dimensions, though it is something transposed."""
    if target.platform() != "cpu":
        return x
    # XLA marks a transposition by its layout, which only a change of shape makes it forget.
    return jax.lax.optimization_barrier(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


@jax.custom_vjp
def matmul(x: Float[Array, "*n D"], w: Float[Array, "D F"]) -> Float[Array, "*n F"]:
    """x @ w in x's dtype, summed in float32; the slope of w keeps w's own, wider dtype."""
    return _matmul(x, w)[0]


def _matmul(x, w):
    narrow = w.astype(x.dtype)
    y = dot("...d,df->...f", x, narrow).astype(x.dtype)
    return y, (x, narrow, jnp.zeros(0, w.dtype))


def _matmul_backward(residuals, slope):
    x, narrow, like = residuals
    x_slope = dot("...f,df->...d", slope, narrow).astype(x.dtype)
    return x_slope, weight_slope(x, slope).astype(like.dtype)


matmul.defvjp(_matmul, _matmul_backward)


def weight_slope(x: Float[Array, "*n D"], slope: Float[Array, "*n F"]) -> Float[Array, "D F"]:
    """The float32 slope of w in x @ w, from that of the product."""
    if target.platform() != "cpu":  # merging rows here would gather what a mesh shards
        lead = tuple(range(x.ndim - 1))
        options = {"preferred_element_type": jnp.float32, "precision": exact(x, slope)}
        return jnp.tensordot(x, slope, (lead, lead), **options)
    x, slope = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
    return dot("dn,nf->df", turned(x), slope)


@jax.custom_vjp
def scaled(x: Float[Array, "*n D"], scale: Float[Array, " D"]) -> Float[Array, "*n D"]:
    """x times a vector, in x's dtype."""
    return _scaled(x, scale)[0]


def _scaled(x, scale):
    return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape), (x, scale)


def _scaled_backward(residuals, slope):
    x, scale = residuals
    total = column_sums(slope.astype(jnp.float32) * x)
    return _scaled(slope, scale)[0], total.astype(scale.dtype)


scaled.defvjp(_scaled, _scaled_backward)


@jax.custom_vjp
def shifted(x: Float[Array, "*n D"], bias: Float[Array, " D"]) -> Float[Array, "*n D"]:
    """x plus a vector, in x's dtype."""
    return _shifted(x, bias)[0]


def _shifted(x, bias):
    y = x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)
    return y, jnp.zeros(0, bias.dtype)


def _shifted_backward(like, slope):
    return slope, column_sums(slope).astype(like.dtype)


shifted.defvjp(_shifted, _shifted_backward)


def column_sums(x: Float[Array, "*n D"]) -> Float[Array, " D"]:
    """The float32 sum of all rows."""
    x = x.astype(jnp.float32)
    if target.platform() != "cpu":
        return x.sum(tuple(range(x.ndim - 1)))
    # A product with ones: else XLA adds up one strided column after another.
    x = x.reshape(-1, x.shape[-1])
    return (jnp.ones((1, x.shape[0]), jnp.float32) @ x)[0]
