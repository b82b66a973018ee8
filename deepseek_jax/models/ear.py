"""Sounds as tokens of a decoder: waves, Whisper's encoder (arXiv 2212.04356), a projector."""

import dataclasses

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from deepseek_jax.data.audio import Windows
from deepseek_jax.layers.linear import Dtypes
from deepseek_jax.models.audio import Whisper, WhisperEncoder
from deepseek_jax.models.projectors import Aligner, MLPProjector, Resampler
from deepseek_jax.ops.signal import log_mel, mel_filters

RATE, SPECTRUM, HOP = 16_000, 400, 160  # Whisper's: samples a second, of a spectrum, between two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ear:
    """What hears: Whisper's encoder, of waves, and its projector.

    A sound is cut into windows as long as the encoder's (Whisper: 30 s), the last one filled up
    with silence; its tokens are those of the frames that it reaches, or, of a Resampler, all.
    """

    encoder: Whisper
    projector: MLPProjector | Resampler = MLPProjector()
    join: int = 1
    """Neighboring frames that the projector takes as one, side by side."""
    audio_id: int | None = None
    """The token that stands, as often as needed, for a sound; None: the tokenizer knows it."""

    def __post_init__(self):
        if self.join < 1 or self.encoder.num_positions % self.join:
            raise ValueError(
                f"audio.join is {self.join}; it must divide the encoder's "
                f"{self.encoder.num_positions} frames."
            )

    @property
    def window(self) -> int:
        """Samples of a window."""
        return 2 * self.encoder.num_positions * HOP

    @property
    def window_tokens(self) -> int:
        """Tokens of a window."""
        if isinstance(self.projector, Resampler):
            return self.projector.num_tokens
        return self.encoder.num_positions // self.join

    @property
    def windows(self) -> Windows:
        """How sounds are taken in."""
        whole = isinstance(self.projector, Resampler)
        stride = None if whole else 2 * HOP * self.join
        return Windows(RATE, self.window, self.window_tokens, stride)

    def layout(self, num_samples: int) -> np.ndarray:
        """`sources` of a sound's tokens, counted from its first window's first."""
        return self.windows.layout(num_samples)


class Hearing(nn.Module):
    """An ear as a module: windows of waves at `RATE` as tokens of the decoder."""

    config: Ear
    embed_dim: int
    """The decoder's."""
    dtypes: Dtypes

    @nn.compact
    def __call__(self, sounds: Float[Array, "B A S"]) -> Float[Array, "B A U D"]:
        c = self.config
        if sounds.shape[2] != c.window:
            raise ValueError(f"sounds have {sounds.shape[2]} samples, and a window {c.window}")
        filters = mel_filters(c.encoder.num_mels, SPECTRUM, RATE)
        mel = log_mel(sounds.reshape(-1, c.window), filters, HOP)
        heard = WhisperEncoder(c.encoder, self.dtypes, name="encoder")(mel).hidden
        heard = heard.reshape(len(heard), -1, c.join * heard.shape[-1])
        projector = Aligner(c.projector, None, self.embed_dim, self.dtypes, name="projector")
        found = projector(heard)
        return found.reshape(*sounds.shape[:2], *found.shape[1:])
