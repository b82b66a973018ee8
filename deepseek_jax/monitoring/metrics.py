"""What a run measures, written down: JSON lines and TensorBoard events.

One object a line, each written at once, so that a killed run loses at most a torn last line; a
resumed run first cuts the files back to the restored step, and each step stands once.
"""

import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX

from deepseek_jax.core.errors import InputError

FILES = ("metrics.jsonl", "eval.jsonl", "expert_load.jsonl", "processes.jsonl")


class RunLog:
    """Writes a run's JSON lines and tensorboard/; only the first process of a job does."""

    def __init__(self, run_dir: str | pathlib.Path):
        self._run_dir = pathlib.Path(run_dir)
        self._board: tensorboardX.SummaryWriter | None = None
        self._purge: int | None = None  # TensorBoard forgets events from this step on
        self._on = jax.process_index() == 0

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """A logged training step's scalars."""
        self._scalars("metrics.jsonl", "train", step, values)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """An evaluation's scalars after `step` steps."""
        self._scalars("eval.jsonl", "eval", step, values)

    def expert_load(self, step: int, counts: Mapping[str, Any]) -> None:
        """Tokens that each expert got: {path of a block: counts [R, E]} of one step."""
        load = {path: np.asarray(value).tolist() for path, value in counts.items()}
        self._write("expert_load.jsonl", {"step": int(step), "load": load})

    def processes(self, step: int, values: Mapping[str, Any]) -> None:
        """What a run of several processes measured of each: apart, as it depends on the clock."""
        self._write("processes.jsonl", {"step": int(step)} | dict(values))

    def cut_back(self, step: int) -> None:
        """Forget what follows `step` (-1: everything) and a torn last line; call on resuming."""
        self.close()
        self._purge = step + 1
        paths = [self._run_dir / name for name in FILES if self._on]
        for path in filter(pathlib.Path.exists, paths):
            temporary = path.with_name(f"{path.name}.tmp")
            with path.open("rb") as old, temporary.open("wb") as new:
                new.writelines(line for line in old if _stands(line, step))
            temporary.replace(path)

    def close(self) -> None:
        """Close TensorBoard's file; a later call opens another."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _scalars(self, name: str, group: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in values.items() if key != "step"}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        self._write(name, {"step": int(step)} | {key: finite.get(key) for key in numbers})
        if not self._on:
            return
        if self._board is None:
            board, suffix = str(self._run_dir / "tensorboard"), f".{time.time_ns()}"
            self._board = tensorboardX.SummaryWriter(
                board, purge_step=self._purge, flush_secs=10, filename_suffix=suffix
            )
        for key, value in finite.items():
            self._board.add_scalar(key if "/" in key else f"{group}/{key}", value, step)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if not self._on:
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            with (self._run_dir / name).open("a") as file:
                print(json.dumps(record, allow_nan=False), file=file)
        except OSError as error:
            raise InputError(f"{self._run_dir / name}: not written: {error.strerror}") from None


def read_lines(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file that have a step, in order; none if it is missing."""
    path = pathlib.Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if _stands(line, math.inf)]


def _stands(line: bytes, last: float) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last
    except (ValueError, TypeError, KeyError):
        return False
