"""A curriculum of three stages: 200 B tokens of text, 80 B of alignment, 30 B of instructions.

    python -m deepseek_jax.train --config configs/multimodal_curriculum.py --init-parts.0.source SIGLIP

The decoder learns to read from nothing, with a quarter of what follows in its last tenth; then
encoder and projector learn to speak to it; then everything answers. DeepSeek-VL2-tiny's shape, its
data and tokenizer. configs/multimodal_curriculum_tiny.py is the same in minutes.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import Stage, TrainConfig

BILLION = 1_000_000_000


def get_config() -> TrainConfig:
    tiny = load_config(pathlib.Path(__file__).with_name("deepseek_vl2_tiny.py"), TrainConfig)
    captions, both = tiny.data, tiny.stages[1].data
    talks, text = both.parts
    rows = 200 * BILLION // tiny.sequence_length
    ramp = ((rows * 9 // 10, 0.0), (rows, 0.25))  # captions come in while the text ends
    reading = dataclasses.replace(
        captions,
        parts=(
            dataclasses.replace(text, weight=1.0, source=TextFiles(paths=("corpus/*.txt",))),
            dataclasses.replace(captions.parts[0], schedule=ramp),
        ),
    )
    return dataclasses.replace(
        tiny,
        init_parts=tiny.init_parts[:1],
        optimizer=AdamW(learning_rate=4e-4, warmup_steps=2000),
        batch_size=1024,
        accumulation_steps=4,
        stages=(
            Stage(name="text", trainable=("language/*",), tokens=200 * BILLION, data=reading),
            Stage(name="alignment", trainable=tiny.stages[0].trainable, tokens=80 * BILLION),
            Stage(
                name="instruction",
                tokens=30 * BILLION,
                data=dataclasses.replace(both, parts=(talks, text)),
                optimizer=AdamW(learning_rate=3e-5, warmup_steps=100),
            ),
        ),
    )
