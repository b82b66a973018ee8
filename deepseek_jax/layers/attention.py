"""Grouped-query attention with an optional sliding window and rotary positions."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.core import target
from deepseek_jax.layers.linear import Dtypes, Projection, RMSNorm
from deepseek_jax.ops.attention import KERNELS, causal_attention, masked_attention, preferred
from deepseek_jax.ops.matmul import put
from deepseek_jax.ops.ring import ring_attention
from deepseek_jax.ops.rope import Llama3, Yarn, rotate, softmax_factor
from deepseek_jax.parallel.manual import in_region, per_device
from deepseek_jax.parallel.sharding import heads_spec, tokens_spec


class Place(NamedTuple):
    """Where tokens stand: shared by all layers. Decoding fills positions, training segments."""

    cosine: Float[Array, "B T half"]
    sine: Float[Array, "B T half"]
    segments: Int[Array, "B T"] | None = None
    positions: Int[Array, "B T"] | None = None
    order: Int[Array, " T"] | None = None
    """Where in its row each token stands, when rows lie zigzag over the context axis (ops/ring)."""
    reach: Int[Array, "B T"] | None = None
    """Where the last token stands that each one sees, if some see later ones: its place in the row,
    when decoding its position."""

    @property
    def last(self) -> Int[Array, "B T"] | None:
        """The last position that each token sees when decoding."""
        return self.positions if self.reach is None else self.reach


class Selection(NamedTuple):
    """What a sparse attention did with a microbatch; stacked layers add a leading dimension."""

    kept: Float[Array, "*R"]
    """Pairs of a query and a token that it attended to, padding left out."""
    divergence: Float[Array, "*R"]
    """How far an indexer's scores are from the attention that they replace, summed over tokens."""


def write_cache(
    cache: Float[Array, "B S *x"], values: Float[Array, "B T *x"], positions: Int[Array, "B T"]
) -> Float[Array, "B S *x"]:
    """Put each token's values at its position of its row; positions below 0 are padding."""
    rows = jnp.arange(cache.shape[0])[:, None]
    slots = jnp.where(positions < 0, cache.shape[1], positions)  # past the end: dropped
    return put(cache, (rows, slots), values.astype(cache.dtype))


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    place: Place,
    **options: Any,
) -> Float[Array, "B T N Hv"]:
    """`causal_attention`; on a mesh its kernels run on each device's own rows and heads.

    Rows that lie zigzag over the context axis take `ring_attention`; where tokens see later ones,
    the whole square of scores is made.
    """
    segments = place.segments
    if place.reach is not None:
        return masked_attention(q, k, v, reaching_mask(place.reach, segments), options["scale"])
    if place.order is not None:
        return _around_the_ring(q, k, v, segments, **options)
    if target.partitioned() and options.get("keep") is None and preferred(q) in KERNELS:
        spec = heads_spec(q.shape[0], q.shape[2], k.shape[2])
        if spec is not None:
            given = (q, k, v) if segments is None else (q, k, v, segments)

            def of_one(q, k, v, segments=None):
                return causal_attention(q, k, v, segments, **options)

            specs = (spec, spec, spec, PartitionSpec(spec[0], None))[: len(given)]
            return per_device(of_one, specs, spec)(*given)
    return causal_attention(q, k, v, segments, **options)


def _around_the_ring(q, k, v, segments, *, scale, window=None, keep=None):
    if keep is not None:
        raise ValueError("a sparse attention's rows cannot lie zigzag")
    if in_region():
        return ring_attention(q, k, v, segments, "context", scale, window)
    sizes = jax.sharding.get_abstract_mesh().shape
    heads = "tensor" if k.shape[2] % sizes["tensor"] == 0 else None
    tokens = tokens_spec(*q.shape[:2])
    spec = PartitionSpec(*tokens[:2], heads, None)
    given = (q, k, v) if segments is None else (q, k, v, segments)

    def of_one(q, k, v, segments=None):
        return ring_attention(q, k, v, segments, "context", scale, window)

    specs = (spec, spec, spec, PartitionSpec(*tokens[:2]))[: len(given)]
    return per_device(of_one, specs, spec)(*given)


def grown(cache: dict[str, Any], new: dict[str, Array], place: Place) -> dict[str, Any]:
    """The cache with every token's new values at its position."""
    return {name: write_cache(cache[name], new[name], place.positions) for name in new}


def reaching_mask(
    reach: Int[Array, "B T"], segments: Int[Array, "B T"] | None
) -> Bool[Array, "B T T"]:
    """Which tokens of its segment each one sees: up to the place in the row that it reaches."""
    mask = jnp.arange(reach.shape[1])[None, None] <= reach[:, :, None]
    if segments is not None:
        mask &= segments[:, :, None] == segments[:, None]
    return mask


def cache_mask(positions: Int[Array, "B T"], length: int, window: int | None = None) -> Array:
    """Which cache slots each token sees: those up to its own position, within the window."""
    slot = jnp.arange(length)[None, None, :]
    mask = slot <= positions[:, :, None]
    if window is not None:
        mask &= slot > positions[:, :, None] - window
    return mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQA:
    """Grouped-query attention (arXiv 2305.13245); as many kv heads as heads is multi-head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    """Whether the query, key and value projections carry one (Qwen2 does)."""
    norm_eps: float | None = None
    """Of RMS norms over every query and key head before their rotation (Qwen3); None: no norms."""
    window: int | None = None
    """Tokens a query sees, itself included; None sees all before it."""
    rope_theta: float = 10000.0
    yarn: Yarn | Llama3 | None = None
    """How positions stretch beyond the length that was trained first."""

    def __post_init__(self):
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1:
            raise ValueError(
                f"num_heads ({self.num_heads}), num_kv_heads ({self.num_kv_heads}) and head_dim "
                f"({self.head_dim}) must be at least 1."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})."
            )
        if self.norm_eps is not None and self.norm_eps <= 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be above 0, or None.")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}; it must be above 1.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary turns pairs.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; it counts the token itself, so 1 or more.")

    @property
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a layer's cache holds of each token."""
        return dict.fromkeys(("k", "v"), (self.num_kv_heads, self.head_dim))


class GroupedQueryAttention(nn.Module):
    """GQA as a module. Its cache is {"k", "v"}: [B, S, K, H] each, keys already rotated."""

    config: GQA
    embed_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], place: Place, cache: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Any] | None, Selection | None]:
        c = self.config
        q, k, v = (
            Projection(
                "btd,dnh->btnh",
                (self.embed_dim, num_heads, c.head_dim),
                ("embed", axis, "head"),
                self.dtypes,
                bias=c.bias,
                name=name,
            )(x)
            for name, num_heads, axis in (
                ("q", c.num_heads, "heads"),
                ("k", c.num_kv_heads, "kv_heads"),
                ("v", c.num_kv_heads, "kv_heads"),
            )
        )
        if c.norm_eps is not None:
            norms = {"axis": "head", "eps": c.norm_eps}
            q = RMSNorm(self.dtypes, **norms, name="q_norm")(q)
            k = RMSNorm(self.dtypes, **norms, name="k_norm")(k)
        q, k = rotate(q, place.cosine, place.sine), rotate(k, place.cosine, place.sine)
        scale = c.head_dim**-0.5 * softmax_factor(c.yarn)
        out, cache, selection = self.attend(x, q, k, v, place, cache, scale)
        shape = (c.num_heads, c.head_dim, self.embed_dim)
        axes = ("heads", "head", "embed")
        o = Projection("btnh,nhd->btd", shape, axes, self.dtypes, name="o")
        return o(out), cache, selection

    def attend(self, x, q, k, v, place, cache, scale):
        """Every head's result [B, T, N, H], the grown cache and what was selected."""
        del x
        c = self.config
        if cache is None:
            out = attend(q, k, v, place, scale=scale, window=c.window)
            return out, None, None
        cache = grown(cache, {"k": k, "v": v}, place)
        mask = cache_mask(place.last, cache["k"].shape[1], c.window)
        return masked_attention(q, cache["k"], cache["v"], mask, scale), cache, None
