"""Every model that predicts or compares, by the type of its config."""

from typing import TypeAlias

from deepseek_jax.core.precision import Precision
from deepseek_jax.models.audio import Wav2Vec2
from deepseek_jax.models.build import Model, build
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.encoder import Encoder, build_encoder
from deepseek_jax.models.fusion import Fused, FusedNetwork, build_fused
from deepseek_jax.models.two_tower import Towers, TwoTower, build_towers
from deepseek_jax.models.vision_language import (
    VisionLanguage,
    VisionLanguageModel,
    build_vision_language,
)

ModelConfig: TypeAlias = Decoder | TwoTower | VisionLanguage | Fused | Wav2Vec2
"""What a run of train can be of."""


def build_network(
    config: ModelConfig, precision: Precision = Precision()
) -> Model | Towers | VisionLanguageModel | FusedNetwork | Encoder:
    """The model of a config: no parameters are made, only their shapes."""
    if isinstance(config, VisionLanguage):
        return build_vision_language(config, precision)
    if isinstance(config, TwoTower):
        return build_towers(config, precision)
    if isinstance(config, Fused):
        return build_fused(config, precision)
    if isinstance(config, Wav2Vec2):
        return build_encoder(config, precision)
    return build(config, precision)
