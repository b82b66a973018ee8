"""Vision transformers (arXiv 2010.11929): patches of an image as tokens of an encoder.

Images are Float[Array, "B H W C"]. One config covers ViT, CLIP, SigLIP and DINOv2; where they
differ is a field.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.encoder import Encoded, Stack, Transformer, learned, with_token
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT:
    """A vision transformer."""

    transformer: Transformer
    image_size: tuple[int, int] = (224, 224)
    """Height and width that the learned positions belong to."""
    patch_size: int = 16
    num_channels: int = 3
    class_token: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    """A norm before the first block (CLIP)."""
    final_norm: bool = True
    """Whether the last hidden state passes the last norm; CLIP norms the pooled vector alone."""
    pooling: Literal["none", "class"] = "class"
    """How one vector comes out: the class token's own, after the last norm."""
    init_scale: float = 0.02

    def __post_init__(self):
        if self.patch_size < 1 or any(size % self.patch_size for size in self.image_size):
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size "
                f"({self.patch_size})."
            )
        if self.pooling == "class" and not self.class_token:
            raise ValueError("pooling 'class' needs class_token.")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size


def patches(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B T X"]:
    """Squares of pixels in reading order, each flat: rows, then columns, then channels."""
    batch, height, width, channels = images.shape
    cut = images.reshape(batch, height // size, size, width // size, size, channels)
    return cut.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


class VisionTransformer(nn.Module):
    """A ViT as a module."""

    config: ViT
    dtypes: Dtypes

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], keep: bool = False) -> Encoded:
        c, t, kept = self.config, self.config.transformer, self.dtypes
        if images.shape[1:] != (*c.image_size, c.num_channels):
            raise ValueError(
                f"images are {images.shape[1:]}, and this encoder's "
                f"{(*c.image_size, c.num_channels)}"
            )
        p = c.patch_size
        shape, axes = (p, p, c.num_channels, t.embed_dim), ("patch", "patch", "patch", "embed")
        embed = Projection("btijc,ijcd->btd", shape, axes, kept, c.patch_bias, name="patch")
        x = embed(patches(images, p))
        count = x.shape[1] + c.class_token
        if c.class_token:
            x = with_token(learned(self, "class_token", (t.embed_dim,)), x)
        positions = learned(self, "positions", (count, t.embed_dim))
        x = x + positions[None].astype(x.dtype)
        if c.pre_norm:
            x = LayerNorm(kept, eps=t.norm_eps, name="pre_norm")(x)
        x, layers = Stack(t, kept, keep, name="segment_0")(x)
        norm = LayerNorm(kept, eps=t.norm_eps, name="final_norm")
        hidden = norm(x) if c.final_norm else x
        pooled = None
        if c.pooling == "class":
            pooled = hidden[:, 0] if c.final_norm else norm(x[:, :1])[:, 0]
        return Encoded(hidden, pooled, layers=layers)


def example(config: ViT) -> dict[str, Array]:
    """Inputs of the encoder, of one row: zeros."""
    return {"images": jnp.zeros((1, *config.image_size, config.num_channels))}
