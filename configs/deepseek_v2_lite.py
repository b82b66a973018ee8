"""DeepSeek-V2-Lite (arXiv 2405.04434): latent attention without query compression.

    python -m deepseek_jax.train --config configs/deepseek_v2_lite.py --data.source.paths 'corpus/*.txt' --init-from FOLDER

15.706 B parameters, 2.66 B active a token. FOLDER is its Hugging Face checkpoint.
"""

from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import TokenizerFile
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Softmax
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Yarn
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=Decoder(
            vocab_size=102400,
            embed_dim=2048,
            num_layers=27,
            attention=MLA(
                num_heads=16,
                kv_rank=512,
                nope_dim=128,
                rope_dim=64,
                value_dim=128,
                yarn=Yarn(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
            ),
            mlp_dim=10944,
            moe=MoE(
                num_experts=64,
                expert_dim=1408,
                num_shared_experts=2,
                router=Softmax(num_active_experts=6),
            ),
            num_dense_layers=1,
            remat="dots",
        ),
        data=Data(
            source=TextFiles(paths=("corpus/*.txt",)), tokenizer=TokenizerFile(path="FOLDER")
        ),
        optimizer=AdamW(learning_rate=1e-5, warmup_steps=100),
        mesh=MeshShape(fsdp=8),
        steps=10_000,
        batch_size=512,
        sequence_length=4096,
    )
