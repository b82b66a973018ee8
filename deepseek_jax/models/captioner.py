"""A decoder that writes a caption of what an image tower sees, beside the contrastive towers.

As CoCa (arXiv 2205.01917) trains one, in its simplest form: the image's tokens, projected, stand
before the caption's own in one causal stack, and the table of embeddings is also the head.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.layers.encoder import Stack, Transformer, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection
from deepseek_jax.models.decoder import Table
from deepseek_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captioner:
    """A caption decoder; its vocabulary and its longest caption are the text tower's."""

    transformer: Transformer

    def __post_init__(self):
        if not self.transformer.causal:
            raise ValueError("captioner.transformer.causal must be True: it writes from the left.")


class CaptionTransformer(nn.Module):
    """A caption decoder as a module."""

    config: Captioner
    vocab_size: int
    max_length: int
    image_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, seen: Float[Array, "B P C"], tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """What each token's follower is predicted from, given an image's hidden state."""
        t, kept = self.config.transformer, self.dtypes
        table = Table((self.vocab_size, t.embed_dim), ("vocab", "embed"), kept, name="embedding")
        places = learned(self, "positions", (self.max_length, t.embed_dim))[: tokens.shape[1]]
        shape, axes = (self.image_dim, t.embed_dim), ("embed", "mlp")
        project = Projection("btd,de->bte", shape, axes, kept, True, name="image_projection")
        image = constrain(project(seen))
        words = table(tokens) + places[None].astype(kept.compute)
        x, _ = Stack(t, kept, name="segment_0")(jnp.concatenate([image, words], axis=1))
        return LayerNorm(kept, eps=t.norm_eps, name="final_norm")(x[:, seen.shape[1] :])
