"""A tiny model with random weights as the checkpoint of a run on a few text files."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.manager import Checkpoint, Manager
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import BPE, Bytes, open_tokenizer
from deepseek_jax.layers.attention import GQA
from deepseek_jax.models.build import Model, build
from deepseek_jax.models.decoder import Decoder, layer_table


class Run(NamedTuple):
    """What the tests use of a run."""

    directory: str
    config: dict
    model: Model
    params: dict
    tokenizer: object
    texts: dict[str, str]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    texts = {f"{i}.txt": f"File {i} says: caf\u00e9 " + "and so on, " * i for i in range(20)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    tokenizer = open_tokenizer(Bytes())
    decoder = Decoder(
        vocab_size=260,
        embed_dim=16,
        num_layers=2,
        attention=GQA(num_heads=2, num_kv_heads=1, head_dim=8),
        mlp_dim=32,
    )
    precision = Precision(compute="float32")
    # The config asks for a BPE, but the checkpoint carries bytes: those must be used.
    data = Data(
        source=TextFiles(paths=(f"{folder}/*.txt",)),
        tokenizer=BPE(vocab_size=300),
        held_out=0.3,
        cache_dir=str(folder / "cache"),
    )
    config = {
        "model": to_dict(decoder),
        "precision": to_dict(precision),
        "data": to_dict(data),
        "sequence_length": 48,
        "stages": [{"data": None}],
    }
    config = json.loads(json.dumps(config))
    model, rng = build(decoder, precision), np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), model.shapes)
    manager = Manager(folder / "checkpoints", Checkpoint(), layer_table(decoder))
    manager.save(1, {"params": params}, position=0, config=config, files=tokenizer.files())
    manager.close()
    return Run(str(folder), config, model, params, tokenizer, texts)
