"""The transformer of encoders: blocks that see a whole input, shared by image, sound, video, text.

One block serves the published families: layer norms before or after, biases where a family has
them, a plain or gated feed-forward part. Rows may be padded: `Whole.mask` says what is real.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deepseek_jax.layers.block import Remat, stacked
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection, weight
from deepseek_jax.ops.attention import full_attention
from deepseek_jax.ops.rope import rotate
from deepseek_jax.parallel.sharding import constrain


def lean(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An activation in float32, of which only the input is kept for its slope.

    Autodiff would keep, and in half precision round, what comes up on the way.
    """

    @jax.custom_vjp
    def of(x: Array) -> Array:
        return forward(x)[0]

    def forward(x: Array) -> tuple[Array, Array]:
        return function(x.astype(jnp.float32)).astype(x.dtype), x

    def backward(x: Array, slope: Array) -> tuple[Array]:
        (change,) = jax.vjp(function, x.astype(jnp.float32))[1](slope.astype(jnp.float32))
        return (change.astype(x.dtype),)

    of.defvjp(forward, backward)
    return of


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lean(lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))),
    "gelu_tanh": lean(jax.nn.gelu),
    "quick_gelu": lean(lambda x: x * jax.nn.sigmoid(1.702 * x)),  # OpenAI's CLIP
    "relu": lean(jax.nn.relu),
    "silu": lean(jax.nn.silu),
}
Activation: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


class Whole(NamedTuple):
    """What all blocks know of their tokens."""

    mask: Bool[Array, "B S"] | Bool[Array, "_ T S"] | None = None
    """Which tokens are real, or which token (row) attends to which; None: all."""
    cosine: Float[Array, "B T half"] | None = None
    """Rotary positions, where a model has them; the same for all heads."""
    sine: Float[Array, "B T half"] | None = None


class Encoded(NamedTuple):
    """What an encoder makes of an input."""

    hidden: Float[Array, "B T D"]
    """The last hidden state: what `last_hidden_state` is in transformers."""
    pooled: Float[Array, "B D"] | None = None
    """One vector an input, where the model has a way to it."""
    mask: Bool[Array, "B T"] | None = None
    """Which tokens of `hidden` are real; None: all."""
    layers: Float[Array, "L B T D"] | tuple[Float[Array, "B T D"], ...] | None = None
    """Every block's output, where it was asked for; of stages with widths of their own theirs."""
    features: Float[Array, "B T F"] | None = None
    """What the blocks' input was made of, where a head reads it (wav2vec 2.0's codebook)."""


NOTHING = Whole()  # known of the tokens: all are real, none has an angle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
    """A stack of like blocks over a whole input."""

    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    activation: Activation = "gelu"
    gated: bool = False
    """Whether a gate multiplies the feed-forward part's hidden values (SwiGLU: with "silu")."""
    norm_eps: float = 1e-6
    post_norm: bool = False
    """Norms stand behind each part's sum (BERT, wav2vec 2.0 base) instead of before each part."""
    biases: Literal["qkvo", "qvo", "qv", "o", ""] = "qkvo"
    """Which of attention's projections carry a bias (Whisper: no keys)."""
    layer_scale: float | None = None
    """Each part's output has a learned scale a channel, which starts here (DINOv2); None: none."""
    causal: bool = False
    """Tokens see only earlier ones: CLIP's text."""
    remat: Remat = "none"
    unroll: int = 1

    def __post_init__(self):
        if min(self.num_layers, self.num_heads, self.mlp_dim, self.unroll) < 1:
            raise ValueError(
                f"num_layers ({self.num_layers}), num_heads ({self.num_heads}), mlp_dim "
                f"({self.mlp_dim}) and unroll ({self.unroll}) must be at least 1."
            )
        if self.embed_dim < 1 or self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim ({self.embed_dim}) must be a multiple of num_heads ({self.num_heads})."
            )
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be above 0.")


class WholeAttention(nn.Module):
    """Multi-head attention of every token to all real ones (or, if causal, the earlier ones)."""

    config: Transformer
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], whole: Whole) -> Float[Array, "B T D"]:
        c = self.config
        n, h = c.num_heads, c.embed_dim // c.num_heads
        axes = ("embed", "heads", "head")

        def projected(name: str) -> Array:
            shape, bias = (c.embed_dim, n, h), name in c.biases
            return Projection("btd,dnh->btnh", shape, axes, self.dtypes, bias, name=name)(x)

        q, k, v = (projected(name) for name in "qkv")
        if whole.cosine is not None:
            q, k = (rotate(y, whole.cosine, whole.sine) for y in (q, k))
        y = full_attention(q, k, v, whole.mask, scale=h**-0.5, causal=c.causal)
        shape, axes = (n, h, c.embed_dim), ("heads", "head", "embed")
        out = Projection("btnh,nhd->btd", shape, axes, self.dtypes, "o" in c.biases, name="o")
        return out(y)


class MLP(nn.Module):
    """down(activation(up(x))), with biases; gated: down(activation(gate(x)) * up(x))."""

    embed_dim: int
    mlp_dim: int
    activation: Activation
    dtypes: Dtypes
    gated: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        d, f, act = self.embed_dim, self.mlp_dim, ACTIVATIONS[self.activation]
        inward = ("btd,df->btf", (d, f), ("embed", "mlp"), self.dtypes, True)
        up = Projection(*inward, name="up")(x)
        hidden = act(Projection(*inward, name="gate")(x)) * up if self.gated else act(up)
        outward = ("btf,fd->btd", (f, d), ("mlp", "embed"), self.dtypes, True)
        return Projection(*outward, name="down")(hidden)


class EncoderBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)); or, with `post_norm`, norms around the sums.

    Scanned by `block.stacked`: the second argument of a call is nothing, the second result x.
    """

    config: Transformer
    dtypes: Dtypes
    keep: bool = False
    """Whether every block's output is wanted."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], none: Any, whole: Whole) -> tuple[Array, Any]:
        del none
        c, kept = self.config, self.dtypes

        def added(x: Array, part: nn.Module, name: str, *given: Any) -> Array:
            norm = LayerNorm(kept, eps=c.norm_eps, name=f"{name}_norm")
            y = part(x if c.post_norm else norm(x), *given)
            if c.layer_scale is not None:
                shape = (c.embed_dim,)
                scale = weight(self, f"{name}_scale", shape, ("embed",), init=c.layer_scale)
                y = y * scale.astype(y.dtype).reshape(1, 1, -1)
            return norm(x + y) if c.post_norm else x + y

        x = added(x, WholeAttention(c, kept, name="attention"), "attention", whole)
        mlp = MLP(c.embed_dim, c.mlp_dim, c.activation, kept, c.gated, name="mlp")
        x = added(x, mlp, "mlp")
        return x, x if self.keep else None


class Stack(nn.Module):
    """All blocks of a transformer: the last one's output, and with `keep` all of theirs [L, ...].

    There is no norm behind the last block: families differ.
    """

    config: Transformer
    dtypes: Dtypes
    keep: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], whole: Whole = NOTHING
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"] | None]:
        c = self.config
        blocks = stacked(c.num_layers, c.remat, c.unroll, EncoderBlock)
        return blocks(c, self.dtypes, self.keep, name="block")(constrain(x), None, whole)


def learned(
    module: nn.Module, name: str, shape: tuple[int, ...], width_axis: str = "embed"
) -> Float[Array, "..."]:
    """A learned vector, or one a position: [..., D], as it is stored."""
    axes = ("position",) * (len(shape) - 1) + (width_axis,)
    return weight(module, name, shape, axes)


def with_token(
    token: Float[Array, " D"] | Float[Array, "M D"], x: Float[Array, "B T D"]
) -> Float[Array, "B M_T D"]:
    """The same learned token or tokens before every row's own."""
    token = jnp.atleast_2d(token).astype(x.dtype)
    first = jnp.broadcast_to(token[None], (x.shape[0], *token.shape))
    return jnp.concatenate([first, x], axis=1)
