"""Convolutions: over time those that make frames and that say where a frame stands; of planes."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.encoder import ACTIVATIONS, Activation
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Normal, Projection, weight
from deepseek_jax.ops.convolution import grouped, squares, windows

CONV_EPS = 1e-5  # torch's own, which no config names


class ChannelNorm(nn.Module):
    """Each channel less its mean over time, over its deviation: a group norm of one a channel."""

    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        scale = weight(self, "scale", (x.shape[-1],), ("embed",), init="ones")
        bias = weight(self, "bias", (x.shape[-1],), ("embed",), init="zeros")
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=1, keepdims=True)
        normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=1, keepdims=True) + CONV_EPS)
        scale, bias = (w.astype(jnp.float32).reshape(1, 1, -1) for w in (scale, bias))
        return (normal * scale + bias).astype(x.dtype)


class Convolution(nn.Module):
    """activation(norm(x * kernel)), a frame every `stride` places; `padding` zeros on both sides.

    [B, T, C] -> [B, floor((T + 2 padding - size) / stride) + 1, width].
    """

    width: int
    size: int
    stride: int
    activation: Activation
    dtypes: Dtypes
    bias: bool = True
    norm: Literal["channel", "layer", ""] = ""
    """Over time within a channel, over the channels of a frame, or none."""
    padding: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B W D"]:
        x = jnp.pad(x, ((0, 0), (self.padding, self.padding), (0, 0)))
        shape, axes = (self.size, x.shape[-1], self.width), ("patch", "patch", "embed")
        start = Normal((2 / (self.size * x.shape[-1])) ** 0.5)  # activations keep their size
        given = (self.dtypes, self.bias, start)
        conv = Projection("btkc,kcd->btd", shape, axes, *given, name="conv")
        y = conv(windows(x, self.size, self.stride))
        if self.norm == "channel":
            y = ChannelNorm(self.dtypes, name="norm")(y)
        elif self.norm == "layer":
            y = LayerNorm(self.dtypes, eps=CONV_EPS, name="norm")(y)
        return ACTIVATIONS[self.activation](y)


class PlaneConvolution(nn.Module):
    """x * kernel without a bias, a place every `stride` ones, zeros around the plane.

    [B, H, W, C] -> [B, floor((H - 1) / stride) + 1, floor((W - 1) / stride) + 1, width], `size`
    being odd.
    """

    width: int
    size: int
    stride: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B R S D"]:
        x = squares(x, self.size, self.stride)
        batch, rows, columns, *taken = x.shape
        shape, axes = (*taken, self.width), ("patch", "patch", "embed", "embed")
        start = Normal((2 / math.prod(taken)) ** 0.5)
        conv = Projection("btijc,ijcd->btd", shape, axes, self.dtypes, False, start, name="conv")
        return conv(x.reshape(batch, rows * columns, *taken)).reshape(batch, rows, columns, -1)


class PositionalConvolution(nn.Module):
    """What a frame's neighbors say of its place: activation(x * kernel), wav2vec 2.0's positions.

    The kernel [K, D / groups, D] has weight norm (arXiv 1602.07868), one length a tap:
    kernel[k] = scale[k] direction[k] / |direction[k]|, computed in float32.
    """

    width: int
    size: int
    groups: int
    activation: Activation
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        shape = (self.size, self.width // self.groups, self.width)
        axes = ("patch", "patch", "embed")
        direction = weight(
            self, "direction", shape, axes, reduced=(0, 1), outputs=(2,), init=Normal(1.0)
        )
        start = 2 * (self.width / self.groups / self.size) ** 0.5  # taps of deviation 2 / sqrt(K D)
        scale = weight(self, "scale", (self.size,), ("patch",), init=start)
        bias = weight(self, "bias", (self.width,), ("embed",), init="zeros")
        direction = direction.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(direction * direction, axis=(1, 2), keepdims=True))
        kernel = direction * (scale.astype(jnp.float32).reshape(-1, 1, 1) / length)
        y = grouped(x, kernel.astype(x.dtype)) + bias.astype(x.dtype).reshape(1, 1, -1)
        return ACTIVATIONS[self.activation](y)
