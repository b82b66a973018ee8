"""A language model's tensors as transformers' folders have them, float8 ones too, to be written."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.parts import THREADS
from deepseek_jax.checkpoint.safetensors import (
    BLOCK,
    FLOAT8,
    SCALE,
    Entry,
    Source,
    Tensor,
    dequantized,
    narrowed,
    quantized,
)
from deepseek_jax.models.build import Model


def entries(
    model: Model,
    params: Mapping[str, Source],
    scales: dict[str, Tensor],
    original: dict,
    dtype: str | None,
) -> list[Entry]:
    """The tensors of transformers' folder, in its order."""
    ours, how = names.leaves(model), original.get("quantization_config") or {}
    float8 = dtype == "float8-block" or (dtype is None and scales)
    entries: list[Entry] = []

    def wide(row: names.Row) -> np.ndarray:
        if row.expert is not None:  # of the stack, only this one is read
            stack = {row.expert: params[row.ours[0]].read((row.expert,))}
            return names.joined(row, ours, [stack])
        return names.joined(row, ours, [params[path].read(()) for path in row.ours])

    @functools.lru_cache(THREADS)  # each thread writes the values first, their scales next
    def pair(row: names.Row) -> tuple[np.ndarray, np.ndarray]:
        return _float8(wide(row), scales.get(row.theirs), how)

    for row in names.table(model.config, ours):
        name, shape, kind = row.theirs, names.their_shape(row, ours), params[row.ours[0]].dtype
        if float8 and (name in scales or (not scales and names.is_quantized(name))):
            blocks = tuple(-(-size // BLOCK) for size in shape)
            of_scales = scales[name].dtype if name in scales else jnp.dtype(jnp.float32)
            entries.append(Entry(name, shape, FLOAT8, lambda row=row: pair(row)[0]))
            entries.append(Entry(name + SCALE, blocks, of_scales, lambda row=row: pair(row)[1]))
            continue
        if dtype not in (None, "float8-block") and not name.endswith("correction_bias"):
            kind = jnp.dtype(dtype)
        entries.append(Entry(name, shape, kind, lambda row=row: wide(row)))
    kind = entries[0].dtype
    for name, shape in names.empty(model.config).items():
        entries.append(Entry(name, shape, kind, lambda: np.zeros(0)))
    return entries


def _float8(wide: np.ndarray, scale: Tensor | None, how: dict) -> tuple[np.ndarray, np.ndarray]:
    """Float8 values and scales; a tensor that its old scales still express exactly keeps them."""
    if scale is not None:
        old = scale.read()
        values = narrowed(wide, old)
        if np.array_equal(dequantized(values, old).astype(wide.dtype), wide):
            return values, old
    values, new = quantized(wide, how.get("scale_fmt") == "ue8m0")
    return values, new if scale is None else new.astype(scale.dtype)
