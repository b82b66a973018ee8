"""DeepSeek-V3, R1 and V3.1 (arXiv 2412.19437): 256 experts, sigmoid router, one MTP layer.

    python -m deepseek_jax.train --config configs/deepseek_v3.py --data.source.paths 'corpus/*.txt' --init-from FOLDER

671.026 B parameters (11.6 B more in the MTP layer), 37.6 B active a token. FOLDER is its Hugging
Face checkpoint, in float8 as published or in bfloat16.
"""

from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import TokenizerFile
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Sigmoid
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Yarn
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=Decoder(
            vocab_size=129280,
            embed_dim=7168,
            num_layers=61,
            attention=MLA(
                num_heads=128,
                q_rank=1536,
                kv_rank=512,
                nope_dim=128,
                rope_dim=64,
                value_dim=128,
                yarn=Yarn(factor=40.0, original_length=4096),
            ),
            mlp_dim=18432,
            moe=MoE(
                num_experts=256,
                expert_dim=2048,
                num_shared_experts=1,
                router=Sigmoid(num_active_experts=8, num_groups=8, num_active_groups=4, scale=2.5),
            ),
            num_dense_layers=3,
            num_mtp_layers=1,
            remat="dots",
        ),
        data=Data(
            source=TextFiles(paths=("corpus/*.txt",)), tokenizer=TokenizerFile(path="FOLDER")
        ),
        optimizer=AdamW(learning_rate=1e-5, warmup_steps=100),
        mesh=MeshShape(fsdp=32, expert=32),
        steps=10_000,
        batch_size=4096,
        sequence_length=4096,
    )
