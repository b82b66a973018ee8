"""Who may write a run in a bucket: a lease, as objects cannot be locked.

run.lease says who holds it; every put of it goes onto the generation that was read, so that of two
only one succeeds. The holder renews it in the background. Whoever finds it held watches it: once
renewed, it is refused; left alone for as long as it lasts, it is taken (at once where the holder
was a process of this machine that is gone, or its time is long over). So no two clocks are compared
but roughly. A holder that could not renew it in time, or finds another's, ends its process.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import Object

LEASE = "run.lease"
LOST, OFFLINE = 2, 75  # exit codes: another trains here; try again
APART = 10.0  # seconds that two machines' clocks may differ


def _machine() -> str:
    """What two processes share exactly if they see each other's process ids."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return secrets.token_hex(8)
    return f"{boot.read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"


class Lease:
    """The lease of a run that this process holds, renewed by a thread until `close`.

    Raises InputError when another process holds and renews it.
    """

    def __init__(self, run_dir: Object, seconds: float):
        self._place, self._seconds = run_dir / LEASE, seconds
        self._token = secrets.token_hex(8)
        self._said = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        self._until = 0.0  # by this process's own clock
        self._generation = self._acquired()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _content(self) -> bytes:
        times = {"seconds": self._seconds, "expires": time.time() + self._seconds}
        return json.dumps(self._said | times | {"token": self._token}).encode()

    def _acquired(self) -> bytes:
        """The generation of our own lease, once it stands."""
        watched, since = b"", 0.0
        while True:
            content, generation = self._place.read()
            theirs = _read(content)
            if theirs.get("token") == self._token:  # our put succeeded, its answer was lost
                return generation
            if theirs and watched not in (b"", generation):
                raise InputError(
                    f"another process ({_who(theirs)}) is training in {self._place.parent}; stop "
                    "it or choose another run directory"
                )
            left = self._left(theirs)
            if not watched:
                since = time.monotonic()
                if left:
                    run, most = self._place.parent, f"{left:.0f} s at most"
                    why = f"{run}: held by {_who(theirs)}; waiting for its sign of life, {most}"
                    print(why, file=sys.stderr, flush=True)
            watched = generation
            if time.monotonic() - since < left:
                time.sleep(min(1.0, self._seconds / 20))
                continue
            self._until = time.monotonic() + self._seconds
            if taken := self._place.put_if(self._content(), generation):
                return taken

    def _left(self, theirs: dict) -> float:
        """Seconds to watch a lease for before it counts as given up; never more than it lasts."""
        here = theirs.get("machine") == self._said["machine"]
        if not theirs or (here and not pathlib.Path(f"/proc/{theirs['pid']}").exists()):
            return 0.0
        return max(0.0, min(theirs["seconds"], theirs["expires"] + APART - time.time()))

    def _renew(self) -> None:
        """Put the lease again and again; the process ends when that is no longer possible."""
        due = time.monotonic() + self._seconds / 4
        while not self._over.wait(min(1.0, self._seconds / 20)):
            now = time.monotonic()
            if now > self._until:
                self._end(OFFLINE, f"could not be renewed for {self._seconds:.0f} s")
            if now < due:
                continue
            with contextlib.suppress(OSError, InputError, TimeoutError):  # the next try may do
                limit = self._seconds / 4
                put = self._place.put_if(self._content(), self._generation, timeout=limit)
                if put is None:
                    content, put = self._place.read(timeout=limit)
                    if (theirs := _read(content)).get("token") != self._token:
                        self._end(LOST, f"was taken from it: {_who(theirs)}")
                self._generation, due = put, now + self._seconds / 4
                self._until = now + self._seconds

    def _end(self, code: int, why: str) -> None:
        if not self._over.is_set():
            line = f"error: {self._place}: the lease {why}; this process ends, and writes no more"
            print(line, file=sys.stderr, flush=True)
            os._exit(code)

    def close(self) -> None:
        """Give the lease up, so that the next run need not wait for its end."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError, InputError):
            self._place.put_if(None, self._generation)


def _read(content: bytes | None) -> dict:
    """What a lease says; empty where there is none, or what stands there is not one."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found = json.loads(content or b"")
        kinds = {"host": str, "pid": int, "token": str, "seconds": float, "expires": float}
        return {name: kind(found[name]) for name, kind in kinds.items()} | {
            "machine": found.get("machine")
        }
    return {}


def _who(theirs: dict) -> str:
    return f"pid {theirs['pid']} on {theirs['host']}" if theirs else "it is gone"
