"""DeepSeek-R1-Distill-Qwen-1.5B (arXiv 2501.12948): R1's answers taught to Qwen2.5-Math-1.5B.

    python -m deepseek_jax.train --config configs/deepseek_r1_distill_qwen_1_5b.py --data.source.paths 'corpus/*.txt' --init-from FOLDER

1,777,088,000 parameters, all active. FOLDER is its Hugging Face checkpoint. Unlike the Qwen2.5 it
comes from, it has a head of its own.
"""

from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import TokenizerFile
from deepseek_jax.layers.attention import GQA
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=Decoder(
            vocab_size=151936,
            embed_dim=1536,
            num_layers=28,
            attention=GQA(num_heads=12, num_kv_heads=2, head_dim=128, bias=True),
            mlp_dim=8960,
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
