"""What an encoder's features pass to become tokens of a decoder.

An MLP (DeepSeek-VL, Janus), one that takes two encoders' features apart (DeepSeek-VL 7B), squares
of features joined (DeepSeek-VL2), or learned queries that attend to the features: as many tokens of
any input (Perceiver, arXiv 2103.03206; Flamingo, 2204.14198; Qwen-VL's, 2308.12966, is one block).
"""

import dataclasses
from typing import TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deepseek_jax.layers.encoder import ACTIVATIONS, MLP, Activation, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection
from deepseek_jax.layers.pooling import cross_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPProjector:
    """Each feature on its own: linear layers to the decoder's width, activations between."""

    depth: int = 2
    activation: Activation = "gelu"

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"projector.depth is {self.depth}; it must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownsampleProjector:
    """Squares of `factor` x `factor` features joined, then an MLP: DeepSeek-VL2.

    Sides are filled up with zeros. An image's tokens are lines with a learned newline after each:
    the whole image, a learned separator, the tiles (`data.tiles.token_layout`).
    """

    factor: int = 2
    depth: int = 2
    ratio: int = 1
    """Width between the layers, in the decoder's."""
    activation: Activation = "gelu"

    def __post_init__(self):
        if self.factor < 1 or self.depth < 2 or self.ratio < 1:
            raise ValueError(
                f"projector.factor ({self.factor}) and ratio ({self.ratio}) must be at least 1, "
                f"depth ({self.depth}) at least 2."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampler:
    """Learned queries attend to an input's features: `num_tokens` of any number of them.

    A block: q += attention(norm(q), norm(x)); q += mlp(norm(q)); behind the last stands a norm.
    """

    num_tokens: int = 64
    num_layers: int = 1
    num_heads: int = 16
    ratio: int = 4
    """Width of the feed-forward parts, in the decoder's."""
    activation: Activation = "gelu"
    norm_eps: float = 1e-6

    def __post_init__(self):
        if min(self.num_tokens, self.num_layers, self.num_heads, self.ratio) < 1:
            raise ValueError(
                f"projector.num_tokens ({self.num_tokens}), num_layers ({self.num_layers}), "
                f"num_heads ({self.num_heads}) and ratio ({self.ratio}) must be at least 1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitProjector:
    """Of two encoders' features (models/hybrid) each to half of the decoder's width, then layers
    with an activation before each: DeepSeek-VL 7B."""

    depth: int = 2
    activation: Activation = "gelu"

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"projector.depth is {self.depth}; it must be at least 1.")


Projector: TypeAlias = MLPProjector | DownsampleProjector | Resampler | SplitProjector


class ResamplerBlock(nn.Module):
    """A block of a `Resampler`."""

    config: Resampler
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "B U E"],
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B U E"]:
        c, kept, width = self.config, self.dtypes, queries.shape[-1]

        def norm(name: str) -> LayerNorm:
            return LayerNorm(kept, eps=c.norm_eps, name=f"{name}_norm")

        given = norm("query")(queries), norm("feature")(x)
        queries = queries + cross_attention(*given, mask, c.num_heads, kept)
        mlp = MLP(width, width * c.ratio, c.activation, kept, name="mlp")
        return queries + mlp(norm("mlp")(queries))


def joined(x: Float[Array, "B T D"], grid: tuple[int, int], factor: int) -> Float[Array, "B U E"]:
    """Squares of features as one vector each, in reading order.

    Sides are filled with zeros, below and right. A vector runs over channels, then rows and columns
    of its square (torch's unfold).
    """
    (rows, columns), width = grid, x.shape[-1]
    if x.shape[1] != rows * columns:
        raise ValueError(f"an image has {x.shape[1]} features, and joined are those of {grid}")
    x = x.reshape(-1, rows, columns, width)
    x = jnp.pad(x, ((0, 0), (0, -rows % factor), (0, -columns % factor), (0, 0)))
    high, wide = x.shape[1] // factor, x.shape[2] // factor
    x = x.reshape(-1, high, factor, wide, factor, width).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(-1, high * wide, width * factor**2)


class Aligner(nn.Module):
    """A projector as a module: an input's features [B, T, D] as tokens of the decoder.

    `mask` says which features are real; all but a Resampler leave that to who takes the tokens.
    """

    config: Projector
    grid: tuple[int, int] | None
    """Rows and columns of the features, where a DownsampleProjector needs them."""
    embed_dim: int
    dtypes: Dtypes
    first: int | None = None
    """How much of a feature is the first encoder's, where a SplitProjector needs it."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B U E"]:
        c, inner = self.config, self.embed_dim
        if isinstance(c, Resampler):
            return self._resampled(c, x, mask)
        if isinstance(c, SplitProjector):
            return self._split(c, x)
        if isinstance(c, DownsampleProjector):
            assert self.grid is not None  # who made the config has looked
            x, inner = joined(x, self.grid, c.factor), self.embed_dim * c.ratio
        for number in range(1, c.depth + 1):
            last = number == c.depth
            shape = (x.shape[-1], self.embed_dim if last else inner)
            axes = ("mlp", "embed") if last and number > 1 else ("embed", "mlp")
            name = f"linear_{number}"
            x = Projection("btd,de->bte", shape, axes, self.dtypes, bias=True, name=name)(x)
            x = x if last else ACTIVATIONS[c.activation](x)
        return x

    def _split(self, c: SplitProjector, x: Array) -> Array:
        def linear(x: Array, width: int, name: str) -> Array:
            shape, axes = (x.shape[-1], width), ("embed", "mlp")
            return Projection("btd,de->bte", shape, axes, self.dtypes, bias=True, name=name)(x)

        parts = {"high": x[..., : self.first], "low": x[..., self.first :]}
        made = [linear(part, self.embed_dim // 2, name) for name, part in parts.items()]
        x = jnp.concatenate(made, axis=-1)
        for number in range(2, c.depth + 1):
            x = linear(ACTIVATIONS[c.activation](x), self.embed_dim, f"linear_{number}")
        return x

    def _resampled(self, c: Resampler, x: Array, mask: Array | None) -> Array:
        queries = learned(self, "queries", (c.num_tokens, self.embed_dim)).astype(x.dtype)
        queries = jnp.broadcast_to(queries[None], (x.shape[0], *queries.shape))
        for number in range(1, c.num_layers + 1):
            queries = ResamplerBlock(c, self.dtypes, name=f"layer_{number}")(queries, x, mask)
        return LayerNorm(self.dtypes, eps=c.norm_eps, name="norm")(queries)
