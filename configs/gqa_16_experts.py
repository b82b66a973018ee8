"""A 16-expert model: top-4 routing, grouped-query attention in a sliding window of 2048 tokens.

    python -m deepseek_jax.train --config configs/gqa_16_experts.py --data.source.paths 'corpus/*.txt'

9.5 B parameters, 3.1 B active a token, 8k rows, a batch that grows from 4,096 to 32,768 sequences
with 8 to 16 microbatches a step: for a pod, not a laptop. `--dry-run` shows what it takes.
"""

from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import DeepSeek
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Balance, Softmax
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import BatchStep, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=Decoder(
            vocab_size=129280,
            embed_dim=2048,
            num_layers=24,
            attention=GQA(num_heads=16, num_kv_heads=4, head_dim=128, window=2048),
            mlp_dim=8192,
            moe=MoE(
                num_experts=16,
                expert_dim=3584,
                router=Softmax(num_active_experts=4, normalize=True),
                balance=Balance(sequence_weight=0.001, uniform_weight=0.01, z_weight=0.001),
            ),
            num_dense_layers=1,
            remat="dots",
        ),
        data=Data(source=TextFiles(paths=("corpus/*.txt",)), tokenizer=DeepSeek()),
        optimizer=AdamW(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshShape(fsdp=8, expert=4),
        steps=100_000,
        batch_size=4096,
        accumulation_steps=8,
        sequence_length=8192,
        stages=(
            Stage(
                batch_ramp=(
                    BatchStep(step=2_000, batch_size=8192, accumulation_steps=8),
                    BatchStep(step=10_000, batch_size=16384, accumulation_steps=16),
                    BatchStep(step=30_000, batch_size=32768, accumulation_steps=16),
                )
            ),
        ),
    )
