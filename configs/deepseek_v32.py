"""DeepSeek-V3.2 (arXiv 2512.02556): V3, and an indexer that chooses the 2,048 tokens a query sees.

    python -m deepseek_jax.train --config configs/deepseek_v32.py --data.source.paths 'corpus/*.txt' --init-from FOLDER

671.878 B parameters (11.6 B more in the MTP layer), 38.4 B active a token. FOLDER is its Hugging
Face checkpoint, or V3.1's: the indexers that it lacks are made anew, and learn in the first of the
two stages, as V3.2 was made: attention stays dense and nothing else moves.
"""

from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import TokenizerFile
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Sigmoid
from deepseek_jax.layers.sparse_attention import Indexer
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Yarn
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.language import Language
from deepseek_jax.training.optimizer import AdamW, Constant
from deepseek_jax.training.recipe import Stage, TrainConfig


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
                indexer=Indexer(num_heads=64, head_dim=128, top_k=2048),
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
        optimizer=AdamW(learning_rate=7.3e-6, schedule=Constant()),
        mesh=MeshShape(fsdp=32, expert=32),
        stages=(
            Stage(
                name="warm-up",
                steps=1000,
                batch_size=1024,
                optimizer=AdamW(learning_rate=1e-3, schedule=Constant()),
                objective=Language(indexer_warmup=True),
            ),
            Stage(name="sparse"),
        ),
        steps=15_000,
        batch_size=4096,
        sequence_length=4096,
    )
