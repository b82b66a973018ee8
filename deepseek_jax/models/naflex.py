"""Vision transformers at each image's own size and shape: NaFlex (SigLIP 2, arXiv 2502.14786).

An image comes as its patches in reading order, padded to a budget of tokens: Float[Array, "B T X"],
X a patch's rows, columns, channels. Learned positions are resized to each image's own grid.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.layers.encoder import Encoded, Stack, Transformer, Whole, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection
from deepseek_jax.layers.pooling import Pooling, pooled
from deepseek_jax.ops.grid import resized_each


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaFlex:
    """A vision transformer of images of any aspect ratio."""

    transformer: Transformer
    grid_size: int = 16
    """Learned positions along each side; resizing them is bilinear, antialiased."""
    patch_size: int = 16
    num_channels: int = 3
    pooling: Pooling = "attention"
    init_scale: float = 0.02

    def __post_init__(self):
        if min(self.grid_size, self.patch_size) < 1:
            raise ValueError(
                f"grid_size ({self.grid_size}) and patch_size ({self.patch_size}) must be at least "
                "1."
            )
        if self.pooling in ("class", "tanh"):
            raise ValueError(f"pooling {self.pooling!r} needs a class token; NaFlex has none.")

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.patch_size**2 * self.num_channels


class NaFlexTransformer(nn.Module):
    """A NaFlex encoder as a module."""

    config: NaFlex
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B T X"],
        mask: Bool[Array, "B T"],
        shapes: Int[Array, "B 2"],
        keep: bool = False,
    ) -> Encoded:
        """`mask` says which patches are real, `shapes` each image's patches by height and width."""
        c, t, kept = self.config, self.config.transformer, self.dtypes
        if patches.shape[-1] != c.patch_dim:
            raise ValueError(
                f"patches are {patches.shape[-1]} wide, and this encoder's {c.patch_dim}"
            )
        shape = (c.patch_dim, t.embed_dim)
        x = Projection("btx,xd->btd", shape, ("patch", "embed"), kept, True, name="patch")(patches)
        positions = learned(self, "positions", (c.grid_size**2, t.embed_dim))
        positions = positions.reshape(c.grid_size, c.grid_size, -1)
        x = x + resized_each(positions, shapes, x.shape[1], "bilinear").astype(x.dtype)
        x, layers = Stack(t, kept, keep, name="segment_0")(x, Whole(mask))
        hidden = LayerNorm(kept, eps=t.norm_eps, name="final_norm")(x)
        return Encoded(hidden, pooled(c.pooling, t, kept, hidden, mask, 0), mask, layers)


def example(config: NaFlex) -> dict[str, Array]:
    """Inputs of the encoder, of one row: zeros, a patch."""
    return {
        "patches": jnp.zeros((1, 1, config.patch_dim)),
        "mask": jnp.ones((1, 1), bool),
        "shapes": jnp.ones((1, 2), jnp.int32),
    }
