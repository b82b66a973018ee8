"""What a run measures, written down: JSON lines and TensorBoard events.

One object a line, each written at once, so that a killed run loses at most a torn last line; a
resumed run first cuts the files back to the restored step, and each step stands once.

In a bucket, where nothing can be appended to, metrics.jsonl is its numbered parts one after the
other: metrics/000000.jsonl, ... The newest is put again with every few seconds' lines, until it has
a megabyte; `flush` comes before a checkpoint. TensorBoard's events grow on this host's disk and are
put beside them, a file a flush.
"""

import json
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.core.storage import Object, Path, located, nearby, read_all

FILES = ("metrics.jsonl", "eval.jsonl", "expert_load.jsonl", "processes.jsonl")


PART = 1 << 20  # bytes after which a part is full
PAUSE = 10.0  # seconds from one put of the newest lines to the next


class RunLog:
    """Writes a run's JSON lines and tensorboard/; only the first process of a job does."""

    def __init__(self, run_dir: str | Path):
        self._run_dir = located(run_dir)
        self._board: Any = None  # tensorboardX's
        self._purge: int | None = None  # TensorBoard forgets events from this step on
        self._on = jax.process_index() == 0
        self._events = nearby(self._run_dir, "tensorboard")
        self._parts: dict[str, _Parts] = {}
        if isinstance(self._run_dir, Object) and self._on:
            self._parts = {name: _Parts(_folder(self._run_dir / name)) for name in FILES}
            shutil.rmtree(self._events, ignore_errors=True)  # of a killed run

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
        for parts in self._parts.values():
            parts.cut_back(step)
        if isinstance(self._run_dir, Object):
            return
        paths = [self._run_dir / name for name in FILES if self._on]
        for path in filter(pathlib.Path.exists, paths):
            temporary = path.with_name(f"{path.name}.tmp")
            with path.open("rb") as old, temporary.open("wb") as new:
                new.writelines(line for line in old if _stands(line, step))
            temporary.replace(path)

    def flush(self) -> None:
        """Return once everything is where the run is; called before a checkpoint is written."""
        if self._parts:
            self.close()

    def close(self) -> None:
        """Close TensorBoard's file; a later call opens another."""
        if self._board is not None:
            self._board.close()
            self._board = None
        for parts in self._parts.values():
            parts.put()
        if self._parts and self._events.exists():
            for file in self._events.iterdir():
                (self._run_dir / "tensorboard" / file.name).write_bytes(file.read_bytes())
                file.unlink()

    def _scalars(self, name: str, group: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in values.items() if key != "step"}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        self._write(name, {"step": int(step)} | {key: finite.get(key) for key in numbers})
        if not self._on:
            return
        if self._board is None:
            suffix = f".{time.time_ns()}"
            self._board = _tensorboardx().SummaryWriter(
                str(self._events), purge_step=self._purge, flush_secs=10, filename_suffix=suffix
            )
            self._purge = None  # the next file goes on where this one ends
        for key, value in finite.items():
            self._board.add_scalar(key if "/" in key else f"{group}/{key}", value, step)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if not self._on:
            return
        line = f"{json.dumps(record, allow_nan=False)}\n"
        if self._parts:
            self._parts[name].append(line.encode())
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            with (self._run_dir / name).open("a") as file:
                file.write(line)
        except OSError as error:
            raise InputError(f"{self._run_dir / name}: not written: {error.strerror}") from None


class _Parts:
    """JSON lines as numbered objects; the newest lines wait for `put`, which is never long off."""

    def __init__(self, folder: Object):
        self._folder, self._number, self._content = folder, 0, b""
        self._waiting, self._last = False, -PAUSE

    def append(self, line: bytes) -> None:
        self._content, self._waiting = self._content + line, True
        if time.monotonic() - self._last >= PAUSE:
            self.put()

    def put(self) -> None:
        if not self._waiting:
            return
        (self._folder / f"{self._number:06d}.jsonl").write_bytes(self._content)
        self._waiting, self._last = False, time.monotonic()
        if len(self._content) >= PART:
            self._number, self._content = self._number + 1, b""

    def cut_back(self, step: int) -> None:
        """Delete what follows `step`, the newest first, and go on with the part that holds it."""
        self._number, self._content = 0, b""
        for name in reversed(self._folder.names()):
            part = self._folder / name
            lines = (old := part.read_bytes()).splitlines(keepends=True)
            content = b"".join(line for line in lines if _stands(line, step))
            if not content:
                part.unlink()
                continue
            if content != old:
                part.write_bytes(content)
            self._number, self._content = int(part.name.partition(".")[0]), content
            return


def _folder(path: Object) -> Object:
    """Where the parts of metrics.jsonl are."""
    return path.with_name(path.name.removesuffix(".jsonl"))


def _whole(path: Path) -> bytes:
    if isinstance(path, Object):
        folder = _folder(path)
        return b"".join(read_all(folder / name for name in folder.names()))
    return path.read_bytes() if path.exists() else b""


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file that have a step, in order; none if it is missing."""
    lines = _whole(located(path)).splitlines(keepends=True)
    return [json.loads(line) for line in lines if _stands(line, math.inf)]


def _stands(line: bytes, last: float) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last
    except (ValueError, TypeError, KeyError):
        return False


def _tensorboardx() -> ModuleType:
    """Without PyTorch: it would import that wherever it is installed, for seconds, for nothing."""
    if "torch" in sys.modules:
        return require("tensorboardX")
    sys.modules["torch"] = None  # an import of it fails, as where it is not installed
    try:
        return require("tensorboardX")
    finally:
        del sys.modules["torch"]
