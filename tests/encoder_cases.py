"""Encoders against transformers' own: what every family's test file does with a tiny random model.

`agrees` saves the torch model as transformers does, opens the folder here, and compares the last
hidden state, the pooled vector, the slopes of every weight, and what is written back.
"""

import copy
import pathlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from deepseek_jax.checkpoint import encoders, huggingface, tables
from deepseek_jax.checkpoint.manager import disk_names
from deepseek_jax.checkpoint.safetensors import open_tensors
from deepseek_jax.core import tree
from deepseek_jax.serving.encoder import EncoderModel, load_encoder
from deepseek_jax.serving.inputs import INPUTS


def randomized(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> torch.nn.Module:
    """The model in float32 and evaluation mode, no weight left at a neutral value."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        neutral = 1.0 if weight.dim() == 1 and name.endswith("weight") else 0.0
        weight.data = neutral + scale * torch.randn_like(weight)
    return model.float().eval()


# Weights whose slope is 0 in exact arithmetic: keys' biases, tokens for what is masked where
# nothing is, and Whisper's positions, which stay the sines that they are.
FLAT = r".*\.(k_proj|key)\.bias|.*mask_token|masked_spec_embed|embed_positions\.weight"


def agrees(
    model: torch.nn.Module,
    folder: pathlib.Path,
    inputs: Any,
    run: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    made_with: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> EncoderModel:
    """Ours of the saved model. `run(model, torch inputs, **more)` gives (hidden, pooled or None).

    `made_with` is what the model's class was given beside a config. Forward within 1e-4 of the
    largest value, slopes of a random sum of all outputs within 1e-3. Every weight of theirs must
    have a counterpart, and a slope to compare but for those named in FLAT.
    """
    model.save_pretrained(folder)
    ours = load_encoder(folder)
    tensor = torch.from_numpy(np.asarray(inputs))
    theirs = [x for x in run(model, tensor, **more) if x is not None]
    rng = np.random.default_rng(1)
    slopes = [rng.normal(size=x.shape).astype(np.float32) for x in theirs]
    given = jax.tree.map(jnp.asarray, INPUTS[type(ours.config)](ours.config, inputs, **more))

    def total(params):
        found = ours.encoder.apply(params, **given)
        made = [x for x in (found.hidden, found.pooled) if x is not None]
        return sum(jnp.vdot(x, s) for x, s in zip(made, slopes, strict=True)), made

    params = jax.tree.map(lambda x: x.astype(jnp.float32), ours.params)
    grads, made = jax.jit(jax.grad(total, has_aux=True))(params)  # one program: compiling is slow
    for mine, other in zip(made, theirs, strict=True):
        other = other.detach().numpy()
        np.testing.assert_allclose(np.asarray(mine), other, atol=1e-4 * abs(other).max(), rtol=0)

    model.zero_grad()
    sum((x * torch.from_numpy(s)).sum() for x, s in zip(theirs, slopes, strict=True)).backward()
    grads = on_disk(grads, ours.encoder.layers)
    leaves = tables.leaves(ours.encoder)
    family = encoders.family_of(ours.original)
    named = slopes_on_disk(model, folder / "slopes")
    named = {name.removeprefix(family.prefix): slope for name, slope in named.items()}
    # What is 0 in exact arithmetic is rounding of sums as large as the largest.
    noise = 1e-6 * max(abs(slope).max() for slope in named.values())
    rows = tables.table(family, ours.config, leaves)
    assert sum(x.size for x in grads.values()) == sum(x.numel() for x in model.parameters())
    assert {row.theirs for row in rows} == {*named}
    for row in rows:
        mine = tables.joined(row, leaves, [grads[path] for path in row.ours])
        other = named[row.theirs]
        atol = max(1e-3 * abs(other).max(), noise)
        steep = abs(other).max() > 100 * noise
        assert steep or re.fullmatch(FLAT, row.theirs), f"{row.theirs} is hardly compared"
        np.testing.assert_allclose(mine, other, atol=atol, rtol=0, err_msg=row.theirs)

    again = folder / "again"
    huggingface.write_encoder(again, ours.encoder, ours.params, ours.original)
    other, info = type(model).from_pretrained(again, output_loading_info=True, **made_with)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    return ours


def slopes_on_disk(model: torch.nn.Module, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The slopes of a model's weights under the names that transformers saves them by."""
    slopes = copy.deepcopy(model)
    for weight, its in zip(slopes.parameters(), model.parameters(), strict=True):
        weight.data = torch.zeros_like(its) if its.grad is None else its.grad
    slopes.save_pretrained(folder)
    return {name: tensor.read() for name, tensor in open_tensors(folder).items()}


def on_disk(params: Any, layers: Any) -> dict[str, np.ndarray]:
    """Leaves by their names on disk, stacks as layers."""
    found = {}
    for path, leaf in tree.flatten(params).items():
        rows = disk_names(path, leaf.shape, layers)
        array = np.asarray(leaf)
        found |= dict(zip(rows, array, strict=True)) if rows else {path: array}
    return found
