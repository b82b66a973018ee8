"""Vision transformers (arXiv 2010.11929): patches of an image as tokens of an encoder.

Images are Float[Array, "B H W C"]. One config covers ViT, CLIP, SigLIP and DINOv2; where they
differ is a field.
"""

import dataclasses
from typing import TypeAlias

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from deepseek_jax.layers.encoder import (
    NOTHING,
    Encoded,
    Stack,
    Transformer,
    Whole,
    learned,
    with_token,
)
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection
from deepseek_jax.layers.pooling import Pooling, pooled
from deepseek_jax.ops import grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """A learned vector a place; images of other sizes get them resized, bicubically."""

    antialias: bool = False
    """Whether resizing smooths what it shrinks (DINOv2 with registers)."""
    any_size: bool = False
    """Whether images of other sizes are taken without being asked (DINOv2)."""
    size: tuple[int, int] | None = None
    """Height and width of the images that the vectors belong to; None: the encoder's image_size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sines:
    """Fixed sines and cosines of a place's column and row (MAE, DiT): `ops.grid.sines`."""

    theta: float = 10_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axial:
    """Rotary: half of a head's pairs turn with a place's row, half with its column."""

    theta: float = 10_000.0


Positions: TypeAlias = Learned | Sines | Axial


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT:
    """A vision transformer."""

    transformer: Transformer
    image_size: tuple[int, int] = (224, 224)
    """Height and width of its images; what is beyond whole patches is cut."""
    patch_size: int = 16
    num_channels: int = 3
    class_token: bool = True
    num_registers: int = 0
    """Learned tokens without a place, behind the class token (arXiv 2309.16588)."""
    mask_token: bool = False
    """Whether a learned token can stand for patches that are hidden."""
    positions: Positions = Learned()
    patch_bias: bool = True
    pre_norm: bool = False
    """A norm before the first block (CLIP)."""
    final_norm: bool = True
    """Whether the last hidden state passes the last norm; CLIP norms the pooled vector alone."""
    pooling: Pooling = "class"
    """How one vector comes out of the tokens after the last norm: `layers.pooling.pooled`."""
    init_scale: float = 0.02

    def __post_init__(self):
        if not 1 <= self.patch_size <= min(*self.image_size, *self.table_size):
            raise ValueError(
                f"image_size {self.image_size} and positions.size must be at least patch_size "
                f"({self.patch_size}), and that at least 1."
            )
        if self.pooling in ("class", "tanh") and not self.class_token:
            raise ValueError(f"pooling {self.pooling!r} needs class_token.")
        t = self.transformer
        wanted = {Sines: t.embed_dim, Axial: t.embed_dim // t.num_heads}
        if wanted.get(type(self.positions), 0) % 4:
            raise ValueError(
                f"{type(self.positions).__name__} positions need multiples of 4: embed_dim is "
                f"{t.embed_dim}, a head's width {t.embed_dim // t.num_heads}."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def table_size(self) -> tuple[int, int]:
        """Height and width of the images that learned positions belong to."""
        own = self.positions.size if isinstance(self.positions, Learned) else None
        return own or self.image_size

    def at_size(self, size: int | None) -> "ViT":
        """The same weights on images of this height and width; None: of its own.

        Positions are resized or computed. ValueError for what is no multiple of a patch, and where
        its own images are no squares.
        """
        if size is None or (size, size) == self.image_size:
            return self
        if size < 1 or size % self.patch_size or len({*self.image_size}) > 1:
            raise ValueError(
                f"images of size {size}: it must be a multiple of patch_size ({self.patch_size}), "
                f"and the model's own, {self.image_size}, square"
            )
        positions = self.positions
        if isinstance(positions, Learned):
            positions = dataclasses.replace(positions, size=self.table_size)
        return dataclasses.replace(self, image_size=(size, size), positions=positions)

    @property
    def leading(self) -> int:
        """Tokens before the patches: the class and the registers."""
        return self.class_token + self.num_registers


def patches(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B T X"]:
    """Squares of pixels in reading order, each flat: rows, then columns, then channels.

    What is beyond the last whole square is cut off, as a convolution does.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    whole = images[:, : rows * size, : columns * size]
    cut = whole.reshape(batch, rows, size, columns, size, channels)
    return cut.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


class VisionTransformer(nn.Module):
    """A ViT as a module."""

    config: ViT
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        hidden_patches: Bool[Array, "B T"] | None = None,
        keep: bool = False,
    ) -> Encoded:
        """Images of any size; the mask token stands for patches that are hidden."""
        c, t, kept = self.config, self.config.transformer, self.dtypes
        _, height, width, channels = images.shape
        p = c.patch_size
        if channels != c.num_channels or min(height, width) < p:
            raise ValueError(
                f"images are {images.shape[1:]}; this encoder takes {c.num_channels} channels and "
                f"at least a patch, {p} x {p}"
            )
        shape, axes = (p, p, c.num_channels, t.embed_dim), ("patch", "patch", "patch", "embed")
        embed = Projection("btijc,ijcd->btd", shape, axes, kept, c.patch_bias, name="patch")
        x = embed(patches(images, p))
        if c.mask_token:
            token = learned(self, "mask_token", (t.embed_dim,)).astype(x.dtype)
            if hidden_patches is not None:
                x = jnp.where(hidden_patches[:, :, None], token[None, None], x)
        elif hidden_patches is not None:
            raise ValueError("patches are hidden, and this encoder has no mask token")

        size = height // p, width // p
        own, of_patches = self._positions(size, x.dtype)
        x, first = x + of_patches, []
        if c.class_token:
            first = [learned(self, "class_token", (t.embed_dim,)).astype(x.dtype)[None] + own]
        if c.num_registers:
            registers = learned(self, "registers", (c.num_registers, t.embed_dim))
            first.append(registers.astype(x.dtype))
        if first:
            x = with_token(jnp.concatenate(first), x)
        if c.pre_norm:
            x = LayerNorm(kept, eps=t.norm_eps, name="pre_norm")(x)
        x, layers = Stack(t, kept, keep, name="segment_0")(x, self._angles(size, x.shape[0]))
        normal = LayerNorm(kept, eps=t.norm_eps, name="final_norm")(x)
        one = pooled(c.pooling, t, kept, normal, None, c.leading)
        return Encoded(normal if c.final_norm else x, one, layers=layers)

    def _positions(self, size: tuple[int, int], dtype: jnp.dtype) -> tuple[Array | float, Array]:
        """What is added to the class token and, [1, T, D], to the patches of such a grid."""
        c, dim = self.config, self.config.transformer.embed_dim
        if isinstance(c.positions, Sines):
            made = grid.sines(size, dim, c.positions.theta)
            return 0.0, jnp.asarray(made, dtype)[None]
        if isinstance(c.positions, Axial):
            return 0.0, jnp.zeros((1, 1, dim), dtype)
        height, width = (side // c.patch_size for side in c.table_size)
        stored = learned(self, "positions", (c.class_token + height * width, dim))
        places = stored[int(c.class_token) :]
        if size != (height, width):
            places = places.reshape(height, width, dim)
            places = grid.resized(places, size, "bicubic", c.positions.antialias).reshape(-1, dim)
        return stored[:1].astype(dtype), places[None].astype(dtype)

    def _angles(self, size: tuple[int, int], batch: int) -> Whole:
        """By what rotary positions turn the tokens; those without a place by nothing."""
        c, t = self.config, self.config.transformer
        if not isinstance(c.positions, Axial):
            return NOTHING
        places = np.pad(np.indices(size).reshape(2, -1), ((0, 0), (c.leading, 0)))
        rows, columns = (jnp.broadcast_to(jnp.asarray(p), (batch, p.size)) for p in places)
        head = t.embed_dim // t.num_heads
        cosine, sine = grid.axial_rotation(rows, columns, head, c.positions.theta)
        return Whole(cosine=cosine, sine=sine)


def example(config: ViT) -> dict[str, Array]:
    """Inputs of the encoder, of one row: zeros."""
    return {"images": jnp.zeros((1, *config.image_size, config.num_channels))}
