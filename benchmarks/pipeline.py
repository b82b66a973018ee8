"""How long a pipeline's devices wait, counted in its compiled schedule, beside what theory says.

    python benchmarks/pipeline.py

Two cores cannot time eight stages, so passes are counted. A device runs as many passes of a chunk
of layers, real or not, as it hands results to its neighbors: that is in the compiled program's
text (loops of one round lose a hand-over that nobody reads: sizes that have one are not here). Each
real pass adds 1, forward to a report and backward to a gradient: what the program computes says how
many there are. A tick costs all devices the same, so idle passes are idle time. Theory is
(S - 1) / (v M + S - 1) of a step, which Megatron-LM (arXiv 2104.04473, section 2.2) gives as
(S - 1) / (v M) of the work. Layers that do not split evenly cost more: V3's 61 are the last column.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.parallel.compile import compile_program
from deepseek_jax.parallel.manual import per_device
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.pipeline import AXIS, Parts, Pipeline, one_forward_one_backward

SIZES = (  # stages, chunks, microbatches
    (2, 2, 8), (4, 1, 4), (4, 1, 16), (4, 2, 16), (4, 4, 16), (8, 1, 8),
    (8, 1, 32), (8, 2, 32), (8, 4, 32),
)  # fmt: skip
LAYERS = 61


def counted(pipeline: Pipeline) -> tuple[int, np.ndarray, np.ndarray]:
    """Passes that a device runs, and the real ones of every device, forward and backward."""
    mesh = make_mesh(MeshShape(data=1, stage=pipeline.stages), jax.devices()[: pipeline.stages])

    def first(params, batch):
        return batch * params

    def layers(params, number, x, batch):
        scale, one = params
        return x * scale, one, jnp.int32(1)  # the loss's slope by `one`: 1 a real pass

    def last(params, x, batch):
        return (x * params).sum(), jnp.int32(0)

    def run(chunks, batches):
        ends = jnp.ones(8), jnp.ones(8)
        grads, forward, _ = one_forward_one_backward(
            pipeline, Parts(first, layers, last), ends[0], chunks, ends[1], batches, jnp.float32(1)
        )
        return forward.sum()[None], grads[1][:, 1].sum()[None], grads[1][:, 0]

    own, whole = PartitionSpec(AXIS), PartitionSpec()
    given = jnp.ones((pipeline.stages * pipeline.chunks, 2)), jnp.ones((pipeline.microbatches, 8))
    with jax.set_mesh(mesh):
        function = jax.jit(per_device(run, (own, whole), (own,) * 3))
        program = compile_program(function.lower(*given), mesh)
        forward, backward, _ = jax.device_get(function(*given))
    runs = sum(row.count for row in program.collectives if row.kind == "collective-permute")
    return runs, forward, backward


def main() -> None:
    print("| stages | chunks | microbatches | passes run | real | idle | theory | of the work | "
          f"empty slots, {LAYERS} layers |\n{'|---' * 9}|")  # fmt: skip
    for sizes in SIZES:
        pipeline = Pipeline(*sizes)
        runs, forward, backward = counted(pipeline)
        real = forward + backward
        assert (real == real[0]).all()
        idle, work = 1 - real[0] / runs, (pipeline.stages - 1) / pipeline.turns
        print(
            f"| {' | '.join(map(str, sizes))} | {runs} | {real[0]:.0f} | {idle:.1%} | "
            f"{pipeline.bubble:.1%} | {work:.1%} | {pipeline.empty(LAYERS):.1%} |"
        )


if __name__ == "__main__":
    main()
