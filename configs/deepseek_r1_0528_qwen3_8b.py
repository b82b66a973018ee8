"""DeepSeek-R1-0528-Qwen3-8B: the answers of R1's second release taught to Qwen3 8B.

    python -m deepseek_jax.train --config configs/deepseek_r1_0528_qwen3_8b.py --data.source.paths 'corpus/*.txt' --init-from FOLDER

8,190,735,360 parameters, all active. FOLDER is its Hugging Face checkpoint. Its config.json has an
`attn_factor` for YaRN that transformers does not read; this computes what transformers does.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.layers.attention import GQA
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Yarn
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    recipe = load_config(
        pathlib.Path(__file__).with_name("deepseek_r1_distill_qwen_1_5b.py"), TrainConfig
    )
    model = Decoder(
        vocab_size=151936,
        embed_dim=4096,
        num_layers=36,
        attention=GQA(
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            norm_eps=1e-6,
            rope_theta=1e6,
            yarn=Yarn(factor=4.0, original_length=32768, mscale_all_dim=0.0),
        ),
        mlp_dim=12288,
        remat="dots",
    )
    return dataclasses.replace(recipe, model=model)
