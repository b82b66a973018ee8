"""Encoders as functions: one table of the kinds, each a config, a module and inputs of one row."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
from jaxtyping import Array

from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Encoded
from deepseek_jax.models import (
    any_modality,
    audio,
    naflex,
    sam,
    stream,
    swin,
    text_tower,
    video,
    vit,
)
from deepseek_jax.models.build import Network, declarations, dtypes_of


class Kind(NamedTuple):
    """What belongs to one kind of config."""

    module: type[nn.Module]
    example: Callable[[Any], dict[str, Array]]
    """config -> the module's inputs by name, of one row, zeros: shapes for declaring weights."""


KINDS: dict[type, Kind] = {
    vit.ViT: Kind(vit.VisionTransformer, vit.example),
    naflex.NaFlex: Kind(naflex.NaFlexTransformer, naflex.example),
    text_tower.TextTower: Kind(text_tower.TextTransformer, text_tower.example),
    audio.Whisper: Kind(audio.WhisperEncoder, audio.whisper_example),
    audio.Wav2Vec2: Kind(audio.WaveEncoder, audio.wave_example),
    stream.Stream: Kind(stream.StreamEncoder, stream.stream_example),
    sam.SAM: Kind(sam.SAMTransformer, sam.example),
    swin.Swin: Kind(swin.SwinTransformer, swin.example),
    video.Video: Kind(video.VideoTransformer, video.example),
    any_modality.AnyModality: Kind(any_modality.AnyTransformer, any_modality.example),
}
EncoderConfig: TypeAlias = (
    vit.ViT
    | naflex.NaFlex
    | text_tower.TextTower
    | audio.Whisper
    | audio.Wav2Vec2
    | stream.Stream
    | sam.SAM
    | swin.Swin
    | video.Video
    | any_modality.AnyModality
)


@dataclasses.dataclass(frozen=True)
class Encoder(Network):
    """An encoder's functions."""

    def apply(self, params: Any, *, keep: bool = False, **inputs: Any) -> Encoded:
        """What the module makes of its inputs; with `keep` every block's output too."""
        return self.module.apply({"params": params}, **inputs, keep=keep)


def build_encoder(config: EncoderConfig, precision: Precision = Precision()) -> Encoder:
    """The encoder of a config: no parameters are made, only their shapes."""
    dtypes, kind = dtypes_of(precision), KINDS[type(config)]
    module = kind.module(config, dtypes)
    return Encoder(config, dtypes, declarations(module, **kind.example(config)), module)
