"""Conversion, ours against transformers' (from_pretrained, save_pretrained) and the disk's speed.

    python benchmarks/convert.py [--layers 2] [--rounds 3] [--no-peer]
    python benchmarks/convert.py --layers 17 --rounds 1 --no-peer     # 20 GB

A random bfloat16 checkpoint of DeepSeek-V2-Lite's shape with so many layers (1.17 GB each but the
first, and 0.84 GB of embeddings) goes from Hugging Face's form to ours and back. Each turn is a
process of its own; contenders take turns, medians are printed. `copy` copies the files and flushes
them, as our writer does. What fits is in the page cache when a turn begins: each turn's source is
read once before it. Peaks: anonymous memory (what a process cannot drop), and with mapped files.
With `--rounds 1` there are never more than two checkpoints on the disk.
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
COPY = """
import os, pathlib, shutil, sys
shutil.copytree(sys.argv[1], sys.argv[2])
for path in pathlib.Path(sys.argv[2]).rglob("*"):
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
"""


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
        bits = rng.integers(0, 2**16, shape, np.uint16)
        return (bits & 0x81FF | 0x3C00).view(kind)  # a sign and what lies between 1/128 and 1/32

    entries = []
    for row in names.table(config, ours):
        shape = names.their_shape(row, ours)
        entries.append(Entry(row.theirs, shape, kind, lambda shape=shape: values(shape)))
    directory.mkdir()
    write_tensors(directory, entries, 5 * 10**9)
    text = json.dumps(families.hf_config(config, {}, "bfloat16"))
    (directory / "config.json").write_text(text)
    return sum(entry.size for entry in entries) / 1e9


def turn(source: pathlib.Path, *command: object) -> tuple[float, float, float]:
    """Seconds that a Python process takes, and the most memory (GB) that it held: own, and all."""
    for file in filter(pathlib.Path.is_file, source.rglob("*")):
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass
    start, own, peak = time.perf_counter(), 0, 0
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:  # not getrusage: that counts the parent's memory before exec
        lines = (line.split(":") for line in status.read_text().splitlines())
        found = {name: int(text.split()[0]) for name, text in lines if name in ("RssAnon", "VmHWM")}
        own, peak = max(own, found.get("RssAnon", 0)), max(peak, found.get("VmHWM", 0))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, own * 1024 / 1e9, peak * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--directory", help="where to work; by default among temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        root = pathlib.Path(name)
        size = write_checkpoint(root / "hf", arguments.layers)
        first, second = root / "hf", root / "ours"
        turns = {
            "copy": (first, "-c", COPY, first, root / "copy"),
            "transformers, both": (first, "-c", THEIRS, first, root / "theirs"),
            "ours, from-hf": (first, *OURS, "from-hf", first, second),
            "ours, to-hf": (second, *OURS, "to-hf", second, root / "back"),
        }
        if arguments.no_peer:
            del turns["transformers, both"]
        found: dict[str, list] = {kind: [] for kind in turns}
        for number in range(arguments.rounds):
            for kind, call in turns.items():
                if call[0] == second and number + 1 == arguments.rounds:
                    shutil.rmtree(first)  # three large checkpoints are one too many
                found[kind].append(turn(*call))
                for made in ("copy", "back", "theirs"):
                    shutil.rmtree(root / made, ignore_errors=True)
            shutil.rmtree(second)
    print(f"{size:.2f} GB; {'seconds':>28} {'GB/s':>8} {'own GB':>9} {'peak GB':>9}")
    for kind, measured in found.items():
        seconds, *peaks = (statistics.median(values) for values in zip(*measured, strict=True))
        memory = " ".join(f"{peak:9.2f}" for peak in peaks)
        print(f"{kind:28} {seconds:10.1f} {size / seconds:8.2f} {memory}")


if __name__ == "__main__":
    main()
