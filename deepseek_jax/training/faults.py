"""What several processes need to know of each other: heartbeats, a watchdog, stops, stragglers.

Each process keeps a heartbeat file; a launcher reads there who is alive and how far it is. Signals
and each process's own time travel in the train step itself, as rows that it hands to everyone: all
processes then stop after one and the same step, and no further round over the network is needed.
"""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core.storage import Path, in_bucket, located, nearby

HUNG = 75  # the exit code of a process whose watchdog ended it: try again (sysexits' EX_TEMPFAIL)
TICK = 0.1  # seconds between two looks at the clock; the file is written at every tenth
PATIENCE = 3  # logged steps in a row until a straggler is named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """How failures are noticed, and what is kept near for them."""

    watchdog_seconds: float = 600.0
    """A step that takes longer ends the process with exit code 75, for its launcher to restart.
    Compiling, evaluating and saving do not count. 0: never."""
    straggler_factor: float = 1.25
    """A process is named when for 3 logged steps it alone made steps this many times longer."""
    heartbeat_dir: str = ""
    """Where processes write <index>.json; empty: $HEARTBEAT_DIR, or heartbeats in the run_dir (of a
    run in a bucket: on the host's own disk, in $TMPDIR)."""

    lease_seconds: float = 60.0
    """How long after its last sign of life a run in a bucket may be taken over."""

    local_save_every: int = 0
    """Steps between emergency checkpoints in local_dir, besides the durable ones; 0: none."""
    local_dir: str = ""
    """A folder on each host's own disk. After a fault the newest checkpoint counts, local or not; a
    local one only if every process of the same mesh finds its part whole."""

    def __post_init__(self):
        if self.local_save_every < 0 or (self.local_save_every and not self.local_dir):
            raise ValueError(
                f"faults.local_save_every ({self.local_save_every}) must be at least 0, and needs "
                f"a folder on the host's own disk in local_dir ({self.local_dir!r})."
            )
        if self.watchdog_seconds < 0 or self.straggler_factor <= 1:
            raise ValueError(
                f"faults.watchdog_seconds ({self.watchdog_seconds}) must be at least 0, and "
                f"straggler_factor ({self.straggler_factor}) above 1."
            )
        if self.lease_seconds <= 0 or in_bucket(self.heartbeat_dir) or in_bucket(self.local_dir):
            raise ValueError(
                f"faults.lease_seconds ({self.lease_seconds}) must be above 0, heartbeat_dir "
                f"({self.heartbeat_dir!r}) and local_dir ({self.local_dir!r}) folders on a disk."
            )

    def folder(self, run_dir: str | Path) -> pathlib.Path:
        """The heartbeats' directory of a run."""
        given = self.heartbeat_dir or os.environ.get("HEARTBEAT_DIR")
        return pathlib.Path(given) if given else nearby(located(run_dir), "heartbeats")


class Heartbeat:
    """This process's heartbeat file, rewritten by a thread, and the watchdog over its steps."""

    def __init__(self, directory: pathlib.Path, seconds: float):
        self._file = directory / f"{jax.process_index()}.json"
        self._seconds, self._tick = seconds, min(TICK, (seconds or 60.0) / 4)
        self._step, self._waited, self._watched = -1, 0.0, False
        self.stalled = 0.0
        """Seconds that this process as a whole did not run: stopped, or given no processor."""
        self._over, self._main = threading.Event(), threading.main_thread().ident
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def step(self, step: int) -> None:
        """`step` is done: the next one is being waited for."""
        self._step, self._waited, self._watched = step, 0.0, True

    def busy(self) -> None:
        """Something else than steps begins; the watchdog rests until the next `step`."""
        self._watched = False

    def close(self) -> None:
        """End the thread; the file stays and promises no more."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        last = written = time.monotonic()
        self._write()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            if now - last > 2 * self._tick:
                self.stalled += now - last - self._tick
            # Not more than two ticks: while this process is stopped the others do not hang.
            self._waited += min(now - last, 2 * self._tick)
            last = now
            if now - written >= min(1.0, 10 * self._tick):
                self._write()
                written = now
            if self._watched and 0 < self._seconds < self._waited:
                self._end()
        self._seconds = 0.0  # no further sign of life is to be expected
        self._write()

    def _write(self) -> None:
        beat = {"process": jax.process_index(), "host": socket.gethostname(), "pid": os.getpid()}
        beat |= {"step": self._step, "time": time.time(), "watchdog_seconds": self._seconds}
        temporary = self._file.with_suffix(".tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(beat))
            temporary.replace(self._file)
        except OSError:
            pass  # a full disk must not end a run through this

    def _end(self) -> None:
        frame = sys._current_frames().get(self._main)
        where = "".join(traceback.format_stack(frame)[-6:])
        print(
            f"process {jax.process_index()} on {socket.gethostname()} hangs: no step for "
            f"{self._waited:.0f} s after step {self._step}; it is here, and ends with exit code "
            f"{HUNG}:\n{where}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(HUNG)


class Peers:
    """What the processes of a run tell each other in every step; a run of one has no one to tell.

    A process's word is its caught signal and the seconds that it spent by itself on the step
    before: fetching, placing and dispatching, in which nobody waits for another, and not running.
    """

    def __init__(self, mesh: Mesh, heartbeat: Heartbeat):
        self._mesh, self._heartbeat = mesh, heartbeat
        self._alone = jax.process_count() == 1
        owners = [device.process_index for device in mesh.devices.flat]
        self._firsts = np.unique(owners, return_index=True)[1]
        self._stop, self._suspect, self._times = 0, -1, 0
        self._own, self._stalled = 0.0, heartbeat.stalled
        self._heard: list[np.ndarray] = []  # since the last logged step

    def telling(self, step: Callable) -> Callable:
        """`step`, which now also takes `words` and hands all of them to every process."""
        if self._alone:
            return step

        def run(state, batch, words):
            state, metrics = step(state, batch)
            whole = NamedSharding(self._mesh, PartitionSpec())
            return state, metrics | {"words": jax.lax.with_sharding_constraint(words, whole)}

        return run

    def words(self, caught: list[int]) -> tuple[jax.Array, ...]:
        """This process's further arguments of a step."""
        if self._alone:
            return ()
        stalled, self._stalled = self._heartbeat.stalled - self._stalled, self._heartbeat.stalled
        mine = np.float32([max(caught, default=0), self._own + stalled])
        rows = np.tile(mine, (len(self._mesh.local_devices), 1))
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        return (jax.make_array_from_process_local_data(sharding, rows),)

    def spent(self, seconds: float) -> None:
        """Note this process's own time of a step just dispatched."""
        self._own = seconds

    def hear(self, metrics: dict[str, Any]) -> None:
        """Take out of a finished step's metrics what the others said."""
        if not self._alone:
            said = np.asarray(metrics.pop("words"))[self._firsts]
            self._stop = max(self._stop, int(said[:, 0].max()))
            self._heard.append(said[:, 1])

    def stop(self, caught: list[int]) -> int:
        """The signal to stop for now, or 0; the same for all processes."""
        return max(caught, default=0) if self._alone else self._stop

    def straggler(self, seconds: float, factor: float) -> tuple[dict[str, Any], str]:
        """At a logged step, of `seconds` a step: what to record, and a sentence if one is named."""
        if not self._heard:
            return {}, ""
        own, self._heard = np.mean(self._heard, 0), []
        slowest = int(own.argmax())
        others = float(np.median(np.delete(own, slowest)))
        guilty = own[slowest] - others > seconds * (1 - 1 / factor)
        self._times = self._times + 1 if guilty and slowest == self._suspect else int(guilty)
        self._suspect = slowest if guilty else -1
        record = {"own_seconds": own.tolist(), "straggler": None}
        if self._times < PATIENCE:
            return record, ""
        said = f"process {slowest} is a straggler: {own[slowest]:.3f} s of a step's {seconds:.3f} s"
        return record | {"straggler": slowest}, f"{said} are its own, {others:.3f} s of the others'"


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that gets the first SIGTERM or SIGINT; after it signals act as by default."""
    caught: list[int] = []
    watched = (signal.SIGTERM, signal.SIGINT)

    def note(number, _):
        caught.append(number)
        for each in watched:
            signal.signal(each, signal.SIG_DFL)

    usual = [signal.signal(each, note) for each in watched]
    try:
        yield caught
    finally:
        for each, handler in zip(watched, usual, strict=True):
            signal.signal(each, handler)
