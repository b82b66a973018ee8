"""Every model that can be trained, by the type of its config."""

from typing import TypeAlias

from deepseek_jax.core.precision import Precision
from deepseek_jax.models.build import Model, build
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.two_tower import Towers, TwoTower, build_towers

ModelConfig: TypeAlias = Decoder | TwoTower


def build_network(config: ModelConfig, precision: Precision = Precision()) -> Model | Towers:
    """The model of a config: no parameters are made, only their shapes."""
    if isinstance(config, TwoTower):
        return build_towers(config, precision)
    return build(config, precision)
