"""A DeepSeek-V3-shaped language model learns Python from the standard library on this machine.

    python -m deepseek_jax.train --config configs/quickstart.py

MLA, shared and routed experts, sigmoid router balanced by a bias, one MTP layer, 12 M parameters.
"""

from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import StandardLibrary
from deepseek_jax.data.tokenizer import BPE
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Sigmoid
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.schedule import WSD


def get_config() -> TrainConfig:
    vocab_size = 4096
    return TrainConfig(
        model=Decoder(
            vocab_size=vocab_size,
            embed_dim=256,
            num_layers=5,
            attention=MLA(num_heads=4, kv_rank=128, nope_dim=48, rope_dim=16, value_dim=64),
            mlp_dim=768,
            moe=MoE(
                num_experts=16,
                expert_dim=128,
                router=Sigmoid(num_active_experts=4),
                num_shared_experts=1,
            ),
            num_dense_layers=1,
            num_mtp_layers=1,
            init_scale=0.03,
        ),
        data=Data(source=StandardLibrary(), tokenizer=BPE(vocab_size=vocab_size)),
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=50, schedule=WSD(decay_fraction=0.3)),
        steps=700,
        batch_size=16,
        sequence_length=256,
        eval_every=200,
        save_every=200,
    )
