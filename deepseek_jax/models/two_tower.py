"""Two towers in one shared space: what contrastive training brings together (CLIP, SigLIP).

Each tower's pooled vector goes through a projection (or none) and is normalized; the logits of a
pair are their product times a learned scale, plus a learned bias where the loss is SigLIP's.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.block import Remat
from deepseek_jax.layers.linear import Dtypes, Projection, weight
from deepseek_jax.models import text_tower, vit
from deepseek_jax.models.build import Network, declarations, dtypes_of
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.vit import ViT
from deepseek_jax.ops.contrastive import START, Kind, l2_normalized


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTower:
    """An image tower and a text tower."""

    image: ViT
    text: TextTower
    shared_dim: int | None = 512
    """Width of the shared space, reached by a projection of each tower; None: as they come out."""
    loss: Kind = "softmax"
    """What brings the towers together: CLIP's, or SigLIP's, whose logits have a bias as well."""
    init_scale: float = 0.02

    def __post_init__(self):
        if self.image.pooling == "none":
            raise ValueError("image.pooling is 'none': there is no vector to compare.")
        widths = self.image.transformer.embed_dim, self.text_dim
        if self.shared_dim is None and widths[0] != widths[1]:
            raise ValueError(
                f"the towers' vectors have widths {widths}; give shared_dim to bring them together."
            )

    @property
    def text_dim(self) -> int:
        """Width of the text tower's vector."""
        return self.text.head_dim or self.text.transformer.embed_dim

    @property
    def num_layers(self) -> int:
        """Of both towers."""
        return self.image.transformer.num_layers + self.text.transformer.num_layers

    @property
    def remat(self) -> Remat:
        """The image tower's."""
        return self.image.transformer.remat

    @property
    def vocab_size(self) -> int:
        """Tokens that the text tower knows."""
        return self.text.vocab_size


class Pairing(NamedTuple):
    """Both towers' vectors of a batch, normalized, float32, and what turns products into logits."""

    image: Float[Array, "B E"]
    text: Float[Array, "B E"]
    log_scale: Float[Array, ""]
    bias: Float[Array, ""]
    """0 where the model has none."""


class TwoTowers(nn.Module):
    """Two towers as a module."""

    config: TwoTower
    dtypes: Dtypes

    def setup(self):
        c = self.config
        self.image = vit.VisionTransformer(c.image, self.dtypes)
        self.text = text_tower.TextTransformer(c.text, self.dtypes)
        if c.shared_dim is not None:
            axes = ("embed", "mlp")
            self.image_projection, self.text_projection = (
                Projection("btd,de->bte", (width, c.shared_dim), axes, self.dtypes)
                for width in (c.image.transformer.embed_dim, c.text_dim)
            )
        kind, (scale, bias) = jnp.dtype(jnp.float32), START[c.loss]
        self.logit_scale = weight(self, "logit_scale", (), (), init=scale, dtype=kind)
        if c.loss == "sigmoid":
            self.logit_bias = weight(self, "logit_bias", (), (), init=bias, dtype=kind)

    def embed_image(self, images: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """Normalized vectors of images."""
        pooled = self.image(images).pooled
        if self.config.shared_dim is not None:
            pooled = self.image_projection(pooled[:, None])[:, 0]
        return l2_normalized(pooled)

    def embed_text(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B E"]:
        """Normalized vectors of texts."""
        pooled = self.text(tokens, mask).pooled
        if self.config.shared_dim is not None:
            pooled = self.text_projection(pooled[:, None])[:, 0]
        return l2_normalized(pooled)

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
    ) -> Pairing:
        bias = self.logit_bias if self.config.loss == "sigmoid" else jnp.zeros(())
        scale, bias = (x.astype(jnp.float32) for x in (self.logit_scale, bias))
        return Pairing(self.embed_image(images), self.embed_text(tokens, mask), scale, bias)


@dataclasses.dataclass(frozen=True)
class Towers(Network):
    """Two towers as functions."""

    config: TwoTower
    module: TwoTowers

    def apply(
        self, params: Any, images: Array, tokens: Array, mask: Array | None = None
    ) -> Pairing:
        """Both sides of a batch of pairs."""
        return self.module.apply({"params": params}, images, tokens, mask)

    def embed_image(self, params: Any, images: Array) -> Float[Array, "B E"]:
        """Normalized vectors of images [B, H, W, C], float32."""
        return self.module.apply({"params": params}, images, method="embed_image")

    def embed_text(
        self, params: Any, tokens: Array, mask: Array | None = None
    ) -> Float[Array, "B E"]:
        """Normalized vectors of texts, float32."""
        return self.module.apply({"params": params}, tokens, mask, method="embed_text")


def build_towers(config: TwoTower, precision: Precision = Precision()) -> Towers:
    """The towers of a config: no parameters are made, only their shapes."""
    dtypes = dtypes_of(precision)
    module = TwoTowers(config, dtypes)
    inputs = vit.example(config.image) | text_tower.example(config.text)
    return Towers(config, dtypes, declarations(module, **inputs), module)
