"""Start N training processes on this machine and keep the run going: `local.sh` calls it.

When a process dies or shows no sign of life, the others would wait for it in a collective: all are
killed and started again on a fresh port, and continue from the last save. Exit codes of a process:

    0         complete; the others are waited for
    2         bad input: no restart
    128 + n   stopped by a signal it was sent, everything saved: no restart
    75        its watchdog says that a step hung: restart
    others    it crashed or was killed: restart

It gives up after PATIENCE restarts in a row without a new step, of which a crash counts CRASH.
DRY_RUN=1 prints the processes' commands instead.
"""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from deepseek_jax.core.memory import huge_pages

PATIENCE, CRASH = 40, 8  # a crash is likely to repeat itself, a kill comes from outside
STOPS = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)
HUNG = 75
SILENT = 300.0  # seconds until the first heartbeat
SLACK = 5.0  # seconds that a heartbeat may be late: the machine is busy
BIND = [sys.executable, "-ISc", """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
""", str(os.getpid())]  # fmt: skip  # a launcher that is killed takes its processes along


def say(text: str) -> None:
    """Print a line of the launcher's own."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


class Process:
    """One training process, in a process group of its own, and its heartbeats."""

    def __init__(self, rank: int, environment: dict[str, str], arguments: list[str]):
        self.rank, self.step = rank, -1
        self._file = pathlib.Path(environment["HEARTBEAT_DIR"], f"{rank}.json")
        self._beat, self._limit, self.silent = None, SILENT, 0.0
        self._popen = subprocess.Popen(
            [*BIND, *command(arguments)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._popen.pid

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._popen.poll()

    def look(self, seconds: float) -> bool:
        """Read the heartbeat, `seconds` after the last look; whether it is missing for too long."""
        self.silent += seconds
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = self._file.read_text()
            if text != self._beat:
                beat = json.loads(text)
                self.step, self._limit = beat["step"], beat["watchdog_seconds"]
                self._beat, self.silent = text, 0.0
        return self.code is None and 0 < self._limit < self.silent - SLACK

    def send(self, number: int) -> None:
        """Pass a signal on."""
        if self.code is None:
            self._popen.send_signal(number)

    def end(self) -> None:
        """Kill it and what it started, and wait for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def fate(self) -> str:
        """What became of it, in words."""
        if (code := self.code) is None:
            state = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            what = "stopped, and " if state in "Tt" else ""
            how = f"is {what}silent for {self.silent:.0f} s"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = "hung" if code == HUNG else f"ended with exit code {code}"
        where = f"after step {self.step}" if self.step >= 0 else "before its first step"
        return f"process {self.rank} (pid {self.pid}) {how} {where}"


def command(arguments: list[str]) -> list[str]:
    """What a process runs."""
    return [sys.executable, "-m", "deepseek_jax.train", *arguments]


def environments(count: int, port: int, folder: pathlib.Path) -> list[dict[str, str]]:
    """What each process finds in its environment; the user's own choice of a cache stays."""
    every = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "HEARTBEAT_DIR": str(folder / "heartbeats"),
    }
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a restart need not compile again
        every["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        every["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return [every | huge_pages() | {"JAX_PROCESS_ID": str(rank)} for rank in range(count)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def settle(processes: list[Process], seconds: float) -> None:
    """Give the others some time to end by themselves."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(each.code is None for each in processes):
        time.sleep(0.05)


def watch(processes: list[Process], asked: list[int]) -> int | None:
    """Wait for an attempt's end, passing signals on: the run's exit code; None: start again."""
    last, passed = time.monotonic(), 0
    while True:
        time.sleep(0.1)
        for number in asked[passed:]:
            for each in processes:
                each.send(number)
        passed = len(asked)
        now = time.monotonic()
        # At most a second: when this launcher was stopped itself, nobody was silent.
        quiet = [each for each in processes if each.look(min(now - last, 1.0))]
        last, codes = now, [each.code for each in processes]
        if 2 in codes:
            settle(processes, 3)  # the others may say what is wrong as well
            return 2
        failed = [code for code in codes if code not in (None, 0, *STOPS)]
        stopped = [code for code in codes if code in STOPS]
        if asked or stopped:
            if not any(codes) and None not in codes:
                return 0  # it was complete before the signal came
            lost = quiet or failed or min(stopped, default=0) < 0  # the others cannot save
            if lost or None not in codes:
                return 128 + (asked[0] if asked else abs(stopped[0]) % 128)
        elif quiet or failed:
            explain(processes, quiet, hung=HUNG in codes)
            return None
        elif None not in codes:
            return 0


def explain(processes: list[Process], quiet: list[Process], *, hung: bool) -> None:
    """Say whose fault a restart is."""
    if hung and not quiet:  # that was the first of those that wait for the guilty one
        settle(processes, 3)
        for each in processes:
            each.look(3)
        quiet = [each for each in processes if each.code is None and each.silent > 3]
    for each in quiet or [each for each in processes if each.code]:
        say(each.fate())


def run(count: int, arguments: list[str], folder: pathlib.Path, asked: list[int]) -> int:
    """Attempts until one decides the run; its exit code."""
    best, weary = -1, 0
    while True:
        shutil.rmtree(folder / "heartbeats", ignore_errors=True)
        processes: list[Process] = []
        try:
            for environment in environments(count, free_port(), folder):
                processes.append(Process(len(processes), environment, arguments))
            code = watch(processes, asked)
            crashed = max(0, *(each.code or 0 for each in processes))
            killed = any((each.code or 0) < 0 for each in processes)
        finally:
            for each in processes:
                each.end()
        if code is not None:
            return code
        if asked:
            return 128 + asked[0]
        reached = max(each.step for each in processes)
        weary = 0 if reached > best else weary + (1 if killed or crashed == HUNG else CRASH)
        best = max(best, reached)
        if weary >= PATIENCE:
            say(f"giving up: no step after {best} in the last restarts")
            return crashed or 1
        say(f"starting all {count} processes again")


def main(argv: list[str]) -> int:
    """The exit code of `N arguments...`."""
    if not argv or not argv[0].isdecimal() or int(argv[0]) < 1:
        print("error: give a number of processes: launch/local.sh N --config ...", file=sys.stderr)
        return 2
    count, arguments = int(argv[0]), argv[1:]
    if os.environ.get("DRY_RUN"):
        for environment in environments(count, 9876, pathlib.Path("$TMPDIR")):
            words = [f"{name}={value}" for name, value in environment.items()]
            print(*words, shlex.join(command(arguments)))
        return 0
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    with tempfile.TemporaryDirectory(prefix="launch-", ignore_cleanup_errors=True) as folder:
        return run(count, arguments, pathlib.Path(folder), asked)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
