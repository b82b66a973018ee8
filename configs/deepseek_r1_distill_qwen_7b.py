"""DeepSeek-R1-Distill-Qwen-7B (arXiv 2501.12948): R1's answers taught to Qwen2.5-Math-7B.

    python -m deepseek_jax.train --config configs/deepseek_r1_distill_qwen_7b.py --data.source.paths 'corpus/*.txt' --init-from FOLDER

7,615,616,512 parameters, all active. FOLDER is its Hugging Face checkpoint.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.layers.attention import GQA
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    recipe = load_config(
        pathlib.Path(__file__).with_name("deepseek_r1_distill_qwen_1_5b.py"), TrainConfig
    )
    model = Decoder(
        vocab_size=152064,
        embed_dim=3584,
        num_layers=28,
        attention=GQA(num_heads=28, num_kv_heads=4, head_dim=128, bias=True),
        mlp_dim=18944,
        remat="dots",
    )
    return dataclasses.replace(recipe, model=model)
