"""Attention to a chosen part of the past: DeepSeek-V3.2's indexer, and a learned gate.

The arithmetic, and which papers it is from, stand in ops/sparse.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.attention import (
    GQA,
    GroupedQueryAttention,
    Place,
    Selection,
    cache_mask,
    grown,
)
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection, weight
from deepseek_jax.ops import sparse
from deepseek_jax.ops.matmul import dot
from deepseek_jax.ops.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Indexer:
    """What chooses the tokens that latent attention sees (V3.2's lightning indexer)."""

    num_heads: int = 64
    head_dim: int = 128
    """Its first part, of MLA's rope_dim, turns with positions (pairs in halves)."""
    top_k: int = 2048
    """Tokens that a query attends to."""

    def __post_init__(self):
        if min(self.num_heads, self.head_dim, self.top_k) < 1:
            raise ValueError(
                f"indexer.num_heads ({self.num_heads}), head_dim ({self.head_dim}) and top_k "
                f"({self.top_k}) must be at least 1."
            )


class LightningIndexer(nn.Module):
    """The indexer's queries, keys and weights of each token, as `ops.sparse.index_scores` takes.

    Nothing that it computes moves the weights of the model around it.
    """

    config: Indexer
    embed_dim: int
    q_rank: int
    rope_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], low: Float[Array, "B T Q"], place: Place
    ) -> tuple[Float[Array, "B T I X"], Float[Array, "B T X"], Float[Array, "B T I"]]:
        """`low` is the compressed query that MLA shares with it."""
        c, d = self.config, self.embed_dim
        x, low = jax.lax.stop_gradient((x, low))
        shape, axes = (self.q_rank, c.num_heads, c.head_dim), ("q_rank", "heads", "head")
        q = Projection("btr,rnh->btnh", shape, axes, self.dtypes, name="q_up")(low)
        k = Projection("btd,dh->bth", (d, c.head_dim), ("embed", "head"), self.dtypes, name="k")(x)
        k = LayerNorm(self.dtypes, axis="head", name="k_norm")(k)

        def turned(y):
            rotary, rest = jnp.split(y, (self.rope_dim,), axis=-1)
            return jnp.concatenate([rotate(rotary, place.cosine, place.sine), rest], axis=-1)

        # As transformers keeps it: float32, like a router.
        w = weight(
            self, "weight", (d, c.num_heads), ("embed", "heads"), reduced=(0,), outputs=(1,),
            dtype=jnp.dtype(jnp.float32),
        )  # fmt: skip
        weights = dot("btd,dn->btn", x.astype(jnp.float32), w)
        scale = (c.num_heads * c.head_dim) ** -0.5
        return turned(q), turned(k[:, :, None])[:, :, 0], weights * scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedGQA(GQA):
    """Grouped-query attention to the part of the past that a learned gate scores best."""

    ratio: float = 0.3
    """Of the tokens that a query could see, how many it keeps; its own always."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; it must be above 0 and at most 1.")
        if self.window is not None:
            raise ValueError("gated attention chooses from the whole past: leave window unset.")

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a layer's cache holds of each token."""
        return super().cache_shapes | {"gate": ()}


class GatedAttention(GroupedQueryAttention):
    """GatedGQA as a module. Its cache also holds each token's gate: [B, S]."""

    config: GatedGQA

    def attend(self, x, q, k, v, place: Place, cache: dict[str, Any] | None, scale: float):
        """As its parent's, over the kept tokens."""
        shape, axes = (self.embed_dim, 1), ("embed", "router")
        w = weight(self, "gate", shape, axes, reduced=(0,), outputs=(1,))
        gate = dot("btd,do->bt", x.astype(jnp.float32), w.astype(jnp.float32))
        if cache is None:
            part = {"ratio": self.config.ratio, "scale": scale}
            out, kept = sparse.gated(q, k, v, gate, place.segments, **part)
            return out, None, Selection(kept, jnp.zeros_like(kept))
        cache = grown(cache, {"k": k, "v": v, "gate": gate}, place)
        mask = cache_mask(place.positions, cache["k"].shape[1])
        keep = sparse.gate_mask(cache["gate"], mask, place.positions, self.config.ratio)
        out = sparse.gated_reference(q, cache["k"], cache["v"], cache["gate"], keep, scale)
        return out, cache, None
