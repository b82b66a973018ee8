"""DeepSeek-VL2 (arXiv 2412.10302), the largest: V3's router on V2's attention, 72 experts.

    python -m deepseek_jax.train --config configs/deepseek_vl2_base.py --init-parts.0.source SIGLIP --init-parts.1.source DECODER

The stages and data of configs/deepseek_vl2_small.py with Table 2's rates, tokens and batches:
moments in bfloat16, the router's bias moved in the second stage alone. 27.5 B parameters, 4.5 B
active a token.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Balance, Sigmoid
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.training.recipe import TrainConfig

BILLION = 1_000_000_000


def get_config() -> TrainConfig:
    small = load_config(pathlib.Path(__file__).with_name("deepseek_vl2_small.py"), TrainConfig)
    language = Decoder(
        vocab_size=129280,
        embed_dim=2560,
        num_layers=30,
        attention=MLA(num_heads=32, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        mlp_dim=12288,
        moe=MoE(
            num_experts=72,
            expert_dim=1536,
            num_shared_experts=2,
            router=Sigmoid(num_active_experts=6, scale=2.0),
            balance=Balance(bias_rate=0.001, sequence_weight=0.0001),
        ),
        num_dense_layers=1,
        remat="full",
    )
    changes = (
        {"tokens": 2 * BILLION},
        {"tokens": 796_500_000_000, "batch_size": 3360, "accumulation_steps": 15},
        {"tokens": 19_500_000_000, "trainable": ("!*/router/bias",)},
    )
    narrow = {"momentum_dtype": "bfloat16", "variance_dtype": "bfloat16"}
    stages = tuple(
        dataclasses.replace(
            stage,
            **change,
            optimizer=dataclasses.replace(stage.optimizer, learning_rate=rate, **narrow),
        )
        for stage, change, rate in zip(small.stages, changes, (4.5e-4, 4.5e-4, 2e-5), strict=True)
    )
    model = dataclasses.replace(small.model, language=language)
    return dataclasses.replace(small, model=model, stages=stages, optimizer=stages[0].optimizer)
