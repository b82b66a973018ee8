"""DeepSeek-R1-Distill-Llama-70B (arXiv 2501.12948): R1's answers taught to Llama 3.3 70B.

    python -m deepseek_jax.train --config configs/deepseek_r1_distill_llama_70b.py --data.source.paths 'corpus/*.txt' --init-from FOLDER

70,553,706,496 parameters, all active. FOLDER is its Hugging Face checkpoint.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.layers.attention import GQA
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Llama3
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    recipe = load_config(
        pathlib.Path(__file__).with_name("deepseek_r1_distill_qwen_1_5b.py"), TrainConfig
    )
    model = Decoder(
        vocab_size=128256,
        embed_dim=8192,
        num_layers=80,
        attention=GQA(
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=500000.0,
            yarn=Llama3(factor=8.0, original_length=8192),
        ),
        mlp_dim=28672,
        norm_eps=1e-5,
        remat="dots",
    )
    return dataclasses.replace(recipe, model=model, mesh=MeshShape(fsdp=64))
