"""Command: compile a config for a TPU topology without the chips; say if and how it fits."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepseek_jax.core import config as core_config
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.core.precision import compute_dtype
from deepseek_jax.core.target import compiling_for, published_flops
from deepseek_jax.models.build import Model, build
from deepseek_jax.models.counts import num_params, train_flops_per_token
from deepseek_jax.parallel.compile import Program, chip, compile_program, described
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import batch_sharding, check_batch
from deepseek_jax.training.loop import stage_step
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.recipe import Stage, TrainConfig
from deepseek_jax.training.state import abstract_state

RECOMPUTED = {"none": 0.0, "dots": 0.0, "full": 1.0}  # forward passes that remat adds


def main(argv: list[str]) -> None:
    """Plan as the command line says; exit code 1 when it does not fit."""
    parser = argparse.ArgumentParser(prog="plan", allow_abbrev=False, add_help=False)
    parser.usage = "plan --config FILE --topology NAME [--section.field value ...] [--json]"
    parser.add_argument("--config", help="a Python file with get_config(): configs/deepseek_v3.py")
    parser.add_argument("--topology", help="v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    own, rest = parser.parse_known_args(argv)
    if own.config is None or own.topology is None:
        if not {"-h", "--help"} & set(rest):
            raise InputError("plan needs --config FILE and --topology NAME, e.g. v5p:4x4x8")
        parser.print_help()
        return
    jax.config.update("jax_platforms", "cpu")  # no chip of this machine is touched
    config = core_config.load_config(own.config, TrainConfig)
    config = core_config.override(config, rest, prog="plan", description=parser.format_help())
    found = plan(config, own.topology)
    found = {"config": pathlib.Path(own.config).stem, **found}
    print(json.dumps(found) if own.json else table(found))
    if not found["fits"]:
        raise SystemExit(1)


def plan(config: TrainConfig, topology: str) -> dict:
    """The first stage's step, compiled for every device of the topology; see `table` for its keys.

    Bytes are a device's, FLOPs the whole step's. Raises InputError for a mesh or batch that does
    not fit the topology.
    """
    devices, stage = described(topology), config.filled_stages()[0]
    figures, peak = chip(devices[0]), published_flops(devices[0].device_kind)
    mesh = make_mesh(config.mesh, devices)
    check_batch(mesh, stage.sizes())
    with compiling_for(devices):
        model = build(config.model, config.precision)
        program = compile_step(config, model, stage, mesh)
        dtype = compute_dtype(config.precision)[0].name
    tokens = stage.batch_size * stage.sequence_length
    total, active = num_params(model)
    flops = train_flops_per_token(model, stage.sequence_length) * tokens
    memory = program.memory
    found = {
        "topology": topology,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "params": total,
        "active_params": active,
        "compute": dtype,
        "remat": config.model.remat,
        "sequence_length": stage.sequence_length,
        "tokens": tokens,
        "fits": not program.refusal and memory["total"] <= figures.memory,
        "memory": memory,
        "memory_limit": int(figures.memory),
        "refusal": program.refusal.split("\n\n")[0],
        "model_flops": flops,
        "collectives": [row._asdict() for row in program.collectives],
        "remarks": list(program.remarks),
        "compile_seconds": program.seconds,
    }
    if not program.refusal:
        passes = 1 + RECOMPUTED[config.model.remat] / 3
        moved = memory["arguments"] + memory["outputs"] + 2 * memory["temporaries"]
        bounds = {
            "compute": flops * passes / len(devices) / peak,
            "memory": moved / figures.bandwidth,
            "network": sum(row.bytes for row in program.collectives) / figures.links,
        }
        seconds = max(bounds.values())
        found |= {
            "bound_seconds": bounds,
            "bound": max(bounds, key=bounds.get),
            "step_seconds": seconds,
            "mfu": flops / seconds / len(devices) / peak,
        }
    return found


def compile_step(config: TrainConfig, model: Model, stage: Stage, mesh: Mesh) -> Program:
    """A filled stage's first train step on a mesh, from shapes alone."""
    size = stage.batch_at(0)
    state = abstract_state(model, make_optimizer(stage.optimizer, model.specs), mesh)
    step = stage_step(config, model, stage, size, first=0)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    batch = abstract_batch(mesh, size.batch_size, stage.sequence_length, config)
    with jax.set_mesh(mesh):
        return compile_program(compiled.lower(state, batch), mesh)


def abstract_batch(mesh: Mesh, rows: int, length: int, config: TrainConfig) -> dict:
    """A batch's shapes, as the loader makes them, on the mesh."""
    targets = 1 + config.model.num_mtp_layers
    shapes = {
        "tokens": ((rows, length), jnp.int32),
        "targets": ((rows, length, targets), jnp.int32),
        "weights": ((rows, length, targets), jnp.float32),
        "segments": ((rows, length), jnp.int32),
        "positions": ((rows, length), jnp.int32),
    }
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def table(found: dict) -> str:
    """A plan as text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"
    rows = [
        f"{found['config']} on {found['topology']}: {found['devices']} x {found['device']}, {mesh}",
        f"parameters      {found['params'] / 1e9:,.3f} B, {found['active_params'] / 1e9:,.3f} B "
        "active a token",
        f"a step          {found['tokens']:,} tokens in rows of {found['sequence_length']:,}, "
        f"{found['model_flops'] / 1e12:,.1f} TFLOP, {found['compute']}, remat {found['remat']}",
    ]
    limit = found["memory_limit"] / 1e9
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    if found["refusal"]:
        rows.append(f"{verdict}: the compiler says: {found['refusal']}")
    else:
        m = {name: size / 1e9 for name, size in found["memory"].items()}
        rows += [
            f"{verdict:15} {m['total']:.2f} of {limit:.1f} GB a device: arguments "
            f"{m['arguments']:.2f}, temporaries {m['temporaries']:.2f}, outputs beyond them "
            f"{m['outputs'] - m['aliased']:.2f}, code {m['code']:.2f}",
            "collectives     (times a step, GB that a device sends)",
        ]
        rows += [
            f"  {row['kind']:20} {' x '.join(row['axes']):24} {row['count']:8,} "
            f"{row['bytes'] / 1e9:10.3f}"
            for row in found["collectives"]
        ]
        times = ", ".join(f"{name} {1e3 * t:,.1f}" for name, t in found["bound_seconds"].items())
        rows += [
            f"bounds, ms      {times}",
            f"at best         {1e3 * found['step_seconds']:,.1f} ms a step, bound by "
            f"{found['bound']}: {found['tokens'] / found['step_seconds']:,.0f} tokens/s, MFU "
            f"{found['mfu']:.1%}",
        ]
    rows += [f"warning         {remark}" for remark in found["remarks"]]
    return "\n".join([*rows, f"compiled in     {found['compile_seconds']:.0f} s"])


if __name__ == "__main__":
    run_command(main)
