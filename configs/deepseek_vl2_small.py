"""DeepSeek-VL2-small (arXiv 2412.10302): SigLIP-SO400M, tiles, a decoder of V2-Lite's shape.

    python -m deepseek_jax.train --config configs/deepseek_vl2_small.py --init-parts.0.source SIGLIP --init-parts.1.source DECODER

Shape and stages are the paper's Tables 1 and 2: encoder and projector to a frozen decoder, then
everything, then answers to instructions; the encoder always at a tenth of the rate. Sections 3.2
and 4.1: 70 % with pictures and 30 % text; dialogues without pictures belong into conversations/,
the paper does not say how many. Ours, as it names none: the warm-up. Left out: several
conversations in a row; the auxiliary loss is V3's, by sequence.

SIGLIP is the folder of google/siglip-so400m-patch14-384, DECODER one of V2-Lite's shape as it was
before its context grew (without YaRN: the rows have 4096 tokens); to fine-tune the released model,
name its folder by `--init-from` instead. Captions, conversations and text come from captions/,
conversations/ and corpus/. 16.1 B parameters, 2.8 B active a token.
"""

import dataclasses

from deepseek_jax.data.conversations import Dialog
from deepseek_jax.data.media import MediaShards
from deepseek_jax.data.seeing import Seeing, SeeingPart
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import TokenizerFile
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Balance, Softmax
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.vision_language import DownsampleProjector, VisionLanguage
from deepseek_jax.models.vit import ViT
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.optimizer import AdamW, Constant, Cosine, Slower, Stairs
from deepseek_jax.training.recipe import InitPart, Stage, TrainConfig

SEES = ("vision/*", "projector/*", "image_newline", "view_separator")
BILLION = 1_000_000_000


def get_config() -> TrainConfig:
    so400m = Transformer(
        num_layers=27,
        embed_dim=1152,
        num_heads=16,
        mlp_dim=4304,
        activation="gelu_tanh",
        remat="full",
    )
    model = VisionLanguage(
        language=Decoder(
            vocab_size=102400,
            embed_dim=2048,
            num_layers=27,
            attention=MLA(num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
            mlp_dim=10944,
            moe=MoE(
                num_experts=64,
                expert_dim=1408,
                num_shared_experts=2,
                router=Softmax(num_active_experts=6),
                balance=Balance(sequence_weight=0.001),
            ),
            num_dense_layers=1,
            remat="full",
        ),
        vision=ViT(
            transformer=so400m,
            image_size=(384, 384),
            patch_size=14,
            class_token=False,
            pooling="none",
        ),
        projector=DownsampleProjector(),
    )
    captions = SeeingPart(source=MediaShards(paths=("captions/*.tar",)))
    talks = SeeingPart(source=MediaShards(paths=("conversations/*.tar",)), weight=0.7)
    text = SeeingPart(source=TextFiles(paths=("corpus/*.txt",)), weight=0.3)
    data = Seeing(
        parts=(captions,),
        tokenizer=TokenizerFile(path="FOLDER"),
        dialog=Dialog(user="<|User|>:", assistant="<|Assistant|>:"),
        views=10,
        held_out=0.001,
        eval_rows=512,
    )
    both = dataclasses.replace(data, parts=(talks, text))
    tenth = (Slower(paths="vision/*", factor=0.1),)
    alignment = AdamW(learning_rate=4.2e-4, warmup_steps=100, schedule=Cosine(), slower=tenth)
    return TrainConfig(
        model=model,
        data=data,
        optimizer=alignment,
        mesh=MeshShape(fsdp=-1, data=1),
        steps=1,
        batch_size=256,
        sequence_length=4096,
        init_parts=(
            InitPart(part="vision", source="SIGLIP"),
            InitPart(part="language", source="DECODER"),
        ),
        stages=(
            Stage(name="alignment", trainable=SEES, tokens=2 * BILLION, optimizer=alignment),
            Stage(
                name="pretraining",
                tokens=808_900_000_000,
                batch_size=2304,
                accumulation_steps=9,
                data=both,
                optimizer=dataclasses.replace(alignment, schedule=Stairs()),
            ),
            Stage(
                name="instruction",
                tokens=20 * BILLION,
                batch_size=64,
                data=dataclasses.replace(both, parts=(talks,)),
                optimizer=AdamW(learning_rate=1.4e-5, schedule=Constant(), slower=tenth),
            ),
        ),
    )
