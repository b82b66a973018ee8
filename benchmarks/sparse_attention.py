"""A learned gate that keeps three tenths of the past, against full attention.

    python benchmarks/sparse_attention.py [--steps 300] [--rounds 5] [--ratio 0.3]

First the quickstart is trained with each: held-out bits per byte, and how many multiply-adds of
scores and values a token takes by `models/counts`. Then the attention alone, forward and backward,
at growing lengths: milliseconds, medians of interleaved rounds. 0 steps or rounds leave a part out.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from deepseek_jax.core.config import load_config
from deepseek_jax.evaluation.suite import held_out
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.sparse_attention import GatedGQA
from deepseek_jax.models.counts import attention_products
from deepseek_jax.monitoring.metrics import read_lines
from deepseek_jax.ops.attention import causal_attention
from deepseek_jax.ops.sparse import gated
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import TrainConfig

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=0.3)
    options = parser.parse_args()
    if options.steps:
        learn(options)
    if options.rounds:
        measure(options)


def learn(options: argparse.Namespace) -> None:
    config = load_config(CONFIGS / "gated_attention.py", TrainConfig)
    shape = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 48}
    print("attention | bits per byte | pairs kept | multiply-adds a token and layer")
    for name, attention in (
        ("full", GQA(**shape)),
        (f"gate, {options.ratio:g}", GatedGQA(**shape, ratio=options.ratio)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            model = dataclasses.replace(config.model, attention=attention)
            run = dataclasses.replace(
                config, model=model, run_dir=folder, steps=options.steps, log_every=20,
                eval_every=0, save_every=0,
            )  # fmt: skip
            train(run, Lent(held_out, lambda *_: ""))
            bits = read_lines(pathlib.Path(folder) / "eval.jsonl")[-1]["bits_per_byte"]
            kept = read_lines(pathlib.Path(folder) / "metrics.jsonl")[-1].get("attention/kept", 1)
        products = attention_products(attention, config.sequence_length)
        print(f"{name} | {bits:.4f} | {kept:.3f} | {products:,.0f}", flush=True)


def measure(options: argparse.Namespace) -> None:
    print("length | full ms | gate ms | full / gate | products")
    for length in (512, 1024, 2048, 4096):
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v = (jax.random.normal(key, (1, length, 8, 64), jnp.bfloat16) for key in keys[:3])
        gate = jax.random.normal(keys[3], (1, length))
        part = {"ratio": options.ratio, "scale": 0.125}
        forms = {
            "full": lambda q, k, v, gate: causal_attention(q, k, v, None, scale=0.125),
            "gate": lambda q, k, v, gate, part=part: gated(q, k, v, gate, None, **part)[0],
        }
        runs = {
            name: jax.jit(
                jax.grad(lambda *x, form=form: form(*x).astype(jnp.float32).sum(), (0, 1, 2))
            )
            for name, form in forms.items()
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(q, k, v, gate))
                times[name].append(time.perf_counter() - start)
        full, ours = (1e3 * statistics.median(times[name][1:]) for name in runs)
        shape = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
        counted = attention_products(GQA(**shape), length)
        counted /= attention_products(GatedGQA(**shape, ratio=options.ratio), length)
        print(f"{length} | {full:.1f} | {ours:.1f} | {full / ours:.2f} | {counted:.2f}")


if __name__ == "__main__":
    main()
