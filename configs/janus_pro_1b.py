"""Janus-Pro-1B's understanding (arXiv 2501.17811): SigLIP-L, an MLP, a Llama of 24 layers.

    python -m deepseek_jax.train --config configs/janus_pro_1b.py --init-parts.0.source SIGLIP --init-parts.1.source DECODER

The stages are the paper's Table 2 for 1B: adaptor, all but the encoder, all; the second stopped
after 270,000 of 360,000 steps at a constant rate (section 3.1). Left out: the images that Janus
draws, 3 of 4, 5 of 10 and 4 of 10 parts of its batches, with their adaptor and head; so understanding
and text are mixed 1 : 0, 2 : 3 and 5 : 1 in batches as large as the published ones; several
conversations in a row. SIGLIP is the folder of google/siglip-large-patch16-384, DECODER
DeepSeek-LLM-1.3B's. The MLP's width of 5632 is the released model's, not in the paper.
"""

from deepseek_jax.data.conversations import Dialog
from deepseek_jax.data.media import MediaShards
from deepseek_jax.data.seeing import Seeing, SeeingPart
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import TokenizerFile
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.vision_language import MLPProjector, VisionLanguage
from deepseek_jax.models.vit import ViT
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.optimizer import AdamW, Constant
from deepseek_jax.training.recipe import InitPart, Stage, TrainConfig


def get_config() -> TrainConfig:
    large = Transformer(num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=4096, remat="full")
    model = VisionLanguage(
        language=Decoder(
            vocab_size=102400,
            embed_dim=2048,
            num_layers=24,
            attention=GQA(num_heads=16, num_kv_heads=16, head_dim=128),
            mlp_dim=5632,
            remat="full",
        ),
        vision=ViT(
            transformer=large,
            image_size=(384, 384),
            patch_size=16,
            class_token=False,
            pooling="none",
        ),
        projector=MLPProjector(),
    )
    talks = MediaShards(paths=("conversations/*.tar",))
    text = TextFiles(paths=("corpus/*.txt",))

    def mixed(seeing: float, reading: float) -> Seeing:
        return Seeing(
            parts=(
                SeeingPart(source=talks, weight=seeing),
                SeeingPart(source=text, weight=reading),
            ),
            tokenizer=TokenizerFile(path="FOLDER"),
            dialog=Dialog(user="<|User|>:", assistant="<|Assistant|>:"),
            held_out=0.001,
            eval_rows=512,
        )

    def adamw(rate: float, warmup: int) -> AdamW:
        return AdamW(
            learning_rate=rate,
            warmup_steps=warmup,
            schedule=Constant(),
            weight_decay=0.0,
            b2=0.95,
        )

    data = mixed(1.0, 0.0)
    return TrainConfig(
        model=model,
        data=data,
        optimizer=adamw(1e-3, 600),
        mesh=MeshShape(fsdp=-1, data=1),
        steps=20_000,
        batch_size=256,
        sequence_length=4096,
        init_parts=(
            InitPart(part="vision", source="SIGLIP"),
            InitPart(part="language", source="DECODER"),
        ),
        stages=(
            Stage(name="adaptor", trainable=("projector/*",)),
            Stage(
                name="pretraining",
                trainable=("language/*", "projector/*"),
                steps=270_000,
                batch_size=512,
                optimizer=adamw(1e-4, 5000),
                data=mixed(2.0, 3.0),
            ),
            Stage(
                name="instruction",
                steps=80_000,
                batch_size=128,
                optimizer=adamw(4e-5, 0),
                data=mixed(5.0, 1.0),
            ),
        ),
    )
