"""Experts placed by what held-out text makes them do: routes, orders from them, what they cost."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.loader import Dataset
from deepseek_jax.layers.moe import MoE
from deepseek_jax.models.build import Model
from deepseek_jax.ops.placement import Devices, Traffic, clustered, traffic
from deepseek_jax.ops.routing import coactivation

Routes = dict[str, np.ndarray]  # by path of a block: [R, N, A], the experts that N tokens chose


def held_out_routes(
    model: Model, params: Any, dataset: Dataset, batch_size: int, num_tokens: int | None = None
) -> Routes:
    """The experts chosen by held-out tokens: all, or whole batches until there are `num_tokens`.

    The dataset has as many targets as a prediction block (MTP) needs, one for each.
    """
    found: dict[str, list[np.ndarray]] = {}
    seen = 0
    for batch in dataset.eval_batches(batch_size):
        real = batch["segments"] > 0
        inputs = {name: batch[name] for name in ("tokens", "segments", "positions")}
        following = batch["targets"][..., : model.config.num_mtp_layers]
        for path, chosen in _chosen(model, params, inputs, following).items():
            found.setdefault(path, []).append(np.asarray(chosen)[:, real])
        seen += int(real.sum())
        if num_tokens is not None and seen >= num_tokens:
            break
    if not found:
        raise InputError("this model has no experts to place")
    return {path: np.concatenate(parts, axis=1) for path, parts in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _chosen(model: Model, params: Any, inputs: dict, following: Any) -> dict[str, jax.Array]:
    following = following if model.config.num_mtp_layers else None
    output = model.apply(params, **inputs, next_tokens=following, drop=False)
    return {path: block.chosen for path, block in output.routing.items()}


def orders(routes: Routes, moe: MoE, devices: Devices) -> dict[str, np.ndarray]:
    """By path of a block: the order [R, E] that brings together the experts that fire together."""
    count = jax.jit(functools.partial(coactivation, num_experts=moe.num_experts))
    groups = moe.router.num_groups
    return {
        path: np.stack(
            [clustered(np.asarray(count(x)), devices, num_groups=groups) for x in layers]
        )
        for path, layers in routes.items()
    }


def mean_traffic(routes: Routes, slots: Mapping[str, np.ndarray], devices: Devices) -> Traffic:
    """The mean over layers of what placements {path of a block: [R, slots]} cost these tokens."""
    costs = [
        traffic(chosen, own, devices)
        for path, layers in routes.items()
        for chosen, own in zip(layers, slots[path], strict=True)
    ]
    return Traffic(*(float(np.mean(values)) for values in zip(*costs, strict=True)))


def halves(routes: Routes) -> tuple[Routes, Routes]:
    """The first tokens, to find an order by, and the last, to measure it on."""
    cut = next(iter(routes.values())).shape[1] // 2
    return {p: x[:, :cut] for p, x in routes.items()}, {p: x[:, cut:] for p, x in routes.items()}


def unmoved(routes: Routes, num_experts: int) -> dict[str, np.ndarray]:
    """By path of a block: the order [R, E] of experts as they are."""
    return {path: np.tile(np.arange(num_experts), (len(x), 1)) for path, x in routes.items()}
