"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one latent."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.attention import Place, Selection, attend, cache_mask, grown
from deepseek_jax.layers.linear import Dtypes, Projection, RMSNorm
from deepseek_jax.layers.sparse_attention import Indexer, LightningIndexer
from deepseek_jax.ops import sparse
from deepseek_jax.ops.attention import MASKED
from deepseek_jax.ops.matmul import dot, per_head
from deepseek_jax.ops.rope import Yarn, rotate, softmax_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-head latent attention; the cache holds the latent and one rotary key a token."""

    num_heads: int
    kv_rank: int
    nope_dim: int
    """Width of a head's part without positions."""
    rope_dim: int
    """Width of the rotary part; its key is shared by all heads."""
    value_dim: int
    q_rank: int | None = None
    """Query compression; None projects queries directly (V2-Lite)."""
    interleaved: bool = True
    """Rotary pairs are neighbors (2j, 2j+1), as DeepSeek stores them; else halves."""
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    indexer: Indexer | None = None
    """What chooses the tokens that a query sees (V3.2); None: it sees all before it."""

    def __post_init__(self):
        sizes = (self.num_heads, self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim)
        if min(*sizes, self.q_rank if self.q_rank is not None else 1) < 1:
            raise ValueError(
                "num_heads, kv_rank, nope_dim, rope_dim, value_dim and q_rank must be at least 1; "
                f"they are {sizes} and {self.q_rank}."
            )
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}; it must be above 1.")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim ({self.rope_dim}) must be even: rotary turns pairs.")
        if self.indexer and (self.q_rank is None or self.indexer.head_dim < self.rope_dim):
            raise ValueError(
                f"an indexer needs q_rank ({self.q_rank}) set and its head_dim "
                f"({self.indexer.head_dim}) no smaller than rope_dim ({self.rope_dim})."
            )

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a layer's cache holds of each token."""
        shapes = {"latent": (self.kv_rank,), "rope_key": (self.rope_dim,)}
        return shapes | ({"index_key": (self.indexer.head_dim,)} if self.indexer else {})


class LatentAttention(nn.Module):
    """MLA as a module: expanded heads for training, absorbed projections for decoding.

    Its cache is {"latent": [B, S, C], "rope_key": [B, S, P]}, the latent after its norm, the
    rotary key after its rotation; with an indexer also the keys that it scores.
    """

    config: MLA
    embed_dim: int
    dtypes: Dtypes

    def setup(self):
        c, d, heads = self.config, self.embed_dim, ("heads", "head")
        width = c.nope_dim + c.rope_dim
        parts = {
            "kv_down": ("btd,dc->btc", (d, c.kv_rank + c.rope_dim), ("embed", "kv_rank")),
            "k_up": ("btc,cnh->btnh", (c.kv_rank, c.num_heads, c.nope_dim), ("kv_rank", *heads)),
            "v_up": ("btc,cnh->btnh", (c.kv_rank, c.num_heads, c.value_dim), ("kv_rank", *heads)),
            "o": ("btnh,nhd->btd", (c.num_heads, c.value_dim, d), (*heads, "embed")),
        }
        if c.q_rank is None:
            parts["q"] = ("btd,dnh->btnh", (d, c.num_heads, width), ("embed", *heads))
        else:
            parts["q_down"] = ("btd,dr->btr", (d, c.q_rank), ("embed", "q_rank"))
            parts["q_up"] = ("btr,rnh->btnh", (c.q_rank, c.num_heads, width), ("q_rank", *heads))
            self.q_norm = RMSNorm(self.dtypes, axis="q_rank")
        self.kv_norm = RMSNorm(self.dtypes, axis="kv_rank")
        if c.indexer is not None:
            self.indexer = LightningIndexer(c.indexer, d, c.q_rank, c.rope_dim, self.dtypes)
        for name, part in parts.items():
            setattr(self, name, Projection(*part, self.dtypes))

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, cache: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Any] | None, Selection | None]:
        c = self.config
        low = x if c.q_rank is None else self.q_norm(self.q_down(x))
        q = self.q(x) if c.q_rank is None else self.q_up(low)
        q_nope, q_rope = jnp.split(q, (c.nope_dim,), axis=-1)
        q_rope = rotate(q_rope, place.cosine, place.sine, c.interleaved)
        latent, rope_key = jnp.split(self.kv_down(x), (c.kv_rank,), axis=-1)
        latent = self.kv_norm(latent)
        rope_key = rotate(rope_key[:, :, None], place.cosine, place.sine, c.interleaved)
        scale = (c.nope_dim + c.rope_dim) ** -0.5 * softmax_factor(c.yarn)
        index = None if c.indexer is None else self.indexer(x, low, place)
        if cache is None:
            rope_key = jnp.broadcast_to(rope_key, q_rope.shape)
            q = jnp.concatenate([q_nope, q_rope], axis=-1)
            k = jnp.concatenate([self.k_up(latent), rope_key], axis=-1)
            keep = selection = None
            if index is not None:
                chosen = {"top_k": c.indexer.top_k, "scale": scale}
                keep, divergence = sparse.indexed(index, q, k, place.segments, **chosen)
                valid = True if place.segments is None else (place.segments > 0)[..., None]
                selection = Selection((keep & valid).sum(dtype=jnp.float32), divergence)
            v = self.v_up(latent)
            out = attend(q, k, v, place, scale=scale, keep=keep)
            return self.o(out), None, selection
        new = {"latent": latent, "rope_key": rope_key[:, :, 0]}
        cache = grown(cache, new if index is None else new | {"index_key": index[1]}, place)
        mask = cache_mask(place.last, cache["latent"].shape[1])
        seen = cache["latent"], cache["rope_key"]
        if index is not None:
            scores = sparse.index_scores(index[0], cache["index_key"], index[2])
            if x.shape[1] == 1 and c.indexer.top_k < mask.shape[-1]:
                # One query: only what it keeps is read.
                scores = jnp.where(mask, scores, -jnp.inf)
                best, slots = jax.lax.top_k(scores[:, 0], c.indexer.top_k)
                seen = tuple(jnp.take_along_axis(a, slots[..., None], axis=1) for a in seen)
                mask = (best > -jnp.inf)[:, None]
            else:
                mask = sparse.best(scores, mask, c.indexer.top_k)
        return self.o(self._absorbed(q_nope, q_rope, *seen, mask, scale)), cache, None

    def _absorbed(self, q_nope, q_rope, latent, rope_key, mask, scale):
        """Attend in the latent space: k_up moves to the query and v_up to the result."""
        dtype = self.dtypes.compute
        k_up, v_up = (w.weight.astype(dtype) for w in (self.k_up, self.v_up))
        query = per_head("btnh,cnh->btnc", q_nope.astype(dtype), k_up).astype(dtype)
        latent, rope_key = latent.astype(dtype), rope_key.astype(dtype)
        scores = dot("btnc,bsc->bnts", query, latent)
        scores = (scores + dot("btnp,bsp->bnts", q_rope, rope_key)) * scale
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
        # Heads first, then turned: XLA on CPU has no bfloat16 product that also turns its result.
        seen = dot("bnts,bsc->bntc", weights.astype(dtype), latent).swapaxes(1, 2)
        return per_head("btnc,cnh->btnh", seen.astype(dtype), v_up).astype(dtype)
