"""Segment Anything's image encoder (arXiv 2304.02643): windows, and a few blocks that see it all.

Images are Float[Array, "B H W C"], of one size: DeepSeek-VL 7B's large views (models/hybrid).
Behind the blocks a neck makes every place's vector narrower. Left out: dropout, prompts and masks.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepseek_jax.layers.block import stacked
from deepseek_jax.layers.conv import PlaneConvolution
from deepseek_jax.layers.encoder import MLP, Encoded, Transformer, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection, weight
from deepseek_jax.models.vit import patches
from deepseek_jax.ops.attention import full_attention
from deepseek_jax.ops.matmul import dot
from deepseek_jax.ops.windows import from_windows, window_attention, windows
from deepseek_jax.parallel.sharding import constrain

NECK_EPS = 1e-6  # of the neck's norms, which no config sets


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAM:
    """Segment Anything's image encoder."""

    transformer: Transformer
    """Norms before, biases of all of attention's projections or of the output alone."""
    image_size: int = 1024
    """Height and width of its images."""
    patch_size: int = 16
    num_channels: int = 3
    window: int = 14
    """Places along a window's side."""
    whole_layers: tuple[int, ...] = (2, 5, 8, 11)
    """The blocks, counted from 0, whose tokens see the whole image."""
    absolute_positions: bool = True
    relative_positions: bool = True
    output_dim: int = 256
    """Width behind the neck."""
    init_scale: float = 0.02

    def __post_init__(self):
        t = self.transformer
        if self.patch_size < 1 or self.image_size < self.patch_size:
            raise ValueError(
                f"image_size ({self.image_size}) must be at least patch_size ({self.patch_size})."
            )
        if min(self.num_channels, self.window, self.output_dim) < 1:
            raise ValueError("num_channels, window and output_dim must be at least 1.")
        if not all(0 <= i < t.num_layers for i in self.whole_layers):
            raise ValueError(
                f"whole_layers {self.whole_layers} must lie in the {t.num_layers} layers, from 0."
            )
        if t.gated or t.post_norm or t.causal or t.layer_scale or t.biases not in ("qkvo", "o"):
            raise ValueError(
                "transformer must have no gate, post_norm, causal or layer_scale, and the biases "
                "qkvo or o."
            )

    @property
    def side(self) -> int:
        """Patches along an image's side."""
        return self.image_size // self.patch_size


class Run(NamedTuple):
    """Like blocks one after another, which are scanned together."""

    whole: bool
    """Whether they see the whole image."""
    repeats: int


def runs(config: SAM) -> Iterator[Run]:
    """All runs in their order: run i's weights lie under segment_i.

    The first block that sees the whole image ends one: its output is read (`Encoded.features`).
    """
    first, count = min(config.whole_layers, default=-1), 0
    total = config.transformer.num_layers
    for i in range(total):
        whole, count = i in config.whole_layers, count + 1
        if i == first or i + 1 == total or whole != (i + 1 in config.whole_layers):
            yield Run(whole, count)
            count = 0


class SAMAttention(nn.Module):
    """Attention in windows of a map that is filled up with zeros, which are seen; or in the whole.

    What a pair of places adds to its score is q . (a vector for their distance in rows + one for
    that in columns). It stands in the product itself: queries grow by q . each row's and column's
    vector, keys by which row and column is theirs. So no square of scores is made beside attention.
    """

    config: SAM
    whole: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, t, side = self.config, self.config.transformer, self.config.side
        size = side if self.whole else c.window
        full = -(-side // size) * size
        x = x.reshape(-1, side, side, x.shape[-1])
        x = windows(jnp.pad(x, ((0, 0), (0, full - side), (0, full - side), (0, 0))), size)
        batch, count, area, d = x.shape
        n, h = t.num_heads, d // t.num_heads
        x = x.reshape(batch, count * area, d)

        def projected(name: str) -> Array:
            given = ("btd,dnh->btnh", (d, n, h), ("embed", "heads", "head"), self.dtypes)
            y = Projection(*given, name in t.biases, name=name)(x)
            return y.reshape(batch, count, area, n, h)

        q, k, v = (projected(name) for name in "qkv")
        if c.relative_positions:
            q, k = self._placed(q, k, size, h)
        if self.whole:
            y = full_attention(q[:, 0], k[:, 0], v[:, 0], None, scale=h**-0.5)
        else:
            y = window_attention(q, k, v, None, None, scale=h**-0.5)
        given = ("btnh,nhd->btd", (n, h, d), ("heads", "head", "embed"), self.dtypes, True)
        y = Projection(*given, name="o")(y.reshape(batch, count * area, n, h))
        y = from_windows(y.reshape(batch, count, area, d), (full, full))
        return y[:, :side, :side].reshape(batch, side * side, d)

    def _placed(self, q: Array, k: Array, size: int, head: int) -> tuple[Array, Array]:
        """Queries and keys with what their places add to a score before it is scaled."""
        batch, count, _, n, _ = q.shape
        apart = np.arange(size)[:, None] - np.arange(size)[None] + size - 1
        square = q.reshape(batch, count, size, size, n, head)
        more_q, more_k = [], []
        for name, equation in (("rows", "bmyxnh,ykh->bmyxnk"), ("columns", "bmyxnh,xkh->bmyxnk")):
            table = weight(self, name, (2 * size - 1, head), ("position", "head"), init="zeros")
            near = table[apart].astype(q.dtype)
            more_q.append(dot(equation, square, near) * head**0.5)
        own = np.indices((size, size)).reshape(2, -1)
        more_k = [np.eye(size, dtype=np.float32)[place] for place in own]
        queries = jnp.concatenate(more_q, -1).reshape(*q.shape[:-1], 2 * size).astype(q.dtype)
        keys = jnp.asarray(np.concatenate(more_k, -1), k.dtype)[None, None, :, None]
        keys = jnp.broadcast_to(keys, (*k.shape[:-1], 2 * size))
        return jnp.concatenate([q, queries], -1), jnp.concatenate([k, keys], -1)


class SAMBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Scanned by `block.stacked`."""

    config: SAM
    whole: bool
    dtypes: Dtypes
    keep: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], none: Any, neither: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        del none, neither
        t, kept = self.config.transformer, self.dtypes
        attend = SAMAttention(self.config, self.whole, kept, name="attention")
        x = x + attend(LayerNorm(kept, eps=t.norm_eps, name="attention_norm")(x))
        mlp = MLP(t.embed_dim, t.mlp_dim, t.activation, kept, name="mlp")
        x = constrain(x + mlp(LayerNorm(kept, eps=t.norm_eps, name="mlp_norm")(x)))
        return x, x if self.keep else None


class SAMRun(nn.Module):
    """A run of blocks, scanned; with `keep` every block's output too."""

    config: SAM
    run: Run
    dtypes: Dtypes
    keep: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Any]:
        blocks = stacked(self.run.repeats, self.config.transformer.remat, 1, SAMBlock)
        given = (self.config, self.run.whole, self.dtypes, self.keep)
        return blocks(*given, name="block")(constrain(x), None, None)


class Neck(nn.Module):
    """Places' vectors made narrower, with their neighbors: two convolutions, a norm behind each."""

    side: int
    width: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        x = x.reshape(-1, self.side, self.side, x.shape[-1])
        for number, size in ((1, 1), (2, 3)):
            x = PlaneConvolution(self.width, size, 1, self.dtypes, name=f"conv_{number}")(x)
            flat = x.reshape(x.shape[0], -1, self.width)
            flat = LayerNorm(self.dtypes, eps=NECK_EPS, name=f"norm_{number}")(flat)
            x = flat.reshape(x.shape)
        return x.reshape(x.shape[0], -1, self.width)


class SAMTransformer(nn.Module):
    """A SAM as a module: `hidden` behind the neck, in reading order.

    `features` are the tokens behind the first block that sees the whole image; layers, with
    `keep`, every block's.
    """

    config: SAM
    dtypes: Dtypes

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], keep: bool = False) -> Encoded:
        c, t, kept, p = self.config, self.config.transformer, self.dtypes, self.config.patch_size
        wanted = (c.image_size, c.image_size, c.num_channels)
        if images.shape[1:] != wanted:
            raise ValueError(f"images are {images.shape[1:]}, and this encoder's {wanted}")
        shape, axes = (p, p, c.num_channels, t.embed_dim), ("patch", "patch", "patch", "embed")
        embed = Projection("btijc,ijcd->btd", shape, axes, kept, True, name="patch")
        x = embed(patches(images, p))
        if c.absolute_positions:
            table = learned(self, "positions", (c.side, c.side, t.embed_dim))
            x = x + table.reshape(1, -1, t.embed_dim).astype(x.dtype)
        layers, features = [], None
        for i, run in enumerate(runs(c)):
            x, outputs = SAMRun(c, run, kept, keep, name=f"segment_{i}")(x)
            layers.append(outputs)
            features = x if features is None and run.whole else features
        hidden = Neck(c.side, c.output_dim, kept, name="neck")(x)
        return Encoded(hidden, features=features, layers=jnp.concatenate(layers) if keep else None)


def example(config: SAM) -> dict[str, Array]:
    """Inputs of the encoder, of one row: zeros."""
    return {"images": jnp.zeros((1, config.image_size, config.image_size, config.num_channels))}
