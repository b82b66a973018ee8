"""A transformer over whole texts: CLIP's (causal) and SigLIP's (seeing all) text towers.

Tokens are Int[Array, "B T"]; positions are learned, so texts have a longest length.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from deepseek_jax.layers.encoder import Encoded, Stack, Transformer, Whole, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection
from deepseek_jax.layers.pooling import pooled
from deepseek_jax.models.decoder import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTower:
    """A text encoder."""

    transformer: Transformer
    vocab_size: int
    max_length: int = 77
    """Positions that are learned."""
    pooling: Literal["end", "first_end", "last", "mean"] = "mean"
    """Where a text's vector is taken: at the largest token id ("end": CLIP's first releases, whose
    end token is their last), at the first `end_id`, at the last place, or a mean over real ones."""
    end_id: int = 2
    """The end token, for "first_end"."""
    head_dim: int | None = None
    """Outputs of a linear head with a bias on the pooled vector (SigLIP); None: no head."""
    init_scale: float = 0.02

    def __post_init__(self):
        if min(self.vocab_size, self.max_length) < 1:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) and max_length ({self.max_length}) must be at "
                "least 1."
            )


class TextTransformer(nn.Module):
    """A text tower as a module."""

    config: TextTower
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        keep: bool = False,
    ) -> Encoded:
        c, t, kept = self.config, self.config.transformer, self.dtypes
        length = tokens.shape[1]
        if length > c.max_length:
            raise ValueError(f"texts have {length} tokens, and this tower {c.max_length} positions")
        table = Table((c.vocab_size, t.embed_dim), ("vocab", "embed"), kept, name="embedding")
        positions = learned(self, "positions", (c.max_length, t.embed_dim))[:length]
        x = table(tokens) + positions[None].astype(kept.compute)
        x, layers = Stack(t, kept, keep, name="segment_0")(x, Whole(mask=mask))
        hidden = LayerNorm(kept, eps=t.norm_eps, name="final_norm")(x)
        if c.pooling == "mean":
            one = pooled("mean", t, kept, hidden, mask, 0)
        elif c.pooling == "last":
            one = hidden[:, -1]
        else:
            ends = tokens if c.pooling == "end" else tokens == c.end_id
            place = jnp.argmax(ends, axis=1)[:, None, None]
            one = jnp.take_along_axis(hidden, place, axis=1)[:, 0]
        if c.head_dim is not None:
            shape, axes = (t.embed_dim, c.head_dim), ("embed", "mlp")
            head = Projection("btd,de->bte", shape, axes, kept, True, name="head")
            one = head(one[:, None])[:, 0]
        return Encoded(hidden, one, mask, layers)


def example(config: TextTower) -> dict[str, Array]:
    """Inputs of the tower, of one row: zeros."""
    return {"tokens": jnp.zeros((1, config.max_length), jnp.int32)}
