"""What must hold in every step of a mixture of experts; the loop checks it at intervals and stops.

The step hands out a few numbers beside its metrics (`observed`), the host judges them (`check`):
token counts add up, every loss that is trained is there in every layer, gradients are finite module
by module, and a router's bias is the same to the bit on all devices.
"""

import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.core import tree
from deepseek_jax.core.errors import BrokenRun
from deepseek_jax.models.build import Network
from deepseek_jax.training.optimizer import is_router_bias


def check(
    step: int, params: Any, seen: dict[str, Any], model: Network, *, whole: bool = True
) -> None:
    """BrokenRun, naming step, block and reason, where a step broke what must hold.

    `params` are the new ones, `seen` is the step's `observed`. Without `whole`, what is wrong with
    losses and gradients passes: the step was skipped, and its state may be saved. All processes
    call it together.
    """
    moe, seen = getattr(model.config, "moe", None), jax.device_get(seen)
    found = wrong_counts(seen, moe.router.num_active_experts) if moe else []
    found += unequal_biases(params)
    if whole:
        found += wrong_losses(seen) + wild_gradients(seen)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise BrokenRun(
            f"step {step}: {found[0]}{more}; the run is stopped and this state not saved, earlier "
            "checkpoints stand; --check-every 0 would train on regardless"
        )


def squares(grads: Any) -> dict[str, jax.Array]:
    """{path of a parameter: the sum of its gradient's squares}, float32."""
    leaves = tree.flatten(grads).items()
    return {path: jnp.sum(jnp.square(grad.astype(jnp.float32))) for path, grad in leaves}


def observed(
    lengths: dict[str, jax.Array],
    means: dict[str, jax.Array],
    weights: dict[str, jax.Array],
    routing: dict[str, Any],
) -> dict[str, Any]:
    """What `violations` judges, as arrays: of gradients, given their squares; of terms; of blocks.

    `means` and `weights` are of the terms that are trained.
    """
    modules: dict[str, Any] = {}
    for path, square in lengths.items():
        module = path.rpartition("/")[0]
        modules[module] = modules.get(module, 0.0) + square
    blocks = {
        path: {k: v for k, v in r._asdict().items() if v is not None} for path, r in routing.items()
    }
    return {
        "gradients": modules,
        "terms": {t: (means[t], weights[t]) for t in means},
        "blocks": blocks,
    }


def wrong_counts(seen: dict[str, Any], num_active: int) -> list[str]:
    """What `observed` says of tokens that were lost or invented on their way to experts."""
    found = []
    for path, block in seen["blocks"].items():
        sums = block["counts"].astype(np.int64).sum(-1), block["dropped"], block["tokens"]
        for layer, (sent, dropped, tokens) in enumerate(zip(*map(np.asarray, sums), strict=True)):
            if sent + dropped != int(tokens) * num_active or block["counts"][layer].min() < 0:
                found.append(
                    f"{path}, layer {layer}: {sent:,} choices reached experts and {dropped:,} were "
                    f"dropped, but {tokens:,} tokens made {num_active} each"
                )
    return found


def wrong_losses(seen: dict[str, Any]) -> list[str]:
    """Terms that are trained, and nevertheless 0 or not finite, in all or in one layer."""
    found = []
    for term, (mean, weight) in seen["terms"].items():
        blocks = seen["blocks"].items()
        alone = term == "router/uniform_loss" and all(b["counts"].shape[-1] == 1 for _, b in blocks)
        if weight > 0 and not alone and not _good(mean):
            found.append(f"{term} is {mean:g}, though it is trained")
            continue
        kind, _, name = term.partition("/")
        for path, block in blocks if kind == "router" and not alone else ():
            for layer, value in enumerate(block.get(name, ())):
                if block["tokens"][layer] and not _good(value):
                    found.append(
                        f"{path}, layer {layer}: {term} is {value:g}, though it is trained"
                    )
    return found


def _good(value: Any) -> bool:
    return bool(np.isfinite(value)) and value != 0


def wild_gradients(seen: dict[str, Any]) -> list[str]:
    """Modules whose gradient is not finite."""
    bad = [module for module, square in seen["gradients"].items() if not np.isfinite(square)]
    more = f" and {len(bad) - 3} more modules" if len(bad) > 3 else ""
    return [f"the gradient of {', '.join(bad[:3])}{more} is not finite"] if bad else []


def unequal_biases(params: Any) -> list[str]:
    """Router biases whose copies on the job's devices are not the same to the bit.

    With several processes all must call it together, and all find the same.
    """
    biases = {p: leaf for p, leaf in tree.flatten(params).items() if is_router_bias(p)}
    rows = np.array([_summary(leaf) for leaf in biases.values()], np.int64).reshape(-1, 2)
    everyone = rows[None] if jax.process_count() == 1 else multihost_utils.process_allgather(rows)
    return _disagreements(biases, np.asarray(everyone))


def _summary(leaf: jax.Array) -> tuple[int, int]:
    """A hash of the first copy here, and the device of the first that differs from it, or -1."""
    copies: dict[str, list[tuple[int, bytes]]] = {}
    for shard in leaf.addressable_shards:
        content = np.asarray(shard.data).tobytes()
        copies.setdefault(str(shard.index), []).append((shard.device.id, content))
    other = [device for same in copies.values() for device, x in same if x != same[0][1]]
    whole = zlib.crc32(next(iter(copies.values()))[0][1]) if leaf.is_fully_replicated else 0
    return whole, min(other, default=-1)


def _disagreements(paths: Iterable[str], everyone: np.ndarray) -> list[str]:
    """By the processes' summaries [processes, biases, 2]."""
    found = []
    for path, rows in zip(paths, everyone.swapaxes(0, 1), strict=True):
        if devices := [device for _, device in rows.tolist() if device >= 0]:
            found.append(
                f"{path} is another on device {devices[0]} than on the first of its process"
            )
        elif others := np.flatnonzero(rows[:, 0] != rows[0, 0]).tolist():
            found.append(f"{path} is another in process {others[0]} than in process 0")
    return found
