"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one latent."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.attention import Place, cache_mask, write_cache
from deepseek_jax.layers.linear import Dtypes, Projection, RMSNorm, einsum
from deepseek_jax.ops.attention import MASKED, causal_attention
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

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a layer's cache holds of each token."""
        return {"latent": (self.kv_rank,), "rope_key": (self.rope_dim,)}


class LatentAttention(nn.Module):
    """MLA as a module: expanded heads for training, absorbed projections for decoding.

    Its cache is {"latent": [B, S, C], "rope_key": [B, S, P]}, the latent after its norm, the
    rotary key after its rotation.
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
        for name, part in parts.items():
            setattr(self, name, Projection(*part, self.dtypes))

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, cache: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Any] | None]:
        c = self.config
        q = self.q(x) if c.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q_nope, q_rope = jnp.split(q, (c.nope_dim,), axis=-1)
        q_rope = rotate(q_rope, place.cosine, place.sine, c.interleaved)
        latent, rope_key = jnp.split(self.kv_down(x), (c.kv_rank,), axis=-1)
        latent = self.kv_norm(latent)
        rope_key = rotate(rope_key[:, :, None], place.cosine, place.sine, c.interleaved)
        scale = (c.nope_dim + c.rope_dim) ** -0.5 * softmax_factor(c.yarn)
        if cache is None:
            rope_key = jnp.broadcast_to(rope_key, q_rope.shape)
            out = causal_attention(
                jnp.concatenate([q_nope, q_rope], axis=-1),
                jnp.concatenate([self.k_up(latent), rope_key], axis=-1),
                self.v_up(latent),
                place.segments,
                scale=scale,
            )
            return self.o(out), None
        new = {"latent": latent, "rope_key": rope_key[:, :, 0]}
        cache = {name: write_cache(cache[name], new[name], place.positions) for name in new}
        return self.o(self._absorbed(q_nope, q_rope, cache, place, scale)), cache

    def _absorbed(self, q_nope, q_rope, cache, place, scale):
        """Attend in the latent space: k_up moves to the query and v_up to the result."""
        dtype = self.dtypes.compute
        query = einsum("btnh,cnh->btnc", q_nope, self.k_up.weight, dtype)
        latent, rope_key = cache["latent"].astype(dtype), cache["rope_key"].astype(dtype)
        f32 = {"preferred_element_type": jnp.float32}
        scores = jnp.einsum("btnc,bsc->bnts", query, latent, **f32)
        scores = (scores + jnp.einsum("btnp,bsp->bnts", q_rope, rope_key, **f32)) * scale
        mask = cache_mask(place.positions, latent.shape[1])
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
        seen = jnp.einsum("bnts,bsc->btnc", weights.astype(dtype), latent, **f32)
        return einsum("btnc,cnh->btnh", seen, self.v_up.weight, dtype)
