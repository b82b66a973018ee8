"""Unimodal pretraining, alignment, task tuning: parts that learned alone are joined for one task.

    python -m deepseek_jax.train --config configs/deepseek_v2_lite.py --run-dir runs/reads
    python -m deepseek_jax.train --config configs/unimodal_to_task.py --init-parts.0.source SIGLIP --init-parts.1.source runs/reads

Unimodal pretraining is runs of their own: a decoder on text (or V2-Lite's folder), an encoder by
images and their captions (two towers, as configs/multimodal_quickstart.py; or SIGLIP, the folder of
google/siglip-so400m-patch14-384). Then only what joins them learns, from captions/; then all but
the encoder learns one task, from task/. These two have LLaVA-1.5's rates, batches and steps (arXiv
2310.03744, its table of hyperparameters; 558,000 captions and 665,000 conversations).
configs/unimodal_to_task_tiny.py is the same in minutes.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.data.media import MediaShards
from deepseek_jax.data.seeing import SeeingPart
from deepseek_jax.training.optimizer import AdamW, Cosine
from deepseek_jax.training.recipe import Stage, TrainConfig

HERE = pathlib.Path(__file__)


def get_config() -> TrainConfig:
    joined = load_config(HERE.with_name("deepseek_vl2_small.py"), TrainConfig)
    reads = load_config(HERE.with_name("deepseek_v2_lite.py"), TrainConfig)
    language = dataclasses.replace(reads.model, remat="full")
    task = SeeingPart(source=MediaShards(paths=("task/*.tar",)))
    schedule = Cosine(final_fraction=0.0)
    return dataclasses.replace(
        joined,
        model=dataclasses.replace(joined.model, language=language),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=65, schedule=schedule, weight_decay=0.0),
        steps=2200,
        stages=(
            Stage(name="alignment", trainable=("projector/*", "image_newline", "view_separator")),
            Stage(
                name="task",
                trainable=("!vision/*",),
                steps=5200,
                batch_size=128,
                data=dataclasses.replace(joined.data, parts=(task,)),
                optimizer=AdamW(
                    learning_rate=2e-5, warmup_steps=156, schedule=schedule, weight_decay=0.0
                ),
            ),
        ),
    )
