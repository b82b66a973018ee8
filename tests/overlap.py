"""What a TPU does while tokens travel to experts, from the compiler's schedule; prints JSON.

    PYTHONPATH=. python tests/overlap.py --model.moe.exchange.kind padded

Of every exchange of the first round: the products between its start and its end. Run as a script,
because the compiler goes on in a thread that only the process's end stops.
"""

import json
import os
import re
import sys

import jax

from deepseek_jax.core import config as core_config
from deepseek_jax.core.target import compiling_for
from deepseek_jax.models.build import build
from deepseek_jax.parallel.chips import described
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.planning import compile_step
from deepseek_jax.training.recipe import TrainConfig

FLAGS = [
    "--model.num-layers=2", "--model.num-dense-layers=1", "--model.vocab-size=1024",
    "--model.remat=none", "--mesh.data=1", "--mesh.fsdp=1", "--mesh.expert=8", "--batch-size=8",
    "--sequence-length=2048",
]  # fmt: skip
START = re.compile(r"\s*%([\w.-]*all-to-all-start[\w.-]*) = ")
DONE = re.compile(r"\s*%[\w.-]*all-to-all-done[\w.-]* = (\S+?)\{.*?-done\(%([\w.-]+)\)")
NAME = re.compile(r'op_name="([^"]*)"')


def overlaps(text: str) -> list[dict]:
    """[{sent, backward, beside: names of products}] of a scheduled program."""
    started, found, lines = {}, [], text.splitlines()
    for number, line in enumerate(lines):
        if start := START.match(line):
            started[start[1]] = number
        elif (done := DONE.match(line)) and done[2] in started:
            between = lines[started[done[2]] + 1 : number]
            names = [name[1] for row in between if (name := NAME.search(row))]
            products = {n.split("/moe/")[-1] for n in names if "dot_general" in n}
            about = NAME.search(line)[1]
            if "shard_map/while" not in about:  # further rounds, which rarely run
                back = "transpose(" in about.split("/moe/")[0]
                found.append({"sent": done[1], "backward": back, "beside": sorted(products)})
    return found


def main(flags: list[str]) -> None:
    """Compile a step of V2-Lite's mixture of experts and read its schedule."""
    jax.config.update("jax_platforms", "cpu")
    config = core_config.load_config("configs/deepseek_v2_lite.py", TrainConfig)
    config = core_config.override(config, [*FLAGS, *flags], prog="overlap", description="")
    place = described("v5p:2x2x2")
    mesh = make_mesh(config.mesh, place.devices)
    with compiling_for(place.devices):
        model = build(config.model, config.precision)
        stage = config.filled_stages()[0]
        program, _ = compile_step(config, model, stage, mesh, quick=True)
    print(json.dumps(overlaps(program.text)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
