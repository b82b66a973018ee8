"""What a checkpoint is scored on, and its scores: loss, perplexity, bits per byte, compressors'.

The text is always tokenized by the checkpoint's tokenizer, never by one trained anew. Bits per byte
compare across tokenizers and with compressors: all the bits that the model needs for the documents
and their ends, over the documents' UTF-8 bytes.
"""

import dataclasses
import functools
import gzip
import lzma
import math
from typing import Any

import jax
import numpy as np

from deepseek_jax.checkpoint.manager import last_stage
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import located
from deepseek_jax.data import sources
from deepseek_jax.data.loader import Data, Dataset, open_data
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.models.build import Model
from deepseek_jax.ops.losses import token_losses


def open_task(
    config: dict[str, Any], tokenizer: Tokenizer, name: str | None, num_targets: int = 1
) -> Dataset:
    """The documents to score: those held out from the data that a checkpoint was trained on last.

    `config` and `tokenizer` are the checkpoint's. A `name` chooses other data: `stdlib` for what is
    held out of the standard library; else a file or glob of text, JSON Lines (field `text`) or
    Parquet (column `text`), or a folder that `prepare` wrote. Raises InputError when there is no
    such data or it cannot be read.
    """
    last = last_stage(config)
    stored = last.get("data")
    data = from_dict(Data, stored, "data") if stored else Data()
    if name is None and not stored:
        raise InputError("this checkpoint does not say what it was trained on; give --data")
    if name is not None:
        if name == "stdlib":
            source = sources.StandardLibrary()
        elif (located(name).expanduser() / "manifest.json").is_file():
            source = sources.Records(path=name)
        else:
            source = sources.kind_of((name,))(paths=(name,))
        data = dataclasses.replace(data, source=source, eval_tokens=None)
    for source in (part.source for part in sources.parts(data.source)):
        if isinstance(source, sources.Records):
            prepared = load_tokenizer(located(source.path).expanduser() / "tokenizer")
            if prepared.files() != tokenizer.files():
                raise InputError(
                    f"{source.path}: prepared with another tokenizer than this checkpoint's; "
                    "evaluate on the text it was made from"
                )
    return open_data(
        data,
        sequence_length=last["sequence_length"],
        num_targets=num_targets,
        seed=0,
        tokenizer=tokenizer,
        whole=name not in (None, "stdlib") and not isinstance(data.source, sources.Records),
    )


def held_out(model: Model, params: Any, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte` and `tokens` of the held-out side."""
    nats, tokens = 0.0, 0.0  # in float64 over batches, whose own sums are float32
    for batch in dataset.eval_batches(batch_size):
        inputs = {name: batch[name] for name in ("tokens", "segments", "positions")}
        targets, weights = batch["targets"][..., 0], batch["weights"][..., 0]
        nats += float(_nats(model, params, inputs, targets, weights))
        tokens += float(np.sum(weights, dtype=np.float64))
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / dataset.eval_bytes,
        "tokens": int(tokens),
    }


@functools.partial(jax.jit, static_argnums=0)
def _nats(model: Model, params: Any, inputs: dict, targets: Any, weights: Any) -> jax.Array:
    """The batch's summed negative log-likelihood: a scalar, so every process can read it."""
    hidden = model.apply(params, **inputs, drop=False).hidden
    flat = hidden.reshape(-1, hidden.shape[-1])
    return token_losses(flat, model.head(params), targets.reshape(-1)) @ weights.reshape(-1)


def compressors(data: bytes) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9e` need for `data`."""
    gz, xz = gzip.compress(data, 9), lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    return {"gzip -9": 8 * len(gz) / len(data), "xz -9e": 8 * len(xz) / len(data)}
