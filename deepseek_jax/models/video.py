"""Video transformers: tubelets of a clip as tokens (ViViT, arXiv 2103.15691; VideoMAE, 2203.12602).

Clips are Float[Array, "B T H W C"]. Attention is joint, over all tubelets of a clip at once, or
factorized (ViViT's model 2): over those of a frame, then over what each frame came to. A "frame"
is what one layer of tubelets covers. Left out: VideoMAE's decoder, dropout.
"""

import dataclasses
from typing import Literal, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.layers.encoder import Encoded, Stack, Transformer, learned, with_token
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """Every token attends to all of the clip's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factorized:
    """Tokens attend within their frame; then one vector a frame, its class token or mean."""

    num_layers: int
    """Blocks over frames; `transformer.num_layers` are those within frames."""

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"attention.num_layers is {self.num_layers}; it must be at least 1.")


Over: TypeAlias = Joint | Factorized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """A video transformer."""

    transformer: Transformer
    attention: Over = Joint()
    num_frames: int = 16
    image_size: tuple[int, int] = (224, 224)
    tubelet: tuple[int, int, int] = (2, 16, 16)
    """Frames, height and width of what becomes one token."""
    num_channels: int = 3
    class_token: bool = False
    """A learned token before the others; factorized: one in each frame, and one before frames."""
    positions: Literal["learned", "sines"] = "learned"
    final_norm: bool = True
    pooling: Literal["none", "class", "mean", "tanh"] = "none"
    """How one vector comes out: the class token's own, all tokens' mean, or tanh of a projection
    of the class token's."""
    init_scale: float = 0.02

    def __post_init__(self):
        size = (self.num_frames, *self.image_size)
        if min(self.tubelet) < 1 or any(n % t for n, t in zip(size, self.tubelet, strict=True)):
            raise ValueError(
                f"num_frames and image_size {size} must be multiples of tubelet {self.tubelet}."
            )
        if self.pooling in ("class", "tanh") and not self.class_token:
            raise ValueError(f"pooling {self.pooling!r} needs class_token.")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tubelets along frames, height and width."""
        frames, height, width = self.tubelet
        rows, columns = self.image_size
        return self.num_frames // frames, rows // height, columns // width


def tubelets(clips: Float[Array, "B T H W C"], size: tuple[int, int, int]) -> Float[Array, "B N X"]:
    """Boxes of pixels in the order frames, rows, columns, each flat in that order too."""
    batch, frames, height, width, channels = clips.shape
    t, p, q = size
    cut = clips.reshape(batch, frames // t, t, height // p, p, width // q, q, channels)
    return cut.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, t * p * q * channels)


def sines(count: int, width: int) -> Float[np.ndarray, "N D"]:
    """Fixed positions: sines and cosines in turn, of the angles n / 10000^(2 (d // 2) / D)."""
    channel = np.arange(width)
    angles = np.arange(count)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return np.where(channel % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


class VideoTransformer(nn.Module):
    """A `Video` as a module; hidden: of tokens in their order, or factorized of frames.

    With `keep`, layers are those blocks' that the hidden states come from.
    """

    config: Video
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        clips: Float[Array, "B T H W C"],
        visible: Int[Array, "B K"] | None = None,
        keep: bool = False,
    ) -> Encoded:
        """`visible`: the tubelets that are encoded, K in each clip; None: all."""
        c, t, kept = self.config, self.config.transformer, self.dtypes
        if clips.shape[1:] != (wanted := (c.num_frames, *c.image_size, c.num_channels)):
            raise ValueError(f"clips are {clips.shape[1:]}, and this encoder's {wanted}")
        factorized = isinstance(c.attention, Factorized)
        if factorized and visible is not None:
            raise ValueError("factorized attention needs whole frames, so `visible` must be None")
        shape, axes = (*c.tubelet, c.num_channels, t.embed_dim), ("patch",) * 4 + ("embed",)
        embed = Projection("btfijc,fijcd->btd", shape, axes, kept, True, name="patch")
        x = embed(tubelets(clips, c.tubelet))
        if factorized:
            frames, batch = c.grid[0], x.shape[0]
            x = self._placed(x.reshape(batch * frames, -1, t.embed_dim), "")
            x, _ = Stack(t, kept, name="segment_0")(x)
            x = LayerNorm(kept, eps=t.norm_eps, name="frame_norm")(x)
            x = x[:, 0] if c.class_token else x.mean(1)
            x = self._placed(x.reshape(batch, frames, t.embed_dim), "frame_")
            t = dataclasses.replace(t, num_layers=c.attention.num_layers)
            x, layers = Stack(t, kept, keep, name="segment_1")(x)
        else:
            x = self._placed(x, "", visible)
            x, layers = Stack(t, kept, keep, name="segment_0")(x)
        if c.final_norm:
            x = LayerNorm(kept, eps=t.norm_eps, name="final_norm")(x)
        return Encoded(x, self._pooled(x), layers=layers)

    def _placed(
        self, x: Float[Array, "B N D"], name: str, visible: Int[Array, "B K"] | None = None
    ) -> Float[Array, "B M D"]:
        """Tokens with their positions, of them those that are visible, after a class token."""
        c, (_, count, width) = self.config, x.shape
        first = int(c.class_token)
        if c.positions == "learned":
            table = learned(self, f"{name}positions", (first + count, width))
        else:  # a class token then has none
            table = jnp.pad(jnp.asarray(sines(count, width)), ((first, 0), (0, 0)))
        x = x + table[first:][None].astype(x.dtype)
        if visible is not None:
            x = jnp.take_along_axis(x, visible[:, :, None], axis=1)
        if not c.class_token:
            return x
        return with_token(learned(self, f"{name}class_token", (width,)) + table[0], x)

    def _pooled(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B D"] | None:
        pooling, width = self.config.pooling, hidden.shape[-1]
        if pooling == "none":
            return None
        if pooling == "mean":
            return hidden.mean(1)
        if pooling == "class":
            return hidden[:, 0]
        shape, axes = (width, width), ("embed", "embed")
        pooler = Projection("btd,de->bte", shape, axes, self.dtypes, True, name="pooler")
        return jnp.tanh(pooler(hidden[:, :1])[:, 0])


def example(config: Video) -> dict[str, Array]:
    """Inputs of the encoder, of one row: zeros."""
    shape = (1, config.num_frames, *config.image_size, config.num_channels)
    return {"clips": jnp.zeros(shape)}
