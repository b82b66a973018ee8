"""What a training step takes on chips that are not here: bytes, collectives, seconds at best.

A step cannot be faster than the slowest of its bounds, from published figures: products with the
recomputed ones, HBM read and written once, and what a device sends. These are bounds, no forecast.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepseek_jax.core.precision import compute_dtype
from deepseek_jax.core.target import compiling_for
from deepseek_jax.layers.block import RECOMPUTED
from deepseek_jax.models.audio import Wav2Vec2
from deepseek_jax.models.build import Model
from deepseek_jax.models.counts import num_params, row_tokens, train_flops_per_token
from deepseek_jax.models.fusion import Fused
from deepseek_jax.models.networks import build_network
from deepseek_jax.models.two_tower import TwoTower
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.parallel.chips import Chip, Place, described
from deepseek_jax.parallel.compile import Collective, Program, compile_program
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.parallel.sharding import batch_sharding, check_batch
from deepseek_jax.training.recipe import Stage, TrainConfig
from deepseek_jax.training.stages import overwriting, sized, stage_state, stage_step


def plan(config: TrainConfig, topology: str, quick: bool = False) -> dict[str, Any]:
    """The first stage's step, compiled for every device of the topology, as JSON-ready data.

    Bytes are a device's, FLOPs the whole step's; without a program (it does not fit) bounds, step
    and MFU are missing. `quick` leaves machine code out (see `compile_program`). Raises InputError
    for a topology that there is not, and a mesh or batch that does not fit it.
    """
    place = described(topology)
    stage = config.filled_stages()[0]
    config = narrowed(config, place)
    mesh = make_mesh(config.mesh, place.devices)
    check_batch(mesh, stage.sizes(), stage.sequence_length)
    with compiling_for(place.devices):
        model = build_network(config.model, config.precision)
        program, kept = compile_step(config, model, stage, mesh, quick)
        dtype = compute_dtype(config.precision)[0].name
    found = facts(config, model, place, mesh) | {
        "topology": topology,
        "compute": dtype,
        "fits": not program.refusal and program.memory["total"] <= place.chip.memory,
        "memory": program.memory | kept,
        "refusal": program.refusal.split("\n\n")[0],
        "refused_bytes": program.needed,
        "collectives": [row._asdict() for row in program.collectives],
        "remarks": list(program.remarks),
        "compile_seconds": program.seconds,
        "quick": quick,
    }
    if not program.refusal:
        memory = program.memory
        moved = memory["arguments"] + memory["outputs"] + 2 * memory["temporaries"]
        found |= forecast(
            found, place, moved, network_seconds(program.collectives, mesh, place.chip)
        )
    return found


def narrowed(config: TrainConfig, place: Place) -> TrainConfig:
    """The config, which for an estimate takes bfloat16 where it left that to the hardware."""
    if not place.estimate or config.precision.compute != "auto":
        return config
    precision = dataclasses.replace(config.precision, compute="bfloat16")
    return dataclasses.replace(config, precision=precision)


def facts(config: TrainConfig, model: Model, place: Place, mesh: Mesh) -> dict[str, Any]:
    """What is known of a plan before anything is compiled."""
    stage = config.filled_stages()[0]
    rows = stage.batch_size
    seen = sized(model, stage)
    tokens = rows * row_tokens(seen, stage.sequence_length)
    total, active = num_params(model)
    optimizer = stage.optimizer
    pipeline = Pipeline.on(mesh, config.mesh.stage_chunks, stage.accumulation_steps)
    moe = getattr(config.model, "moe", None)  # two towers have none
    return {
        "device": place.kind,
        "devices": len(place.devices),
        "estimate": place.estimate,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "exchange": moe.exchange.kind if moe else "none",
        "params": total,
        "active_params": active,
        "bubble": pipeline.bubble,
        "empty": pipeline.empty(config.model.num_layers),
        "remat": config.model.remat,
        "params_dtype": config.precision.params,
        "moments": [optimizer.momentum_dtype, optimizer.variance_dtype],
        "batch_size": rows,
        "accumulation_steps": stage.accumulation_steps,
        "sequence_length": stage.sequence_length,
        "tokens": tokens,
        "memory_limit": int(place.chip.memory),
        "host_limit": int(place.chip.host),
        "model_flops": tokens
        * train_flops_per_token(seen, stage.sequence_length, stage.views, stage.windows),
        "peak_flops": place.peak,
        "bandwidth": place.chip.bandwidth,
    }


def forecast(
    known: dict[str, Any], place: Place, moved: float, network: dict[str, float]
) -> dict[str, Any]:
    """Bounds in seconds, which of them binds, the step at best, and its MFU.

    A pipeline makes every stage's forward pass again; its devices wait for the first and last, and
    for those that have a layer more.
    """
    flops, whole = known["model_flops"], known["devices"] * place.peak
    again = 1.0 if known["bubble"] else RECOMPUTED[known["remat"]]
    bounds = {
        "compute": flops * (1 + again / 3) / whole / (1 - known["bubble"]) / (1 - known["empty"]),
        "memory": moved / place.chip.bandwidth,
        **network,
    }
    seconds = max(bounds.values())
    return {
        "bytes_moved": moved,
        "bound_seconds": bounds,
        "bound": max(bounds, key=bounds.get),
        "step_seconds": seconds,
        "mfu": flops / seconds / whole,
    }


def network_seconds(
    collectives: tuple[Collective, ...], mesh: Mesh, chip: Chip
) -> dict[str, float]:
    """Seconds of sending over the fast links, and between slices or NVLink domains."""
    fast = slow = 0.0
    for row in collectives:
        inside, across = _spread(row.axes, dict(mesh.shape), chip.domain)
        whole = inside * across  # of its parts a ring sends all but one
        outward = row.bytes * (across - 1) / across * whole / max(1, whole - 1)
        if row.kind not in ("all-to-all", "ragged-all-to-all", "collective-permute"):
            outward /= inside  # first among neighbors; then each sends its own part
        slow += outward
        fast += row.bytes - outward if inside > 1 else 0.0
    return {"network": fast / chip.links, "slow_network": slow / chip.network}


def _spread(axes: tuple[str, ...], sizes: dict[str, int], domain: int) -> tuple[int, int]:
    """Of the devices that these mesh axes join, how many share a domain, and in how many."""
    total = math.prod(sizes.values())
    domain = domain or total // sizes["slice"]
    joined = sizes if axes == ("?",) else {axis: sizes[axis] for axis in axes}
    inside = 1
    for axis in joined:
        names = list(sizes)
        stride = math.prod(sizes[name] for name in names[names.index(axis) + 1 :])
        inside *= min(sizes[axis], max(1, domain // stride))
    return inside, max(1, math.prod(joined.values()) // inside)


def kinds_of_bytes(state: Any, batch: Any) -> dict[str, int]:
    """A device's bytes of parameters, optimizer and everything else that a step is given."""
    return {
        "parameters": held(state.params),
        "optimizer": held((state.opt_state, state.left_out)),
        "batch": held(batch),
    }


def held(tree: Any) -> int:
    """Bytes that a device holds of abstract arrays with shardings, its host's left out."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != "pinned_host"
    )


def compile_step(
    config: TrainConfig, model: Model, stage: Stage, mesh: Mesh, quick: bool = False
) -> tuple[Program, dict[str, int]]:
    """The first stage's first train step on a mesh, from shapes alone, and `kinds_of_bytes`."""
    size = stage.batch_at(0)
    state = stage_state(config, model, mesh)
    step = stage_step(config, model, stage, size, first=0)
    compiled = overwriting(step, state, model)
    batch = abstract_batch(mesh, size.batch_size, stage.sequence_length, config)
    with jax.set_mesh(mesh):
        program = compile_program(compiled.lower(state, batch), mesh, quick)
    return program, kinds_of_bytes(state, batch)


def abstract_batch(mesh: Mesh, rows: int, length: int, config: TrainConfig) -> dict:
    """A batch's shapes, as the loader makes them, on the mesh."""
    stage = config.filled_stages()[0]
    model = stage.sized(config.model)
    if isinstance(model, Fused):
        shapes = stage.data.shapes(rows, length)
    elif isinstance(model, TwoTower):
        image = (*model.image.image_size, model.image.num_channels)
        shapes = {
            "images": ((rows, *image), jnp.uint8),
            "tokens": ((rows, length), jnp.int32),
            "groups": ((rows,), jnp.int32),
        }
    elif isinstance(model, VisionLanguage):
        media = stage.data.senses(model.sight, model.hearing).shapes.items()
        shapes = _language_batch(rows, length, 1) | {"sources": ((rows, length), jnp.int32)}
        shapes |= {name: ((rows, *shape), dtype) for name, (shape, dtype) in media}
    elif isinstance(model, Wav2Vec2):
        shapes = {
            "wave": ((rows, length), jnp.float32),
            "labels": ((rows, stage.data.max_characters), jnp.int32),
            "counts": ((rows,), jnp.int32),
            "rows": ((rows,), jnp.int32),
        }
    else:
        shapes = _language_batch(rows, length, 1 + model.num_mtp_layers)
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(*leaf, sharding=sharding),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _language_batch(rows: int, length: int, targets: int) -> dict[str, tuple]:
    return {
        "tokens": ((rows, length), jnp.int32),
        "targets": ((rows, length, targets), jnp.int32),
        "weights": ((rows, length, targets), jnp.float32),
        "segments": ((rows, length), jnp.int32),
        "positions": ((rows, length), jnp.int32),
    }
