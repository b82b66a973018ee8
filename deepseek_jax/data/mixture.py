"""Which source a training row comes from, by weights that may move with the row's number.

Row i draws its source from (seed, i) and weights(i), and takes the row of that source whose number
is the source's count among the rows before i: nothing but i is remembered.
"""

import threading

import numpy as np

from deepseek_jax.data.packing import Batch, Rows, drawn_bits, empty_batch, fill
from deepseek_jax.data.sources import Part

CHUNK = 1 << 16


class Mixed:
    """The rows of several sources as one sequence of rows."""

    def __init__(self, rows: list[Rows], parts: tuple[Part, ...], seed: int):
        self._rows, self._parts, self._seed = rows, parts, seed
        self._reset()

    def _reset(self) -> None:
        self._before = [np.zeros(len(self._parts), np.int64)]  # counts before each chunk
        self._last: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        self._lock = threading.Lock()

    def __getstate__(self):
        return self._rows, self._parts, self._seed

    def __setstate__(self, state):
        self._rows, self._parts, self._seed = state
        self._reset()

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows by number [B] as a batch."""
        part, row = self.origin(numbers)
        first = self._rows[part[0]].batch(row[part == part[0]])
        if (part == part[0]).all():
            return first
        out = empty_batch(len(numbers), *first["targets"].shape[1:])
        for which in np.unique(part):
            fill(out, part == which, self._rows[which].batch(row[part == which]))
        return out

    def origin(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each row [B], and the row's number within that part [B]."""
        chunks = numbers // CHUNK
        part, row = np.empty_like(numbers), np.empty_like(numbers)
        for chunk in np.unique(chunks):
            here = chunks == chunk
            parts, rows = self._chunk(int(chunk))
            part[here], row[here] = parts[numbers[here] % CHUNK], rows[numbers[here] % CHUNK]
        return part, row

    def _chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            while len(self._before) <= chunk:
                counts = np.bincount(self._draw(len(self._before) - 1), minlength=len(self._parts))
                self._before.append(self._before[-1] + counts)
            if self._last[0] != chunk:
                parts = self._draw(chunk)
                rows = np.empty(CHUNK, np.int64)
                for which, before in enumerate(self._before[chunk]):
                    mine = parts == which
                    rows[mine] = before + np.arange(np.count_nonzero(mine))
                self._last = (chunk, parts, rows)
            return self._last[1:]

    def _draw(self, chunk: int) -> np.ndarray:
        """The part of every row of a chunk."""
        numbers = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
        ends = np.cumsum([_weights(part, numbers) for part in self._parts], axis=0)
        uniform = (drawn_bits(numbers, self._seed, -1) >> np.uint64(11)) * 2.0**-53
        return np.sum(uniform * ends[-1] >= ends[:-1], axis=0)


def _weights(part: Part, rows: np.ndarray) -> np.ndarray:
    if not part.schedule:
        return np.full(len(rows), part.weight)
    at, weights = zip(*part.schedule, strict=True)
    return np.interp(rows, at, weights)
