"""Command: compile a config for a topology without the chips; say if, how and how best it fits."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

import jax

from deepseek_jax.core import config as core_config
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.monitoring.plans import draw, drawable, ranking, table
from deepseek_jax.training.planning import plan
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.search import search

USAGE = """plan --config FILE --topology NAME [--section.field value ...] [--json] [--picture FILE]
            [--stage N] [--quick] [--search [--compiles N]]"""


def main(argv: list[str]) -> None:
    """Plan as the command line says; exit code 1 when it, or nothing that was tried, fits."""
    parser = argparse.ArgumentParser(prog="plan", allow_abbrev=False, add_help=False)
    parser.usage = USAGE
    parser.add_argument("--config", help="a Python file with get_config(): configs/deepseek_v3.py")
    parser.add_argument(
        "--topology", help="v5e:4x4, v5p:4x4x8, tpu7x:4x4x4, v5p:8x8x8@2 (slices), h100:64, ..."
    )
    parser.add_argument(
        "--stage", type=int, default=0, metavar="N", help="of the run's stages (default 0)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--picture", metavar="FILE", help="draw memory and roofline: .png or .svg")
    parser.add_argument(
        "--quick", action="store_true", help="leave machine code out: four times as fast"
    )
    parser.add_argument(
        "--search", action="store_true", help="try meshes, remat policies and batch sizes"
    )
    parser.add_argument(
        "--compiles", type=int, default=8, metavar="N", help="that a search makes (default 8)"
    )
    own, rest = parser.parse_known_args(argv)
    if own.config is None or own.topology is None:
        if not {"-h", "--help"} & set(rest):
            raise InputError("plan needs --config FILE and --topology NAME, e.g. v5p:4x4x8")
        parser.print_help()
        return
    if own.compiles < 1:
        raise InputError(f"--compiles {own.compiles}: at least 1, please")
    if own.picture:
        drawable(own.picture)  # before minutes of compiling
    jax.config.update("jax_platforms", "cpu")  # no chip of this machine is touched
    config = core_config.load_config(own.config, TrainConfig)
    config = core_config.override(config, rest, prog="plan", description=parser.format_help())
    if not 0 <= own.stage < len(config.stages):
        raise InputError(
            f"--stage {own.stage}: this run's stages are 0 to {len(config.stages) - 1}"
        )
    config = dataclasses.replace(config, stages=(config.stages[own.stage],))
    name = {"config": pathlib.Path(own.config).stem}
    if own.search:
        command = [sys.executable, "-m", "deepseek_jax.plan", "--config", own.config, *rest]
        command += ["--stage", str(own.stage)]
        searched = search(config, own.topology, own.compiles, command, own.stage)
        plans = [name | one for one in searched.pop("plans")]
        print(json.dumps(name | searched | {"plans": plans}) if own.json else ranking(plans))
        found = plans[0] if plans else {"fits": False}
    else:
        found = name | plan(config, own.topology, own.quick)
        print(json.dumps(found) if own.json else table(found))
    if own.picture and "memory" in found:
        draw(found, own.picture)
    sys.stdout.flush()
    sys.stderr.flush()
    code = int(not found["fits"])
    if own.quick:
        os._exit(code)  # its compiler goes on in a thread
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    run_command(main)
