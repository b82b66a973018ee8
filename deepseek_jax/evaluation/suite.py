"""Scores on held-out text: loss, perplexity, bits per byte, and what general compressors reach.

Bits per byte compare across tokenizers and with compressors: all the bits that the model needs for
the documents and their ends, over the documents' UTF-8 bytes.
"""

import functools
import gzip
import lzma
import math
from typing import Any

import jax
import numpy as np

from deepseek_jax.data.loader import Dataset
from deepseek_jax.models.build import Model
from deepseek_jax.ops.losses import token_losses

INPUTS = ("tokens", "segments", "positions")


def held_out(model: Model, params: Any, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte` and `tokens` of the held-out side."""
    nats, tokens = 0.0, 0.0  # in float64 over batches, whose own sums are float32
    for batch in dataset.eval_batches(batch_size):
        inputs = {name: batch[name] for name in INPUTS}
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
    packed = {
        "gzip -9": gzip.compress(data, 9),
        "xz -9e": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(content) / len(data) for name, content in packed.items()}
