"""DeepSeek-V2-Lite's MoE layers on one accelerator: how much of its matmul rate training uses.

    python benchmarks/layer_stack.py [--layers 4] [--rows 8] [--length 4096] [--steps 10]

Forward, backward and AdamW of so many layers, bfloat16 products over float32 parameters, each layer
recomputed in the backward pass as `--remat` says; vocabulary 8,192. Twice: with the routers' own
choices on text (the standard library's sources, one byte a token), and with forced balance, where
every expert gets the same number of tokens, as other projects measure. FLOPs are the model's
(models/counts: recomputation does not count); the limit is a bfloat16 product at 8192^3 in the same
run. Steps of both take turns.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sysconfig
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from train_step import batch

from deepseek_jax.core.config import load_config
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers import moe
from deepseek_jax.models import counts
from deepseek_jax.models.build import build
from deepseek_jax.ops.experts import routed_experts
from deepseek_jax.training.language import Language
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.stages import stage_step
from deepseek_jax.training.state import initial_state

V2_LITE = pathlib.Path(__file__).parents[1] / "configs/deepseek_v2_lite.py"
CHUNK = 4096  # tokens whose logits exist at once


def balanced(x, experts, weights, gate, *leaves, **options):
    """`routed_experts`, but every expert gets the same number of choices."""
    even = jnp.arange(experts.size, dtype=jnp.int32).reshape(experts.shape) % gate.shape[0]
    return routed_experts(x, even, weights, gate, *leaves, **options)


def text(rows: int, length: int) -> np.ndarray:
    """The beginning of the standard library's sources, a byte a token."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    stream = b"".join(file.read_bytes() for file in files)[: rows * (length + 1)]
    return np.frombuffer(stream, np.uint8).reshape(rows, length + 1).astype(np.int32)


def stepper(config: TrainConfig, data: dict, state: list) -> Callable[[], float]:
    """A function that takes one step of the state in the list, and says its seconds."""
    stage, model = config.filled_stages()[0], build(config.model, config.precision)
    step = stage_step(config, model, stage, stage.batch_at(0), first=0)
    if not state:
        optimizer = make_optimizer(stage.optimizer, model.specs)
        start = jax.jit(lambda: initial_state(model.init(jax.random.key(0)), optimizer, 1.0))
        state.append(start())
    compiled = jax.jit(step, donate_argnums=0).lower(state[0], data).compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"compiled: {held / 1e9:.1f} GB with its arguments", flush=True)

    def take() -> float:
        start = time.perf_counter()
        state[0], metrics = compiled(state[0], data)
        assert np.isfinite(float(metrics["loss"]))
        return time.perf_counter() - start

    return take


def matmul_rate(size: int) -> float:
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        last = product(a)
    last.block_until_ready()
    return 2 * size**3 * 10 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=int, default=8192, help="size of the limit's product")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--width", type=int, default=2048, help="of the model; less for a trial")
    arguments = parser.parse_args()
    released = load_config(V2_LITE, TrainConfig)
    shape = dataclasses.replace(
        released.model,
        num_layers=arguments.layers,
        num_dense_layers=0,
        vocab_size=8192,
        remat=arguments.remat,
        embed_dim=arguments.width,
    )
    config = dataclasses.replace(
        released,
        model=shape,
        precision=Precision(compute="bfloat16"),
        objective=Language(chunk=CHUNK),
        batch_size=arguments.rows,
        sequence_length=arguments.length,
    )
    data, state = jax.device_put(batch(text(arguments.rows, arguments.length))), []
    rows = {"own routing": stepper(config, data, state)}
    with mock.patch.object(moe, "routed_experts", balanced):
        rows["forced balance"] = stepper(config, data, state)
    for take in rows.values():
        take()
    times = {name: [] for name in rows}
    for _ in range(arguments.steps):
        for name, take in rows.items():
            times[name].append(take())
    tokens, limit = arguments.rows * arguments.length, matmul_rate(arguments.limit)
    model = build(config.model, config.precision)
    flops = counts.train_flops_per_token(model, arguments.length) * tokens
    total, active = counts.num_params(model)
    print(
        f"{jax.devices()[0].device_kind}: {total / 1e9:.2f} B parameters, {active / 1e9:.2f} B "
        f"active, {flops / 1e12:.1f} TFLOP a step of {tokens} tokens; limit "
        f"{limit / 1e12:.0f} TFLOP/s"
    )
    for name, measured in times.items():
        seconds = statistics.median(measured)
        print(
            f"{name:16s} {1e3 * seconds:8.1f} ms {tokens / seconds:10.0f} tokens/s "
            f"{flops / seconds / 1e12:7.1f} TFLOP/s {flops / seconds / limit:7.1%} of the limit"
        )


if __name__ == "__main__":
    main()
