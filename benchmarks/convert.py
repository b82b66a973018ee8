"""Conversion, ours against transformers' (from_pretrained, save_pretrained) and the disk's speed.

    python benchmarks/convert.py [--layers 4] [--rounds 3] [--no-peer]

A random bfloat16 checkpoint of DeepSeek-V2-Lite's shape with so many layers (1.17 GB each, and 0.84
GB of embeddings) goes from Hugging Face's form to ours and back. Each turn is a process of its own;
contenders take turns, medians are printed. `copy` copies the files; files are in the page cache.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from deepseek_jax.checkpoint import families, names
from deepseek_jax.checkpoint.safetensors import Entry, write_tensors
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Softmax
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import Decoder

OURS = ("-m", "deepseek_jax.convert")
THEIRS = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""
COPY = "import sys, shutil; shutil.copytree(sys.argv[1], sys.argv[2])"


def write_checkpoint(directory: pathlib.Path, layers: int) -> float:
    """A random checkpoint; its gigabytes."""
    config = Decoder(
        vocab_size=102400, embed_dim=2048, num_layers=layers, num_dense_layers=1, mlp_dim=10944,
        attention=MLA(num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        moe=MoE(
            num_experts=64, expert_dim=1408, num_shared_experts=2,
            router=Softmax(num_active_experts=6),
        ),
    )  # fmt: skip
    ours = names.leaves(build(config, Precision(compute="float32")))
    rng, kind = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(kind)

    entries = []
    for row in names.table(config, ours):
        shape = names.their_shape(row, ours)
        entries.append(Entry(row.theirs, shape, kind, lambda shape=shape: values(shape)))
    directory.mkdir()
    write_tensors(directory, entries, 5 * 10**9)
    text = json.dumps(families.hf_config(config, {}, "bfloat16"))
    (directory / "config.json").write_text(text)
    return sum(entry.size for entry in entries) / 1e9


def turn(*command: object) -> tuple[float, float]:
    """Seconds that a Python process takes, and the most memory (GB) that it held."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.DEVNULL)
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:  # not getrusage: that counts the parent's memory before exec
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        peak = max([peak, *(int(line.split()[1]) / 1e6 for line in lines)])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        size = write_checkpoint(root / "hf", arguments.layers)
        turns = {
            "copy": ("-c", COPY, root / "hf", root / "copy"),
            "ours, from-hf": (*OURS, "from-hf", root / "hf", root / "ours"),
            "ours, to-hf": (*OURS, "to-hf", root / "ours", root / "back"),
            "transformers, both": ("-c", THEIRS, root / "hf", root / "theirs"),
        }
        if arguments.no_peer:
            del turns["transformers, both"]
        found: dict[str, list] = {kind: [] for kind in turns}
        for _ in range(arguments.rounds):
            for kind, call in turns.items():
                found[kind].append(turn(*call))
            for made in ("copy", "ours", "back", "theirs"):
                shutil.rmtree(root / made, ignore_errors=True)
    print(f"{size:.2f} GB; {'seconds':>28} {'GB/s':>8} {'peak GB':>9}")
    for kind, measured in found.items():
        seconds, peak = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{kind:28} {seconds:10.1f} {size / seconds:8.2f} {peak:9.2f}")


if __name__ == "__main__":
    main()
