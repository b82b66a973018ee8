"""DeepSeek-VL2's stages (configs/deepseek_vl2_small.py) on what this machine has: minutes.

    python -m deepseek_jax.train --config configs/multimodal_quickstart.py --steps 200
    python -m deepseek_jax.train --config configs/vl2_stages_tiny.py

The encoder comes from the first run. In place of a decoder that can read, a stage before the
published three reads the standard library. From the full config are: what learns in each stage,
schedules, the encoder's tenth, the layout of tiles, 70 % with pictures; rates are five times as
high, and the shape is small. After 550 steps (with an encoder of 850) the kind of 31 % of 270 unseen
concepts is said rightly, the most frequent for 23 %.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.data.conversations import EmojiQuestions
from deepseek_jax.data.sources import StandardLibrary
from deepseek_jax.layers.router import Softmax
from deepseek_jax.training.recipe import InitPart, Stage, TrainConfig

HERE = pathlib.Path(__file__)


def get_config() -> TrainConfig:
    full = load_config(HERE.with_name("deepseek_vl2_small.py"), TrainConfig)
    seeing = load_config(HERE.with_name("vlm_three_stages.py"), TrainConfig)
    towers = load_config(HERE.with_name("multimodal_quickstart.py"), TrainConfig)
    language, balance = seeing.model.language, full.model.moe.balance
    moe = dataclasses.replace(language.moe, router=Softmax(num_active_experts=2), balance=balance)
    model = dataclasses.replace(
        full.model,
        language=dataclasses.replace(language, moe=moe),
        vision=dataclasses.replace(towers.model.image, pooling="none"),
    )
    sources = {
        "MediaShards": EmojiQuestions(asks=("group", "name"), languages=("en",)),
        "TextFiles": StandardLibrary(),
    }

    def ours(stage: Stage, steps: int) -> Stage:
        data = stage.data or full.data
        parts = tuple(
            dataclasses.replace(part, source=sources[type(part.source).__name__])
            for part in data.parts
        )
        rate, warmup = 5 * stage.optimizer.learning_rate, stage.optimizer.warmup_steps // 10
        return dataclasses.replace(
            stage,
            tokens=None,
            steps=steps,
            batch_size=None,
            accumulation_steps=None,
            data=dataclasses.replace(seeing.data, parts=parts, views=2),
            optimizer=dataclasses.replace(stage.optimizer, learning_rate=rate, warmup_steps=warmup),
        )

    stages = tuple(map(ours, full.stages, (40, 300, 60)))
    text = dataclasses.replace(stages[1].data.parts[1], weight=1.0)
    asked = dataclasses.replace(stages[1].data.parts[0], weight=0.0)
    reading = Stage(
        name="reading",
        steps=150,
        trainable=("language/*",),
        data=dataclasses.replace(stages[1].data, parts=(asked, text)),
        optimizer=dataclasses.replace(stages[1].optimizer, slower=()),
    )
    return dataclasses.replace(
        seeing,
        model=model,
        data=stages[0].data,
        optimizer=stages[0].optimizer,
        init_parts=(InitPart(part="vision", source="runs/multimodal_quickstart"),),
        batch_size=64,
        sequence_length=96,
        stages=(reading, *stages),
    )
