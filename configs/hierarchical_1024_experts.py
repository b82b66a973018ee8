"""A 1,024-expert model with two-level routing: 2 of 32 groups, one of 32 experts in each.

    python -m deepseek_jax.train --config configs/hierarchical_1024_experts.py --data.source.paths 'corpus/*.txt'

Multi-head latent attention; KL-to-uniform and z losses keep both levels of the router balanced.
"""

from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import DeepSeek
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Balance, Hierarchical
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=Decoder(
            vocab_size=129280,
            embed_dim=1024,
            num_layers=12,
            attention=MLA(num_heads=8, kv_rank=256, nope_dim=64, rope_dim=32, value_dim=64),
            mlp_dim=4096,
            moe=MoE(
                num_experts=1024,
                expert_dim=512,
                num_shared_experts=1,
                router=Hierarchical(num_active_experts=2, num_groups=32, num_active_groups=2),
                balance=Balance(sequence_weight=0.001, uniform_weight=0.01, z_weight=0.001),
            ),
            num_dense_layers=1,
            remat="dots",
        ),
        data=Data(source=TextFiles(paths=("corpus/*.txt",)), tokenizer=DeepSeek()),
        optimizer=AdamW(learning_rate=4e-4, warmup_steps=2000),
        mesh=MeshShape(expert=8),
        steps=100_000,
        batch_size=1024,
        sequence_length=4096,
    )
