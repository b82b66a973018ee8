"""The quickstart's model on your own text files.

    python -m deepseek_jax.train --config configs/text.py --data.source.paths 'corpus/**/*.txt'

Files are split into training and held-out ones by a hash of their names; held-out bits per byte are
printed at the end beside gzip's and xz's.
"""

import dataclasses
import pathlib

from deepseek_jax.core.config import load_config
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    quickstart = load_config(pathlib.Path(__file__).with_name("quickstart.py"), TrainConfig)
    data = dataclasses.replace(quickstart.data, source=TextFiles(paths=("corpus/**/*.txt",)))
    return dataclasses.replace(quickstart, data=data)
