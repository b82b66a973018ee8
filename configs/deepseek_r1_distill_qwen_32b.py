"""DeepSeek-R1-Distill-Qwen-32B (arXiv 2501.12948): R1's answers taught to Qwen2.5-32B.

    python -m deepseek_jax.train --config configs/deepseek_r1_distill_qwen_32b.py --data.source.paths 'corpus/*.txt' --init-from FOLDER

32,763,876,352 parameters, all active. FOLDER is its Hugging Face checkpoint.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.layers.attention import GQA
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    recipe = load_config(
        pathlib.Path(__file__).with_name("deepseek_r1_distill_qwen_1_5b.py"), TrainConfig
    )
    model = Decoder(
        vocab_size=152064,
        embed_dim=5120,
        num_layers=64,
        attention=GQA(num_heads=40, num_kv_heads=8, head_dim=128, bias=True, rope_theta=1e6),
        mlp_dim=27648,
        norm_eps=1e-5,
        remat="dots",
    )
    return dataclasses.replace(recipe, model=model, mesh=MeshShape(fsdp=32))
