"""One vector an input: how an encoder's tokens become one."""

from typing import Literal, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deepseek_jax.layers.encoder import MLP, Transformer, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection
from deepseek_jax.ops.attention import full_attention

Pooling: TypeAlias = Literal["none", "class", "mean", "attention", "tanh"]


def cross_attention(
    queries: Float[Array, "B U E"],
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B T"] | None,
    num_heads: int,
    dtypes: Dtypes,
) -> Float[Array, "B U E"]:
    """What queries find in the real tokens of x, called within a module: its weights lie there.

    torch.nn.MultiheadAttention(E, num_heads, kdim=D, vdim=D), with biases.
    """
    width = queries.shape[-1]
    h, axes = width // num_heads, ("embed", "heads", "head")
    q, k, v = (
        Projection(
            "btd,dnh->btnh", (y.shape[-1], num_heads, h), axes, dtypes, True, name=name
        )(y)
        for name, y in (("q", queries), ("k", x), ("v", x))
    )  # fmt: skip
    y = full_attention(q, k, v, mask, scale=h**-0.5)
    shape, axes = (num_heads, h, width), ("heads", "head", "embed")
    return Projection("btnh,nhd->btd", shape, axes, dtypes, True, name="o")(y)


class AttentionPool(nn.Module):
    """A learned query attends to all real tokens; its answer passes a feed-forward part.

    y = attention(probe, x); y + mlp(norm(y)): the MAP head of "Scaling Vision Transformers" (arXiv
    2106.04560), as SigLIP has it.
    """

    config: Transformer
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B D"]:
        c, kept = self.config, self.dtypes
        probe = learned(self, "probe", (c.embed_dim,)).astype(x.dtype)
        probe = jnp.broadcast_to(probe[None, None], (x.shape[0], 1, c.embed_dim))
        y = cross_attention(probe, x, mask, c.num_heads, kept)
        normal = LayerNorm(kept, eps=c.norm_eps, name="norm")(y)
        y = y + MLP(c.embed_dim, c.mlp_dim, c.activation, kept, name="mlp")(normal)
        return y[:, 0]


def pooled(
    kind: Pooling,
    config: Transformer,
    dtypes: Dtypes,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B T"] | None,
    leading: int,
) -> Float[Array, "B D"] | None:
    """One vector a row, called within a module: its weights, if any, lie under `head`.

    "class" is the first token, "tanh" tanh(W times it + b), "attention" the `AttentionPool` of all,
    "mean" that of the real tokens behind the first `leading` (class and registers).
    """
    if kind == "none":
        return None
    if kind == "attention":
        return AttentionPool(config, dtypes, name="head")(x, mask)
    if kind == "mean":
        tokens = x[:, leading:].astype(jnp.float32)
        real = jnp.ones((1, tokens.shape[1]), bool) if mask is None else mask[:, leading:]
        total = jnp.where(real[:, :, None], tokens, 0).sum(1)
        return (total / jnp.maximum(real.sum(1)[:, None], 1)).astype(x.dtype)
    if kind == "tanh":
        shape, axes = (config.embed_dim, config.embed_dim), ("embed", "mlp")
        dense = Projection("btd,df->btf", shape, axes, dtypes, True, name="head")
        return jnp.tanh(dense(x[:, :1]))[:, 0]
    return x[:, 0]
