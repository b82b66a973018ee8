"""Runs of several real processes for the tests, started by launch/local.sh."""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import fast

from deepseek_jax.core.config import to_dict
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.training.recipe import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import json, os, signal, time
from deepseek_jax.core.config import from_dict
from deepseek_jax.monitoring.profiler import Peak
from deepseek_jax.training import loop
from deepseek_jax.training.recipe import TrainConfig

slow, stop = float(os.environ.get("SLOW", 0)), int(os.environ.get("STOP", 0))
given = loop.batches
loop.matmul_peak = lambda: Peak(1e11, "not measured")  # which would take longer than the run

def batches(*arguments, **names):
    for number, batch in enumerate(given(*arguments, **names), 1):
        time.sleep(slow)
        if number == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch

if os.environ.get("JAX_PROCESS_ID", "") == os.environ.get("ODD"):
    loop.batches = batches

def get_config():
    return from_dict(TrainConfig, json.loads({text!r}))
"""


class Runs:
    """Runs of a small config by the launcher, with what they wrote; `fields` change the config.

    In the environment ODD names a process that sleeps SLOW seconds over each of its batches, and
    sends itself SIGTERM with the STOPth.
    """

    def __init__(self, folder: pathlib.Path, **fields: Any):
        self.folder = folder
        text = folder / "text"
        text.mkdir()
        for i in range(12):
            lines = (f"line {i * j} of file {i} says {(i + j) ** 3}\n" for j in range(40))
            (text / f"{i}.txt").write_text("".join(lines))
        source = TextFiles(paths=(str(text / "*.txt"),))
        cache = str(folder / "cache")
        data = Data(source=source, tokenizer=Bytes(), held_out=0.2, cache_dir=cache)
        base = {"data": data, "batch_size": 8, "precision": Precision(compute="float32")}
        self.config = TrainConfig(log_every=1, **(base | fields))
        (folder / "config.py").write_text(CONFIG.format(text=json.dumps(to_dict(self.config))))
        self.count = 0

    def start(self, name: str, *flags: str, processes: int = 2, **environment: str):
        self.count += 1
        self.said = self.folder / f"said-{self.count}.txt"
        own = {"XLA_FLAGS": fast.FLAGS, "PYTHONPATH": str(ROOT)}
        own |= {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled")}
        own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        own |= {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [str(ROOT / "launch" / "local.sh"), str(processes)]
        command += ["--config", str(self.folder / "config.py")]
        where = name if "://" in name else str(self.folder / name)
        with self.said.open("w") as said:
            return subprocess.Popen(
                [*command, "--run-dir", where, *flags],
                env=os.environ | own | environment, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def output(self) -> str:
        """What the run started last has said."""
        return self.said.read_text(errors="replace")  # a sample may hold any bytes

    def wait_for(self, launcher, name: str, step: int):
        """Return when the run has logged `step`."""
        end = time.monotonic() + 300
        while max([0, *(row["step"] for row in self.rows(name))]) < step:
            assert launcher.poll() is None and time.monotonic() < end, self.said.read_text(
                errors="replace"
            )
            time.sleep(0.02)

    def rows(self, name: str, file: str = "metrics.jsonl"):
        path = self.folder / name / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        timed = ("tokens_per_second", "mfu")
        return [{key: row[key] for key in row if key not in timed} for row in rows]

    def process(self, launcher, rank: int) -> int:
        """The id of the launcher's process of this rank, the newest attempt's."""
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                words = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == launcher.pid and b"JAX_PROCESS_ID=%d" % rank in words:
                return int(path.name)
        raise AssertionError(f"no process {rank}: {self.said.read_text(errors='replace')}")
