"""Unimodal pretraining, alignment, task tuning (configs/unimodal_to_task.py): minutes.

    python -m deepseek_jax.train --config configs/multimodal_quickstart.py --steps 200
    python -m deepseek_jax.train --config configs/unimodal_to_task_tiny.py

The encoder learns alone in the first run, the decoder in the second's first stage, from the standard
library. Then only the projector learns, from names; then all but the encoder learns the task, to
say what kind of thing a drawing shows: with an encoder of 850 steps right for 45 % of 270 unseen
concepts, the most frequent answer for 23 %.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.data.conversations import EmojiQuestions
from deepseek_jax.data.seeing import SeeingPart
from deepseek_jax.data.sources import StandardLibrary
from deepseek_jax.training.recipe import InitPart, Stage, TrainConfig

HERE = pathlib.Path(__file__)


def get_config() -> TrainConfig:
    full = load_config(HERE.with_name("unimodal_to_task.py"), TrainConfig)
    seeing = load_config(HERE.with_name("vlm_three_stages.py"), TrainConfig)
    towers = load_config(HERE.with_name("multimodal_quickstart.py"), TrainConfig)
    vision = dataclasses.replace(towers.model.image, pooling="none")
    align, task = full.stages
    names = SeeingPart(source=EmojiQuestions(asks=("name",), languages=("en",)))
    text = SeeingPart(source=StandardLibrary())
    unseen = dataclasses.replace(names, weight=0.0)
    return dataclasses.replace(
        seeing,
        model=dataclasses.replace(seeing.model, vision=vision),
        init_parts=(InitPart(part="vision", source="runs/multimodal_quickstart"),),
        sequence_length=96,
        stages=(
            Stage(
                name="reading",
                trainable=("language/*",),
                steps=150,
                data=dataclasses.replace(seeing.data, parts=(unseen, text)),
            ),
            dataclasses.replace(
                align,
                trainable=align.trainable[:1],
                steps=60,
                data=dataclasses.replace(seeing.data, parts=(names,)),
            ),
            dataclasses.replace(
                task, batch_size=None, steps=200, data=seeing.data, optimizer=seeing.optimizer
            ),
        ),
    )
