"""One live line on a terminal; a line a log interval anywhere else."""

import datetime
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

SHOWN = {
    "loss": "loss {:.4f}",
    "guessing_loss": "(guessing {:.2f})",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.1%}",
    "left": "ETA {}",
    "bits_per_byte": "{:.3f} bits/byte",
    "recall_at_10": "recall@10 {:.1%}",
    "accuracy": "accuracy {:.1%}",
    "character_error_rate": "characters wrong {:.1%}",
}
# What an evaluation found, as the last line of a run says it: those that there are.
FOUND = {
    "bits_per_byte": "{:.4f} bits per byte",
    "recall_at_10": "recall@10 {:.4f}",
    "chance_at_10": "by chance {:.4f}",
    "character_error_rate": "character error rate {:.4f}",
    "word_error_rate": "word error rate {:.4f}",
    "accuracy": "accuracy {:.4f}",
    "majority_accuracy": "of the most frequent answer {:.4f}",
    "perplexity": "perplexity {:.1f}",
    "auroc": "AUROC {:.4f}",
    "sensitivity@0.9": "sensitivity at specificity 0.9 {:.4f}",
    "calibration_error": "calibration error {:.4f}",
    "loss": "loss {:.4f}",
}


def summary(found: Mapping[str, Any]) -> str:
    """The figures of an evaluation that say how good a model is."""
    return ", ".join(text.format(found[name]) for name, text in FOUND.items() if name in found)


class Progress:
    """Tells how training goes: step, loss, speed, time left, last evaluation."""

    def __init__(self, num_steps: int, *, log_every: int = 1, stream: TextIO | None = None):
        self.num_steps, self._log_every = num_steps, log_every
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._open = False  # whether the cursor stands behind a live line
        self._last: dict[str, Any] = {}
        self._start: tuple[int, float] | None = None  # step and time of the first call

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show that `step` steps are done; what `metrics` lacks stays as it was shown last."""
        now = time.monotonic()
        self._start = first, began = self._start or (step, now)  # by the first call, it is compiled
        self._last |= {key: float(metrics[key]) for key in SHOWN if metrics.get(key) is not None}
        if not self._live and step % self._log_every and step != self.num_steps:
            return
        if step > first:
            left = (self.num_steps - step) * (now - began) / (step - first)
            self._last["left"] = datetime.timedelta(seconds=round(left))
        known = [text.format(self._last[key]) for key, text in SHOWN.items() if key in self._last]
        text = "  ".join([f"step {step}/{self.num_steps}", *known])
        if self._live:
            text = f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K"
        self._open = self._live
        print(text, end="" if self._live else "\n", file=self._stream, flush=True)

    def evaluation(self, found: Mapping[str, float]) -> None:
        """Show this from now on as the last evaluation."""
        names = ("bits_per_byte", "recall_at_10", "accuracy", "character_error_rate")
        shown = [name for name in names if name in found]
        self._last |= {name: float(found[name]) for name in shown}

    def say(self, text: str) -> None:
        """Print a line of its own above the live line."""
        print(("\r\x1b[K" if self._open else "") + text, file=self._stream, flush=True)
        self._open = False

    def close(self) -> None:
        """Leave the live line where it is and go below it."""
        if self._open:
            print(file=self._stream, flush=True)
            self._open = False
