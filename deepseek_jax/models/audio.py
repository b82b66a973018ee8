"""Encoders of sound: Whisper's, of mel frames (arXiv 2212.04356), and wav2vec 2.0's, of waves.

Waves are Float[Array, "B T"], mel spectra Float[Array, "B T M"]. wav2vec 2.0 is arXiv 2006.11477;
its heads (characters by CTC, the codebook of its pretraining) are used by models/speech.py.
"""

import dataclasses
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.layers.block import Remat
from deepseek_jax.layers.conv import Convolution, PositionalConvolution
from deepseek_jax.layers.encoder import Activation, Encoded, Stack, Transformer, Whole, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Normal, Projection, weight
from deepseek_jax.ops.convolution import num_windows
from deepseek_jax.ops.matmul import dot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whisper:
    """Whisper's encoder."""

    transformer: Transformer
    num_mels: int = 80
    num_positions: int = 1500
    """Frames behind the convolutions; an input has twice as many."""
    init_scale: float = 0.02

    def __post_init__(self):
        if min(self.num_mels, self.num_positions) < 1:
            raise ValueError(
                f"num_mels ({self.num_mels}) and num_positions ({self.num_positions}) must be at "
                "least 1."
            )
        if self.transformer.embed_dim % 2 or self.transformer.embed_dim < 4:
            raise ValueError(
                f"embed_dim ({self.transformer.embed_dim}) must be even and at least 4: positions "
                "are sines and cosines."
            )


class WhisperEncoder(nn.Module):
    """Whisper's encoder as a module: two convolutions, fixed positions, blocks, a norm."""

    config: Whisper
    dtypes: Dtypes

    @nn.compact
    def __call__(self, mel: Float[Array, "B T M"], keep: bool = False) -> Encoded:
        c, t, kept = self.config, self.config.transformer, self.dtypes
        wanted = (2 * c.num_positions, c.num_mels)
        if mel.shape[1:] != wanted:
            raise ValueError(f"mel frames are {mel.shape[1:]}, and this encoder's {wanted}")
        x = mel
        for i, stride in enumerate((1, 2)):
            conv = Convolution(
                t.embed_dim, 3, stride, "gelu", kept, padding=1, name=f"convolution_{i}"
            )
            x = conv(x)
        shape, axes = (c.num_positions, t.embed_dim), ("position", "embed")
        positions = weight(self, "positions", shape, axes, init="sinusoids")
        positions = jax.lax.stop_gradient(positions)  # stored, not learned
        x = x + positions[None].astype(x.dtype)
        x, layers = Stack(t, kept, keep, name="segment_0")(x)
        return Encoded(LayerNorm(kept, eps=t.norm_eps, name="final_norm")(x), layers=layers)


def whisper_example(config: Whisper) -> dict[str, Array]:
    """Inputs of the encoder, of one row: zeros."""
    return {"mel": jnp.zeros((1, 2 * config.num_positions, config.num_mels))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTC:
    """A head that says which character, or none, each frame speaks."""

    vocab_size: int = 32
    blank_id: int = 0
    """The token for none."""

    def __post_init__(self):
        if not 0 <= self.blank_id < self.vocab_size:
            raise ValueError(
                f"blank_id ({self.blank_id}) must lie below vocab_size ({self.vocab_size})."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook:
    """A head that pretrains: what stands behind a masked frame is told from other frames' codes."""

    num_groups: int = 2
    num_codes: int = 320
    """In each group."""
    code_dim: int = 256
    """Of the groups' vectors side by side."""
    shared_dim: int = 256
    """Where codes and hidden states are compared."""

    def __post_init__(self):
        if self.code_dim % self.num_groups:
            raise ValueError(
                f"code_dim ({self.code_dim}) must be a multiple of num_groups ({self.num_groups})."
            )


Head: TypeAlias = CTC | Codebook
CONVOLUTIONS = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec2:
    """wav2vec 2.0: with `transformer.post_norm` its base form, without the large one's."""

    transformer: Transformer
    convolutions: tuple[tuple[int, int, int], ...] = CONVOLUTIONS
    """(width, size, stride) of each: a frame is 400 samples, every 320."""
    conv_norm: Literal["group", "layer"] = "group"
    """Over time in the first convolution alone (a row's padding counts there), or over each frame's
    channels in all."""
    conv_bias: bool = False
    conv_activation: Activation = "gelu"
    position_size: int = 128
    position_groups: int = 16
    mask_vector: bool = True
    """Whether there is a vector that stands for masked frames."""
    head: Head | None = None
    init_scale: float = 0.02

    def __post_init__(self):
        if not self.convolutions or min(min(c) for c in self.convolutions) < 1:
            raise ValueError(f"convolutions {self.convolutions} must have positive numbers.")
        if self.position_size < 1 or self.transformer.embed_dim % self.position_groups:
            raise ValueError(
                f"position_size ({self.position_size}) must be at least 1 and embed_dim "
                f"({self.transformer.embed_dim}) a multiple of position_groups "
                f"({self.position_groups})."
            )
        if isinstance(self.head, Codebook) and not self.mask_vector:
            raise ValueError("head Codebook needs mask_vector: masked frames are what it learns.")

    @property
    def num_layers(self) -> int:
        """Of the transformer."""
        return self.transformer.num_layers

    @property
    def remat(self) -> Remat:
        """The transformer's."""
        return self.transformer.remat

    @property
    def vocab_size(self) -> int:
        """Characters that the head knows; without a CTC head texts do not matter, and any fit."""
        return self.head.vocab_size if isinstance(self.head, CTC) else 1 << 31

    @property
    def least_samples(self) -> int:
        """What one frame is made of."""
        count = 1
        for _, size, stride in reversed(self.convolutions):
            count = (count - 1) * stride + size
        return count

    def num_frames(self, num_samples: int) -> int:
        """Frames of so many samples."""
        for _, size, stride in self.convolutions:
            num_samples = num_windows(num_samples, size, stride)
        return num_samples


def frame_counts(config: Wav2Vec2, counts: Int[Array, " B"]) -> Int[Array, " B"]:
    """The frames that lie in the first `counts` samples of each row."""
    for _, size, stride in config.convolutions:
        counts = jnp.maximum((counts - size) // stride + 1, 0)
    return counts


class WaveEncoder(nn.Module):
    """wav2vec 2.0 as a module; `logits`, `code_logits` and `shared` are of its heads."""

    config: Wav2Vec2
    dtypes: Dtypes

    def setup(self):
        head, width, kept = self.config.head, self.config.transformer.embed_dim, self.dtypes
        if isinstance(head, CTC):
            shape, axes = (width, head.vocab_size), ("embed", "vocab")
            self.ctc = Projection("btd,dv->btv", shape, axes, kept, True)
        elif isinstance(head, Codebook):
            features = self.config.convolutions[-1][0]
            codes, shared = head.num_groups * head.num_codes, head.shared_dim
            axes, wide = ("embed", "mlp"), Normal(1.0)  # codes are apart from the start
            shape = (features, codes)
            self.choice = Projection("btd,dv->btv", shape, axes, kept, True, wide)
            self.hidden_out = Projection("btd,dq->btq", (width, shared), axes, kept, True)
            shape = (head.code_dim, shared)
            self.codes_out = Projection("btd,dq->btq", shape, axes, kept, True)
            shape, axes = (codes, head.code_dim // head.num_groups), ("position", "embed")
            self.codes = weight(self, "codes", shape, axes, init=wide)

    @nn.compact
    def __call__(
        self,
        wave: Float[Array, "B T"],
        counts: Int[Array, " B"] | None = None,
        masked: Bool[Array, "B W"] | None = None,
        keep: bool = False,
    ) -> Encoded:
        """Frames of waves. `counts`: each row's samples that are real, from the left.

        `masked` frames are hidden from the blocks. `Encoded.features` is what the convolutions
        made, normed: it sees through masks.
        """
        c, t, kept = self.config, self.config.transformer, self.dtypes
        if wave.shape[1] < c.least_samples:
            raise ValueError(f"waves have {wave.shape[1]} samples; a frame takes {c.least_samples}")
        x = wave[..., None].astype(kept.compute)
        for i, (width, size, stride) in enumerate(c.convolutions):
            norm = "layer" if c.conv_norm == "layer" else "" if i else "channel"
            shape = (width, size, stride, c.conv_activation, kept)
            x = Convolution(*shape, c.conv_bias, norm, name=f"convolution_{i}")(x)
        features = LayerNorm(kept, eps=t.norm_eps, name="features_norm")(x)
        shape, axes = (x.shape[-1], t.embed_dim), ("patch", "embed")
        x = Projection("btf,fd->btd", shape, axes, kept, True, name="features")(features)
        if c.mask_vector:
            vector = learned(self, "masked", (t.embed_dim,))
            if masked is not None:
                x = jnp.where(masked[..., None], vector.astype(x.dtype).reshape(1, 1, -1), x)
        elif masked is not None:
            raise ValueError("masked frames need mask_vector")
        real = None
        if counts is not None:
            real = jnp.arange(x.shape[1])[None] < frame_counts(c, counts)[:, None]
            x = jnp.where(real[..., None], x, 0)
        positional = (t.embed_dim, c.position_size, c.position_groups, c.conv_activation, kept)
        x = x + PositionalConvolution(*positional, name="positions")(x)
        norm = LayerNorm(kept, eps=t.norm_eps, name="norm")
        x = norm(x) if t.post_norm else x
        x, layers = Stack(t, kept, keep, name="segment_0")(x, Whole(real))
        hidden = x if t.post_norm else norm(x)
        if self.is_initializing():  # the heads' weights are declared where they are used
            if isinstance(c.head, CTC):
                self.logits(hidden)
            elif isinstance(c.head, Codebook):
                self.shared(hidden, self.code_logits(features))
        return Encoded(hidden, mask=real, layers=layers, features=features)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of characters."""
        return self.ctc(hidden).astype(jnp.float32)

    def code_logits(self, features: Float[Array, "B T F"]) -> Float[Array, "B T G V"]:
        """Float32 logits of the codes that a frame's features may become, by group."""
        head = self.config.head
        logits = self.choice(features).astype(jnp.float32)
        return logits.reshape(*features.shape[:2], head.num_groups, head.num_codes)

    def shared(
        self, hidden: Float[Array, "B T D"], chosen: Float[Array, "B T G V"]
    ) -> tuple[Float[Array, "B T Q"], Float[Array, "B T Q"]]:
        """Hidden states and chosen codes (a weight for each) where the two are compared."""
        codes = self.codes.reshape(*chosen.shape[2:], -1).astype(chosen.dtype)
        vectors = dot("btgv,gvc->btgc", chosen, codes)
        vectors = vectors.astype(hidden.dtype).reshape(*hidden.shape[:2], -1)
        return self.hidden_out(hidden), self.codes_out(vectors)


def wave_example(config: Wav2Vec2) -> dict[str, Array]:
    """Inputs of the encoder, of one row: as many zeros as make a frame."""
    return {"wave": jnp.zeros((1, config.least_samples))}
