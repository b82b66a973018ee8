"""Images and words in one space, from nothing: emoji drawings and their English and Chinese names.

    python -m deepseek_jax.train --config configs/multimodal_quickstart.py

A small vision transformer and a small text transformer learn CLIP's contrastive loss on OpenMoji's
drawings (pip brings them), and a decoder to write their captions. A fifth of the concepts is held
out, variants with their base. After 850 steps (12 minutes on two cores) recall@10 is 0.198 among
the 677 held-out drawings, by chance 0.0147. Colors are left as they are: skin tones are named. Each
Chinese character is a word: with phrases as tokens Chinese names found less than half.
"""

import dataclasses

from deepseek_jax.data.augment import Augmentation
from deepseek_jax.data.pairs import Emoji, Pairs
from deepseek_jax.data.tokenizer import BPE
from deepseek_jax.data.vision import ImageTransform
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.captioner import Captioner
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.two_tower import TwoTower
from deepseek_jax.models.vit import ViT
from deepseek_jax.training.contrastive import Contrastive
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    image = Transformer(num_layers=4, embed_dim=128, num_heads=4, mlp_dim=512)
    text = Transformer(num_layers=2, embed_dim=128, num_heads=4, mlp_dim=512)
    return TrainConfig(
        model=TwoTower(
            image=ViT(transformer=image, image_size=(48, 48), patch_size=8),
            text=TextTower(transformer=text, vocab_size=2048, max_length=24),
            shared_dim=128,
            captioner=Captioner(transformer=dataclasses.replace(text, num_layers=1, causal=True)),
        ),
        data=Pairs(
            source=Emoji(),
            tokenizer=BPE(vocab_size=2048, split_han=True),
            image=ImageTransform(size=48, fit="crop"),
            augmentation=Augmentation(min_area=0.6, flip=0.0, brightness=0.0, contrast=0.0),
        ),
        objective=Contrastive(caption_weight=0.5, token_dropout=0.1),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=50, weight_decay=0.3),
        steps=850,
        batch_size=256,
        sequence_length=24,
        eval_every=100,
        log_every=20,
    )
