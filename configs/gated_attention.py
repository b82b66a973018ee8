"""The quickstart's model, but each query attends to three tenths of what it sees, by a learned gate.

    python -m deepseek_jax.train --config configs/gated_attention.py

Beside the same model with full attention: benchmarks/sparse_attention.py.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.layers.sparse_attention import GatedGQA
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    quickstart = load_config(pathlib.Path(__file__).with_name("quickstart.py"), TrainConfig)
    attention = GatedGQA(num_heads=4, num_kv_heads=4, head_dim=48, ratio=0.3)
    model = dataclasses.replace(quickstart.model, attention=attention)
    return dataclasses.replace(quickstart, model=model)
