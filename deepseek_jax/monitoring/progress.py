"""One live line on a terminal; a line a log interval anywhere else."""

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO


class Progress:
    """Tells how training goes: step, loss, speed, time left, last evaluation."""

    def __init__(self, num_steps: int, *, log_every: int = 1, stream: TextIO | None = None):
        self._num_steps = num_steps
        self._log_every = log_every
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._bits_per_byte: float | None = None
        self._first: tuple[int, float] | None = None  # step and time of the first call
        self._open = False  # whether the cursor stands behind a live line

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show that `step` steps are done; `metrics` are those that the run log gets."""
        now = time.monotonic()
        if self._first is None:  # speed is measured from here: compiling is over
            self._first = (step, now)
        done, since = step - self._first[0], now - self._first[1]
        left = (self._num_steps - step) * since / done if done else None
        if not self._live and step % self._log_every and step != self._num_steps:
            return
        text = line(step, self._num_steps, metrics, left, self._bits_per_byte)
        if self._live:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r{text}\x1b[K")
            self._open = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def evaluation(self, bits_per_byte: float) -> None:
        """Show this from now on as the last evaluation."""
        self._bits_per_byte = float(bits_per_byte)

    def say(self, text: str) -> None:
        """Print a line of its own above the live line."""
        self._stream.write(("\r\x1b[K" if self._open else "") + text + "\n")
        self._stream.flush()
        self._open = False

    def close(self) -> None:
        """Leave the live line where it is and go below it."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


def line(
    step: int,
    num_steps: int,
    metrics: Mapping[str, Any],
    seconds_left: float | None,
    bits_per_byte: float | None,
) -> str:
    """`step 120/2000  loss 5.1234  8,130 tok/s  MFU 31.2%  ETA 4:05  held-out 2.101 bits/byte`."""
    parts = [f"step {step}/{num_steps}"]
    if metrics.get("loss") is not None:
        parts.append(f"loss {float(metrics['loss']):.4f}")
    if metrics.get("tokens_per_second") is not None:
        parts.append(f"{float(metrics['tokens_per_second']):,.0f} tok/s")
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {100 * float(metrics['mfu']):.1f}%")
    if seconds_left is not None:
        parts.append(f"ETA {clock(seconds_left)}")
    if bits_per_byte is not None:
        parts.append(f"held-out {bits_per_byte:.3f} bits/byte")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """`4:05`, `1:02:03` or `3 d 04 h`."""
    whole = max(0, round(seconds))
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
