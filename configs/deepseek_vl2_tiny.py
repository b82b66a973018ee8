"""DeepSeek-VL2-tiny (arXiv 2412.10302): VL2's encoder and tiles, a small mixture of experts.

    python -m deepseek_jax.train --config configs/deepseek_vl2_tiny.py --init-parts.0.source SIGLIP --init-parts.1.source DECODER

The stages and data of configs/deepseek_vl2_small.py with Table 2's rates and tokens of tiny.
3.37 B parameters, 1.0 B active a token, the encoder's 0.4 B among them.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Balance, Softmax
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.training.recipe import TrainConfig

BILLION = 1_000_000_000


def get_config() -> TrainConfig:
    small = load_config(pathlib.Path(__file__).with_name("deepseek_vl2_small.py"), TrainConfig)
    language = Decoder(
        vocab_size=129280,
        embed_dim=1280,
        num_layers=12,
        attention=GQA(num_heads=10, num_kv_heads=10, head_dim=128),
        mlp_dim=6848,
        moe=MoE(
            num_experts=64,
            expert_dim=896,
            num_shared_experts=2,
            router=Softmax(num_active_experts=6),
            balance=Balance(sequence_weight=0.001),
        ),
        num_dense_layers=1,
        remat="full",
    )
    tokens, rates = (2, 798.5, 19.5), (5.4e-4, 5.4e-4, 3e-5)
    stages = tuple(
        dataclasses.replace(
            stage,
            tokens=int(count * BILLION),
            optimizer=dataclasses.replace(stage.optimizer, learning_rate=rate),
        )
        for stage, count, rate in zip(small.stages, tokens, rates, strict=True)
    )
    model = dataclasses.replace(small.model, language=language)
    return dataclasses.replace(small, model=model, stages=stages)
