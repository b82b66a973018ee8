"""DeepSeek-VL 7B's two encoders (arXiv 2403.05525, section 3.1), their features side by side.

A large view of a picture passes a SAM, a small one of the same a ViT. Both are one array, the large
square and below it, at its left, the small one: `data.tiles.canvas`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.conv import PlaneConvolution
from deepseek_jax.layers.encoder import Encoded, Transformer
from deepseek_jax.layers.linear import Dtypes, weight
from deepseek_jax.models.sam import SAM, Neck, SAMTransformer
from deepseek_jax.models.vit import VisionTransformer, ViT
from deepseek_jax.ops import grid
from deepseek_jax.ops.matmul import dot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Two encoders of a picture."""

    low: ViT
    """Of the small view."""
    high: SAM
    """Of the large one: its map, and `alpha` times one that comes from its first block that sees
    all, pass two convolutions to as many places as `low` has patches, four times as wide."""

    def __post_init__(self):
        rows, columns = self.low.grid
        small, large = self.low.image_size, self.high.image_size
        if rows != columns or small[0] != small[1] or small[0] > large or self.low.leading:
            raise ValueError(
                f"vision.low must take squares no larger than vision.high's ({large}), and have "
                f"no tokens but patches; its image_size is {small}."
            )
        if not self.high.whole_layers or self.low.num_channels != self.high.num_channels:
            raise ValueError(
                "vision.high must have whole_layers, and as many num_channels as vision.low."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        return self.low.grid

    @property
    def widths(self) -> tuple[int, int]:
        """Of a feature: how much of it is `high`'s, then `low`'s."""
        return 4 * self.high.output_dim, self.low.transformer.embed_dim

    @property
    def sizes(self) -> tuple[int, int]:
        """Pixels along the large view's side and the small one's."""
        return self.high.image_size, self.low.image_size[0]

    @property
    def transformers(self) -> tuple[Transformer, ...]:
        """Of both."""
        return self.high.transformer, self.low.transformer

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """Of a canvas: height, width, channels."""
        large, small = self.sizes
        return large + small, large, self.low.num_channels


class HybridTransformer(nn.Module):
    """A Hybrid as a module: `hidden` are features, `high`'s channels before `low`'s."""

    config: Hybrid
    dtypes: Dtypes

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Encoded:
        c, kept, side = self.config, self.dtypes, self.config.grid[0]
        if images.shape[1:] != c.view_shape:
            raise ValueError(f"a view is {images.shape[1:]}, and this model's {c.view_shape}")
        large, small = c.sizes
        seen = SAMTransformer(c.high, kept, name="high")(images[:, :large])
        early = Neck(c.high.side, c.high.output_dim, kept, name="neck")(seen.features)
        down = [
            PlaneConvolution(factor * c.high.output_dim, 3, 2, kept, name=f"down_{number}")
            for number, factor in ((1, 2), (2, 4))
        ]

        def fitted(x: Array) -> Array:
            """As many places as the small view has; both convolutions halve their number."""
            weights = grid.resize_weights(
                jnp.arange(4 * side), c.high.side, 4 * side, "bilinear", False
            )
            x = x.reshape(-1, c.high.side, c.high.side, x.shape[-1]).astype(jnp.float32)
            x = dot("aw,bhwd->bhad", weights, dot("ah,bhwd->bawd", weights, x))
            for convolution in down:
                x = convolution(x)
            return x.reshape(x.shape[0], side * side, -1)

        alpha = weight(self, "alpha", (1,), ("position",), init="zeros").astype(jnp.float32)
        high = fitted(seen.hidden).astype(jnp.float32)
        high += alpha.reshape(1, 1, 1) * fitted(early).astype(jnp.float32)
        low = VisionTransformer(c.low, kept, name="low")(images[:, large:, :small])
        return Encoded(jnp.concatenate([high.astype(low.hidden.dtype), low.hidden], axis=-1))
