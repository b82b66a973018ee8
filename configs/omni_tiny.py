"""One small decoder that sees pictures and films and hears, from nothing and without a download.

    python -m deepseek_jax.train --config configs/omni_tiny.py

Spoken digits, handwritten digits that move, and emoji (extras `media` and `speech`). After 500 steps,
of what was held out (the most frequent answer): what is said is right for 1.00 (0.10), where a digit
moves for 0.91 (0.28), which digit moves for 0.30 (0.13), what kind of thing an emoji shows for 0.29
(0.23).
"""

from deepseek_jax.data.conversations import EmojiQuestions
from deepseek_jax.data.questions import MovingQuestions, SpokenQuestions
from deepseek_jax.data.seeing import Seeing, SeeingPart
from deepseek_jax.data.tokenizer import BPE
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Balance, Sigmoid
from deepseek_jax.models.audio import Whisper
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.ear import Ear
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT
from deepseek_jax.training.optimizer import WSD, Muon
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    small = Transformer(num_layers=2, embed_dim=64, num_heads=4, mlp_dim=192)
    decoder = Decoder(
        vocab_size=448,
        embed_dim=96,
        num_layers=2,
        attention=GQA(num_heads=4, num_kv_heads=2, head_dim=24),
        mlp_dim=256,
        moe=MoE(
            num_experts=4,
            expert_dim=96,
            router=Sigmoid(num_active_experts=2),
            num_shared_experts=1,
            balance=Balance(bias_rate=0.005),
        ),
        num_dense_layers=1,
        init_scale=0.04,
        unroll=2,
    )
    model = VisionLanguage(
        language=decoder,
        vision=ViT(
            transformer=small,
            image_size=(24, 24),
            patch_size=6,
            class_token=False,
            pooling="none",
        ),
        audio=Ear(encoder=Whisper(transformer=small, num_mels=40, num_positions=36), join=4),
        init_scale=0.1,
    )
    parts = (
        SeeingPart(source=SpokenQuestions(), weight=0.5),
        SeeingPart(source=MovingQuestions(), weight=2.0),
        SeeingPart(source=EmojiQuestions(languages=("en",))),
    )
    data = Seeing(
        parts=parts,
        tokenizer=BPE(vocab_size=448),
        views=4,
        frames=4,
        windows=1,
        eval_rows=160,
    )
    return TrainConfig(
        model=model,
        data=data,
        optimizer=Muon(learning_rate=6e-3, warmup_steps=20, schedule=WSD(decay_fraction=0.5)),
        steps=500,
        batch_size=32,
        sequence_length=80,
        eval_every=100,
        log_every=20,
    )
