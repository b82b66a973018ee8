"""Meshes, remat policies and batch sizes of a config, the best that fit first.

Compiling is what costs. So every candidate is first weighed by what needs no compiler: the exact
bytes of what a step is given, the least that it must keep beside them, and bounds in seconds by
formula. What cannot fit falls out; of the rest the most promising are compiled, each in a process
of its own that stops before machine code. Where one does not fit, nothing that needs more is tried.
"""

import datetime
import json
import math
import subprocess
import sys
import time
from collections.abc import Container
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, AxisType

from deepseek_jax.core import tree
from deepseek_jax.core.axes import BATCH_AXES, MESH_AXES
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.target import compiling_for
from deepseek_jax.layers.block import RECOMPUTED
from deepseek_jax.models.build import Network
from deepseek_jax.models.counts import train_flops_per_token
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.networks import build_network
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.parallel.chips import Place, described
from deepseek_jax.parallel.sharding import weight_sharding
from deepseek_jax.training.planning import held, narrowed
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.stages import learning, stage_state

ROWS = (1, 2, 4, 8, 16, 32)  # of a batch shard
POLICIES = ("none", "dots", "full", "offload")
WORK = 3.0  # times a layer's rows that its backward pass holds: 2.5 to 3.5 in V2-Lite and V3


class Candidate(NamedTuple):
    """A choice, and what is known of it before it is compiled."""

    mesh: dict[str, int]
    remat: str
    rows: int
    """Of a batch shard."""
    batch_size: int
    least: float
    """Bytes that a device needs at the very least."""
    likely: float
    """Bytes with one layer's work, as programs compiled so far needed it."""
    bounds: tuple[float, ...]
    """Of a step in seconds, by formula."""

    @property
    def seconds(self) -> float:
        """Of a step, at best."""
        return max(self.bounds)

    def flags(self, config: TrainConfig, number: int = 0) -> list[str]:
        """The candidate of a config of one stage, its run's `number`th, as a command line."""
        axes = [f"--mesh.{axis}={self.mesh[axis]}" for axis in MESH_AXES]
        part = "model.language" if isinstance(config.model, VisionLanguage) else "model"
        stage = f"stages.{number}." if config.stages[0].batch_size else ""
        rest = {f"{part}.remat": self.remat, f"{stage}batch-size": self.batch_size}
        return [*axes, *(f"--{name}={value}" for name, value in rest.items())]


def search(
    config: TrainConfig, topology: str, compiles: int, command: list[str], number: int = 0
) -> dict[str, Any]:
    """The plans of the most promising candidates, best first by step time a token.

    `command` plans the config, the `number`th stage of its run, in a process of its own; flags are
    added to it. Also told: how many candidates there were and how many formulas ruled out. Progress
    goes to stderr. Raises InputError when no mesh suits the devices, or a compilation fails for
    another reason than memory.
    """
    place = described(topology)
    everything = candidates(config, place)
    if not everything:
        raise InputError(
            f"no mesh of {len(place.devices)} devices suits the config: its mesh.slice, stage and "
            "context must divide them"
        )
    waiting = [one for one in everything if one.least <= place.chip.memory]
    print(
        f"{len(everything):,} candidates, {len(waiting):,} may fit; compiling up to {compiles}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    tokens = config.filled_stages()[0].sequence_length
    waiting.sort(key=lambda one: _order(one, place.chip.memory))
    plans, start = [], time.perf_counter()
    while waiting and len(plans) < compiles:
        one = waiting.pop(0)
        found = _planned(
            [*command, "--topology", topology, "--quick", "--json", *one.flags(config, number)]
        )
        plans.append(found)
        if not found["fits"]:
            waiting = [other for other in waiting if not _needs_more(other, one)]
        elif waiting:
            waiting = _promising(waiting, plans, tokens)
        left = min(compiles - len(plans), len(waiting))
        eta = datetime.timedelta(seconds=round(left * (time.perf_counter() - start) / len(plans)))
        print(f"{len(plans)}/{len(plans) + left}  {_said(one, found)}  ETA {eta}",
              file=sys.stderr, flush=True)  # fmt: skip
    plans.sort(
        key=lambda found: (not found["fits"], found.get("step_seconds", 0) / found["tokens"])
    )
    return {
        "topology": topology,
        "estimate": place.estimate,
        "fits": any(found["fits"] for found in plans),
        "candidates": len(everything),
        "compiled": len(plans),
        "plans": plans,
    }


def _order(one: Candidate, limit: float) -> tuple[Any, ...]:
    """Likely to fit; then the best bound; of like ones, what leaves most of the other bounds."""
    per_row = float(f"{one.seconds / one.batch_size:.3g}")
    return one.likely > limit, per_row, sum(one.bounds) / one.batch_size, one.likely


def _planned(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise InputError(
            f"`{' '.join(command[1:])}` failed: {done.stderr.strip()[-500:]}"
        ) from None


def _said(one: Candidate, found: dict[str, Any]) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    outcome = f"MFU {found['mfu']:.1%}" if found["fits"] else "does not fit"
    return f"{axes}, remat {one.remat}, batch {one.batch_size}: {outcome}"


def _needs_more(other: Candidate, refused: Candidate) -> bool:
    """Whether one that is surely no smaller was refused: more rows, or more kept of each."""
    order = ("offload", "full", "dots", "none")
    return (
        other.mesh == refused.mesh
        and other.rows >= refused.rows
        and order.index(other.remat) >= order.index(refused.remat)
    )


def _promising(
    waiting: list[Candidate], plans: list[dict[str, Any]], tokens: int
) -> list[Candidate]:
    """Those whose formula still promises more than the best plan found."""
    best = min(found["step_seconds"] / found["tokens"] for found in plans if found["fits"])
    return [one for one in waiting if one.seconds / one.batch_size / tokens < best]


def candidates(config: TrainConfig, place: Place) -> list[Candidate]:
    """Every mesh that suits the devices and the model, with every policy and batch size."""
    config = narrowed(config, place)
    stage = config.filled_stages()[0]
    with compiling_for(place.devices):
        if not isinstance(config.model, Decoder | VisionLanguage):
            kind = type(config.model).__name__
            raise InputError(f"a search is for decoders, which may see, and the model is {kind}")
        model = build_network(config.model, config.precision)
    length = stage.sequence_length
    flops = train_flops_per_token(model, length, stage.views) * length
    learns = learning(config, model)[0]
    kept, worked = image_bytes(config, learns)
    found = []
    for mesh in meshes(config, len(place.devices)):
        given = given_bytes(config, model, mesh)
        gathered, largest = weight_bytes(model, mesh, learns)
        narrow = model.dtypes.compute.itemsize
        gathered_layer = narrow * gathered / config.model.num_layers
        moved = {r: narrow * (2 + n) + 4 for r, n in RECOMPUTED.items()}  # and slopes, float32
        shards = math.prod(mesh[axis] for axis in BATCH_AXES)
        for rows in ROWS:
            batch = rows * shards * stage.accumulation_steps
            for remat in POLICIES:
                tokens = rows * stage.sequence_length / mesh["context"]
                least = given + largest + kept_bytes(config, remat, mesh["tensor"]) * tokens
                least += rows * kept
                work = flops * batch * (1 + RECOMPUTED[remat] / 3)
                bounds = (
                    work / len(place.devices) / place.peak,
                    gathered * moved[remat] / place.chip.links,
                    sent_by_tensor(config, mesh, rows * stage.sequence_length) / place.chip.links,
                )
                likely = least + gathered_layer + WORK * tokens * row_bytes(config) + rows * worked
                found.append(Candidate(mesh, remat, rows, batch, least, likely, bounds))
    return found


def meshes(config: TrainConfig, count: int) -> list[dict[str, int]]:
    """Mesh sizes whose product is `count`: fsdp x expert x tensor, the rest as configured."""
    fixed = {axis: max(1, getattr(config.mesh, axis)) for axis in ("slice", "stage", "context")}
    rest, experts = count / math.prod(fixed.values()), config.model.moe
    if rest != int(rest):
        return []
    model = decoder(config)
    heads = math.gcd(model.attention.num_heads, model.mlp_dim)
    if isinstance(config.model, VisionLanguage):
        for seen in config.model.transformers:
            heads = math.gcd(heads, seen.num_heads, seen.mlp_dim)
    found = []
    for tensor in (1, 2, 4, 8):
        for expert in [2**n for n in range(10)]:
            if heads % tensor or rest % (tensor * expert):
                continue
            if expert > 1 and (experts is None or experts.num_experts % expert):
                continue
            fsdp = int(rest) // tensor // expert
            sizes = fixed | {"data": 1, "fsdp": fsdp, "expert": expert, "tensor": tensor}
            found.append({axis: sizes[axis] for axis in MESH_AXES})
    return found


def decoder(config: TrainConfig) -> Decoder:
    """The model, or of one that sees its decoder."""
    model = config.model
    return model.language if isinstance(model, VisionLanguage) else model


def image_bytes(config: TrainConfig, learns: Container[str]) -> tuple[float, float]:
    """Of one row's views: what an encoder that learns keeps at the least, and one layer's work."""
    if not isinstance(config.model, VisionLanguage):
        return 0.0, 0.0
    views, vision = config.filled_stages()[0].views, config.model.vision
    parts = [("vision", vision.grid, config.model.transformers[-1])]
    if isinstance(vision, Hybrid):
        high = vision.high
        parts = [("vision/high", (high.side, high.side), high.transformer)]
        parts += [("vision/low", vision.grid, vision.low.transformer)]
    kept = worked = 0.0
    for path, grid, part in parts:
        patches, learned = views * math.prod(grid), f"{path}/patch/weight" in learns
        kept += 2.0 * patches * part.embed_dim * part.num_layers * learned
        worked = max(worked, WORK * 2.0 * patches * (part.mlp_dim + 4 * part.embed_dim))
    return kept, worked


def given_bytes(config: TrainConfig, model: Network, mesh: dict[str, int]) -> int:
    """A device's bytes of the train state, exactly but for padding."""
    abstract = AbstractMesh(
        tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh)
    )
    return held(stage_state(config, model, abstract))


def weight_bytes(
    model: Network, mesh: dict[str, int], learns: Container[str]
) -> tuple[float, float]:
    """Weights that a device gathers for one pass, and bytes of the gradients that it keeps.

    Weights are gathered over all axes but tensor, experts' where tokens do not go to them.
    """
    abstract = AbstractMesh(
        tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh)
    )
    specs = tree.flatten(model.specs, is_leaf=lambda node: hasattr(node, "reduced"))
    gathered = gradients = 0.0
    for path, leaf in tree.flatten(model.shapes).items():
        spec = weight_sharding(abstract, specs[path], leaf.shape)
        own = math.prod(spec.shard_shape(leaf.shape))
        gradients += own * leaf.dtype.itemsize * (path in learns)
        exchanged = getattr(getattr(model.config.moe, "exchange", None), "kind", "none") != "none"
        stays = mesh["expert"] if exchanged and "/experts/" in path else 1
        split = stays * (mesh["tensor"] if "tensor" in spec.spec else 1)
        gathered += leaf.size / split - own
    return gathered, gradients


def kept_bytes(config: TrainConfig, remat: str, tensor: int) -> float:
    """Of one token, what the forward pass must keep for the backward one, at the least.

    The tensor axis splits what is inside a layer, not its input.
    """
    model = decoder(config)
    layers = model.num_layers + model.num_mtp_layers
    inputs = model.embed_dim * layers
    active = model.moe.router.num_active_experts if model.moe else 0
    width = active * model.moe.expert_dim if model.moe else model.mlp_dim
    products = layers * (4 * model.embed_dim + 2 * width) / tensor
    return 2 * {"offload": 0, "full": inputs, "dots": inputs + products / 2}.get(
        remat, inputs + products
    )


def row_bytes(config: TrainConfig) -> float:
    """Of one token, what a layer's widest parts hold: rows of every chosen expert, and heads."""
    model, moe = decoder(config), config.model.moe
    experts = moe.router.num_active_experts * (model.embed_dim + moe.expert_dim) if moe else 0
    heads = model.attention.num_heads * 4 * 128
    return 2.0 * max(experts + heads, model.mlp_dim + heads)


def sent_by_tensor(config: TrainConfig, mesh: dict[str, int], tokens: float) -> float:
    """Bytes of activations that a device's tensor axis adds up: four sums a layer and pass."""
    part = (mesh["tensor"] - 1) / mesh["tensor"]
    model = decoder(config)
    return 2 * 2 * part * 3 * 2 * model.embed_dim * tokens * model.num_layers
