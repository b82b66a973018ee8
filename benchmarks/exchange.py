"""Bytes that each exchange of tokens sends, from the TPU compiler's own programs, for V3's experts.

    pip install -e '.[tpu]' && python benchmarks/exchange.py [--tokens 4096] [--chips 64 256]

DeepSeek-V3's 256 experts of which a token chooses 8, over 64 and 256 v5p chips; forward, in
bfloat16, one layer. The least that can be sent: every token once to each other device that has one
of its experts, and its result back; what random routing makes of that. Ids and weights come on top.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core.target import compiling_for
from deepseek_jax.ops.exchange import Exchange, exchanged
from deepseek_jax.ops.experts import routed_experts
from deepseek_jax.parallel.chips import described
from deepseek_jax.parallel.compile import compile_program
from deepseek_jax.parallel.manual import gathered, per_device
from deepseek_jax.parallel.mesh import MeshShape, make_mesh

EXPERTS, ACTIVE, WIDTH, EXPERT_WIDTH = 256, 8, 7168, 2048
TOPOLOGIES = {16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8"}
WAYS = {
    "none": Exchange(),
    "ring": Exchange(kind="ring"),
    "padded": Exchange(kind="padded"),
    "ragged": Exchange(kind="ragged"),
    "two_hop": Exchange(kind="two_hop"),
}


def least(tokens: int, parts: int, groups: int = 1) -> float:
    """Bytes a device must send and return for `tokens` of its own that choose evenly at random."""
    rng = np.random.default_rng(0)
    chosen = rng.permuted(np.tile(np.arange(EXPERTS), (20_000, 1)), axis=1)[:, :ACTIVE]
    devices = np.sort(chosen // (EXPERTS // parts), axis=1)
    distinct = 1 + (np.diff(devices, axis=1) > 0).sum(1).mean()
    return 2 * tokens * distinct * (1 - 1 / parts) * WIDTH * 2


def sent(name: str, devices: list, tokens: int, slices: int) -> tuple[float, float, float]:
    """Bytes a device sends in all and over slices, as compiled; seconds it took to compile.

    0 bytes when it does not fit a chip.
    """
    config = WAYS[name]
    mesh = make_mesh(MeshShape(data=1, slice=slices, expert=len(devices) // slices), devices)
    everyone = ("slice", "expert") if slices > 1 else ("expert",)
    home = PartitionSpec(("slice", "expert") if name == "two_hop" else "expert")
    rows = PartitionSpec(("slice", "expert"))

    def apply(x, experts, weights, leaves, load):
        return routed_experts(x, experts, weights, *leaves, expected=load.choices)[0]

    def of_one(x, experts, weights, *leaves):
        if name == "none":
            leaves = [gathered(w, home) for w in leaves]
            return routed_experts(x, experts, weights, *leaves)[0]
        return exchanged(config, EXPERTS, everyone, apply, x, experts, weights, leaves)

    def shape(dims, dtype, spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    count = tokens * len(devices)
    inward, outward = (EXPERTS, WIDTH, EXPERT_WIDTH), (EXPERTS, EXPERT_WIDTH, WIDTH)
    with compiling_for(devices), jax.set_mesh(mesh):
        run = per_device(of_one, (rows,) * 3 + (home,) * 3, rows)
        lowered = jax.jit(run).lower(
            shape((count, WIDTH), jnp.bfloat16, rows),
            shape((count, ACTIVE), jnp.int32, rows),
            shape((count, ACTIVE), jnp.float32, rows),
            *(shape(dims, jnp.bfloat16, home) for dims in (inward, inward, outward)),
        )
        program = compile_program(lowered, mesh)
    if program.refusal:
        return 0.0, 0.0, program.seconds
    slow = sum(row.bytes for row in program.collectives if "slice" in row.axes)
    return sum(row.bytes for row in program.collectives), slow, program.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of each device")
    parser.add_argument("--chips", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--slices", type=int, default=4, help="of the two-hop exchange")
    given = parser.parse_args()
    for chips in given.chips:
        devices = described(TOPOLOGIES[chips]).devices
        floor = least(given.tokens, chips)
        print(f"{chips} chips, {given.tokens} tokens a chip; at least {floor / 1e9:.3f} GB a chip")
        for name in WAYS:
            slices = given.slices if name == "two_hop" else 1
            total, slow, seconds = sent(name, devices, given.tokens, slices)
            if not total:
                print(f"  {name:8} does not fit a chip (compiled in {seconds:.0f} s)", flush=True)
                continue
            over = f", {slow / 1e9:.3f} of it between {slices} slices" if slow else ""
            print(
                f"  {name:8} {total / 1e9:8.3f} GB  {total / floor:6.2f} x least{over} "
                f"(compiled in {seconds:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
