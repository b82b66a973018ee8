"""Swin transformers (arXiv 2103.14030): attention in windows, of a map that shrinks by stages.

Images are Float[Array, "B H W C"], of any size. Blocks come in pairs, the second with shifted
windows; a run of pairs is one scan, and a stage of odd depth ends in a run of one plain block.
Left out: dropout and stochastic depth.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.block import Remat, stacked
from deepseek_jax.layers.encoder import MLP, Activation, Encoded, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection, weight
from deepseek_jax.models.vit import patches
from deepseek_jax.ops.grid import resized
from deepseek_jax.ops.windows import (
    from_windows,
    relative_index,
    shift_mask,
    window_attention,
    windows,
)
from deepseek_jax.parallel.sharding import constrain

EDGE_EPS = 1e-5  # of the norms outside the blocks, which no config sets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swin:
    """A Swin transformer."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width that absolute positions belong to; of other sizes they are resized,
    bicubically."""
    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 96
    """The first stage's width; every later one's is twice the one before."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks of each stage."""
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    """The feed-forward parts' widths over their stages' own."""
    activation: Activation = "gelu"
    qkv_bias: bool = True
    absolute_positions: bool = False
    norm_eps: float = 1e-5
    remat: Remat = "none"
    init_scale: float = 0.02

    def __post_init__(self):
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths {self.depths} and num_heads {self.num_heads} must have a number a stage."
            )
        least = (self.patch_size, self.num_channels, self.window, *self.depths, *self.num_heads)
        if min(least) < 1:
            raise ValueError("patch_size, num_channels, window, depths, num_heads start at 1.")
        for stage, heads in enumerate(self.num_heads):
            if self.width(stage) % heads:
                raise ValueError(
                    f"stage {stage} is {self.width(stage)} wide, no multiple of its {heads} heads."
                )
        if self.absolute_positions and any(n % self.patch_size for n in self.image_size):
            raise ValueError(
                f"absolute_positions need an image_size {self.image_size} that is a multiple of "
                f"patch_size ({self.patch_size})."
            )
        if sum(1 for _ in runs(self)) > 10:
            raise ValueError(f"depths {self.depths}: more than 10 runs of blocks.")

    def width(self, stage: int) -> int:
        """The width of a stage's tokens."""
        return self.embed_dim * 2**stage

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along the height and width of an image; the last ones may be filled up."""
        return -(-height // self.patch_size), -(-width // self.patch_size)


class Run(NamedTuple):
    """Like blocks of a stage that are scanned together."""

    stage: int
    first: int
    """The number of its first block in the stage."""
    repeats: int
    names: tuple[str, ...]
    """What is repeated: ("plain", "shifted"), or ("plain",)."""


def runs(config: Swin) -> Iterator[Run]:
    """All runs of blocks in their order: run i's weights lie under segment_i."""
    for stage, depth in enumerate(config.depths):
        if depth > 1:
            yield Run(stage, 0, depth // 2, ("plain", "shifted"))
        if depth % 2:
            yield Run(stage, depth - 1, 1, ("plain",))


class SwinAttention(nn.Module):
    """Multi-head attention in the windows of a map that is filled up with zeros to whole windows.

    No window is larger than the map: then it shrinks to the shorter side, and nothing is shifted.
    """

    config: Swin
    stage: int
    grid: tuple[int, int]
    shifted: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, (height, width) = self.config, self.grid
        size = min(c.window, *self.grid)
        shift = c.window // 2 if self.shifted and size < min(self.grid) else 0
        full = (-(-height // size) * size, -(-width // size) * size)
        filled = ((0, 0), (0, full[0] - height), (0, full[1] - width), (0, 0))
        x = jnp.pad(x.reshape(-1, height, width, x.shape[-1]), filled)
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        x = windows(x, size)
        batch, count, area, d = x.shape
        n, x = c.num_heads[self.stage], x.reshape(batch, count * area, d)
        shape, axes = (d, n, d // n), ("embed", "heads", "head")

        def projected(name: str) -> Array:
            own = Projection("btd,dnh->btnh", shape, axes, self.dtypes, c.qkv_bias, name=name)
            return own(x).reshape(batch, count, area, n, d // n)

        rows = (2 * c.window - 1) ** 2
        table = weight(self, "relative_positions", (rows, n), ("position", "heads"))
        bias = table[relative_index(size, c.window)]
        mask = shift_mask(full, size, shift) if shift else None
        q, k, v = (projected(name) for name in "qkv")
        y = window_attention(q, k, v, bias, mask, scale=(d // n) ** -0.5)
        shape, axes = (n, d // n, d), ("heads", "head", "embed")
        out = Projection("btnh,nhd->btd", shape, axes, self.dtypes, True, name="o")
        y = from_windows(out(y.reshape(batch, -1, n, d // n)).reshape(batch, count, area, d), full)
        if shift:
            y = jnp.roll(y, (shift, shift), (1, 2))
        return y[:, :height, :width].reshape(batch, height * width, d)


class SwinBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), attention being within windows."""

    config: Swin
    stage: int
    grid: tuple[int, int]
    shifted: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, d, kept = self.config, x.shape[-1], self.dtypes
        attend = SwinAttention(c, self.stage, self.grid, self.shifted, kept, name="attention")
        x = x + attend(LayerNorm(kept, eps=c.norm_eps, name="attention_norm")(x))
        mlp = MLP(d, int(c.mlp_ratio * d), c.activation, kept, name="mlp")
        return constrain(x + mlp(LayerNorm(kept, eps=c.norm_eps, name="mlp_norm")(x)))


class SwinPair(nn.Module):
    """A plain block and a shifted one, or one of them: what a run repeats (`block.stacked`)."""

    config: Swin
    run: Run
    grid: tuple[int, int]
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], none: Any, neither: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        del none, neither
        given = (self.config, self.run.stage, self.grid)
        for name in self.run.names:
            x = SwinBlock(*given, name == "shifted", self.dtypes, name=name)(x)
        return x, None


class SwinRun(nn.Module):
    """A run of blocks, scanned."""

    config: Swin
    run: Run
    grid: tuple[int, int]
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        blocks = stacked(self.run.repeats, self.config.remat, 1, SwinPair)
        own = blocks(self.config, self.run, self.grid, self.dtypes, name="block")
        return own(constrain(x), None, None)[0]


class Merging(nn.Module):
    """Four neighbours as one token of twice the width; odd sizes are filled up with zeros.

    They stand side by side in the order (row, column): (0, 0), (1, 0), (0, 1), (1, 1).
    """

    grid: tuple[int, int]
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B U E"]:
        (height, width), d = self.grid, x.shape[-1]
        x = x.reshape(-1, height, width, d)
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, d).transpose(0, 1, 3, 4, 2, 5)
        x = LayerNorm(self.dtypes, eps=EDGE_EPS, name="norm")(x.reshape(batch, -1, 4 * d))
        shape, axes = (4 * d, 2 * d), ("embed", "embed")
        return Projection("btd,de->bte", shape, axes, self.dtypes, name="reduction")(x)


class SwinTransformer(nn.Module):
    """A Swin as a module. With `keep`, layers are the patches' and every stage's last tokens."""

    config: Swin
    dtypes: Dtypes

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], keep: bool = False) -> Encoded:
        c, kept, p = self.config, self.dtypes, self.config.patch_size
        _, height, width, channels = images.shape
        if channels != c.num_channels:
            raise ValueError(f"images have {channels} channels, and this encoder {c.num_channels}")
        if c.absolute_positions and (height % p or width % p):
            raise ValueError(
                f"images are {(height, width)}; this encoder has positions for whole patches of {p}"
            )
        grid = c.grid(height, width)
        filled = ((0, 0), (0, grid[0] * p - height), (0, grid[1] * p - width), (0, 0))
        shape, axes = (p, p, channels, c.embed_dim), ("patch", "patch", "patch", "embed")
        embed = Projection("btijc,ijcd->btd", shape, axes, kept, True, name="patch")
        x = embed(patches(jnp.pad(images, filled), p))
        x = LayerNorm(kept, eps=EDGE_EPS, name="patch_norm")(x)
        if c.absolute_positions:
            own = c.grid(*c.image_size)
            table = learned(self, "positions", (math.prod(own), c.embed_dim))
            if grid != own:
                table = resized(table.reshape(*own, -1), grid, "bicubic", antialias=False)
            x = x + table.reshape(1, -1, c.embed_dim).astype(x.dtype)
        layers, stage = [x], 0
        for i, run in enumerate(runs(c)):
            if run.stage > stage:
                x = Merging(grid, kept, name=f"merging_{stage}")(x)
                grid, stage = tuple(-(-n // 2) for n in grid), run.stage
                layers.append(x)
            x = SwinRun(c, run, grid, kept, name=f"segment_{i}")(x)
        hidden = LayerNorm(kept, eps=c.norm_eps, name="final_norm")(x)
        pooled = hidden.astype(jnp.float32).mean(1).astype(hidden.dtype)
        return Encoded(hidden, pooled, layers=(*layers, x) if keep else None)


def example(config: Swin) -> dict[str, Array]:
    """Inputs of the encoder, of one row: zeros."""
    return {"images": jnp.zeros((1, *config.image_size, config.num_channels))}
