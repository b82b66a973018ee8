"""The one parameter maker, projections, norms, and the SwiGLU feed-forward part."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from deepseek_jax.core.axes import Spec
from deepseek_jax.ops.experts import feed_forward
from deepseek_jax.ops.matmul import matmul, scaled, shifted, thickened
from deepseek_jax.parallel.sharding import flat_tokens


class Normal(NamedTuple):
    """Drawn with a deviation of its own, where "normal" is the whole model's."""

    deviation: float


# A number: that everywhere; sinusoids: of a row's places.
Init = Literal["normal", "ones", "zeros", "sinusoids"] | float | Normal


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """What modules need to know of precision: stored parameters and arithmetic."""

    params: jnp.dtype
    compute: jnp.dtype


@struct.dataclass
class Declared(nn.meta.AxisMetadata[Any]):
    """A declared weight: a placeholder, what its dimensions mean, and how it starts."""

    value: Any
    spec: Spec = struct.field(pytree_node=False)
    init: Init = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Declared":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        del index, params  # blocks stack along a leading dimension only
        return self.replace(spec=self.spec.stacked())

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        del index, params
        return self.replace(spec=self.spec.unstacked())


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    reduced: tuple[int, ...] = (),
    outputs: tuple[int, ...] = (),
    init: Init = "normal",
    dtype: jnp.dtype | None = None,
) -> Array:
    """The stored leaf `name` of a module, as it is; while initializing, a declared placeholder.

    Values are made by `models.build`, leaf by leaf: initializing here only declares, so that it
    can run on shapes alone. Raises ValueError when the leaf's shape is not the declared one.
    """
    if module.is_initializing():
        spec = Spec(axes=axes, reduced=reduced, outputs=outputs)
        kind = dtype or module.dtypes.params
        return module.param(name, lambda key: Declared(jnp.zeros(shape, kind), spec, init))
    value = module.get_variable("params", name)
    if value is None or tuple(value.shape) != shape:
        found = None if value is None else tuple(value.shape)
        raise ValueError(f"{'/'.join((*module.path, name))} must have shape {shape}; it is {found}")
    return value


class RMSNorm(nn.Module):
    """x over its root mean square, in float32; cast, then times the scale (V2, V3, Llama)."""

    dtypes: Dtypes
    axis: str = "embed"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = weight(self, "scale", (x.shape[-1],), (self.axis,), init="ones")
        x32 = x.astype(jnp.float32)
        normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return scaled(normal.astype(x.dtype), scale)


class LayerNorm(nn.Module):
    """x less its mean, over its standard deviation, in float32; with a scale and a bias."""

    dtypes: Dtypes
    axis: str = "embed"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        shape, axes = (x.shape[-1],), (self.axis,)
        scale = weight(self, "scale", shape, axes, init="ones")
        bias = weight(self, "bias", shape, axes, init="zeros")
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return shifted(scaled(normal, scale), bias).astype(x.dtype)


class Projection(nn.Module):
    """A weight applied by an einsum; its letters say which dimensions it sums and produces."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtypes: Dtypes
    bias: bool = False
    start: Init = "normal"

    def setup(self):
        left, right = self.equation.split("->")
        letters = left.split(",")[1]
        reduced = tuple(i for i, letter in enumerate(letters) if letter not in right)
        outputs = tuple(i for i, letter in enumerate(letters) if letter in right)
        summed = {"reduced": reduced, "outputs": outputs}
        self.weight = weight(self, "weight", self.shape, self.axes, **summed, init=self.start)
        if self.bias:
            shape = tuple(self.shape[i] for i in outputs)
            axes = tuple(self.axes[i] for i in outputs)
            self.offset = weight(self, "bias", shape, axes, init="zeros")

    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtypes.compute).reshape(*x.shape[:2], math.prod(x.shape[2:]))
        w = self.weight.reshape(x.shape[-1], -1)
        outputs = self.weight.shape[len(self.equation.split(",")[0]) - 2 :]
        y = thickened(lambda x: matmul(x, w), x)
        if self.bias:
            y = shifted(y, self.offset.reshape(-1))
        return y.reshape(*x.shape[:2], *outputs)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    embed_dim: int
    mlp_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        d, f = self.embed_dim, self.mlp_dim
        inward = ("btd,df->btf", (d, f), ("embed", "mlp"), self.dtypes)
        outward = ("btf,fd->btd", (f, d), ("mlp", "embed"), self.dtypes)
        leaves = [
            Projection(*parts, name=name).weight
            for name, parts in (("gate", inward), ("up", inward), ("down", outward))
        ]

        def of_tokens(x):
            flat, back = flat_tokens(x)
            return back(feed_forward(flat, *leaves))

        return thickened(of_tokens, x)
