"""A DeepSeek-V3-shaped language model learns Python from the standard library on this machine.

    python -m deepseek_jax.train --config configs/quickstart.py

Latent attention, 32 experts top-4 beside a shared one, a sigmoid router balanced by its bias, one
MTP layer: 9.9 M parameters. Ten minutes on two CPU cores end well below gzip -9 on held-out files.
"""

from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import StandardLibrary
from deepseek_jax.data.tokenizer import BPE
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Balance, Sigmoid
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.training.language import Language
from deepseek_jax.training.optimizer import WSD, Muon
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    vocab_size = 4096
    return TrainConfig(
        model=Decoder(
            vocab_size=vocab_size,
            embed_dim=192,
            num_layers=4,
            attention=MLA(num_heads=4, kv_rank=96, nope_dim=32, rope_dim=16, value_dim=48),
            mlp_dim=512,
            moe=MoE(
                num_experts=32,
                expert_dim=96,
                router=Sigmoid(num_active_experts=4),
                num_shared_experts=1,
                balance=Balance(bias_rate=0.005),
            ),
            num_dense_layers=1,
            num_mtp_layers=1,
            init_scale=0.04,
            unroll=4,
        ),
        data=Data(source=StandardLibrary(), tokenizer=BPE(vocab_size=vocab_size)),
        optimizer=Muon(learning_rate=8e-3, warmup_steps=10, schedule=WSD(decay_fraction=0.6)),
        objective=Language(mtp_weight=0.2, chunk=512),
        steps=300,
        batch_size=16,
        sequence_length=256,
        log_every=2,
        eval_every=100,
        save_every=100,
    )
