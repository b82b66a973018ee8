"""Which source a training row comes from, by weights that may move with the row's number.

Row i draws its source from (seed, i) and weights(i), and takes the row of that source whose number
is the source's count among the rows before i: nothing but i is remembered.
"""

import functools
import threading

import numpy as np

from deepseek_jax.data.packing import Batch, Rows, drawn_bits, join
from deepseek_jax.data.sources import Part

CHUNK = 1 << 16


class Mixed:
    """The training rows of several sources as one endless sequence."""

    def __init__(self, rows: list[Rows], parts: tuple[Part, ...], seed: int):
        self.rows, self._parts, self._seed = rows, parts, seed
        self._before = [np.zeros(len(parts), np.int64)]  # counts of rows before each chunk
        self._chunk = functools.lru_cache(2)(self._counted)
        self._lock = threading.Lock()

    def __reduce__(self):
        return Mixed, (self.rows, self._parts, self._seed)

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows by ascending number [B]."""
        part, row = self.origin(numbers)
        found = [self.rows[which].batch(row[part == which]) for which in np.unique(part)]
        if len(found) == 1:
            return found[0]
        back = np.argsort(np.argsort(part, kind="stable"))
        return {name: values[back] for name, values in join(found).items()}

    def origin(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each row [B], and the row's number within that part [B]."""
        part, row = np.empty_like(numbers), np.empty_like(numbers)
        for chunk in np.unique(numbers // CHUNK):
            here = numbers // CHUNK == chunk
            parts, rows = self._chunk(int(chunk))
            part[here], row[here] = parts[numbers[here] % CHUNK], rows[numbers[here] % CHUNK]
        return part, row

    def _counted(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of every row of a chunk, and the row's number within that part."""
        with self._lock:
            while len(self._before) <= chunk:
                counts = np.bincount(self._draw(len(self._before) - 1), minlength=len(self._parts))
                self._before.append(self._before[-1] + counts)
        parts, rows = self._draw(chunk), np.empty(CHUNK, np.int64)
        for which, before in enumerate(self._before[chunk]):
            rows[parts == which] = before + np.arange(np.sum(parts == which))
        return parts, rows

    def _draw(self, chunk: int) -> np.ndarray:
        """The part of every row of a chunk."""
        numbers = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
        ends = np.cumsum([part.weights(numbers) for part in self._parts], axis=0)
        uniform = (drawn_bits(numbers, self._seed, len(self._parts)) >> np.uint64(11)) * 2.0**-53
        return np.sum(uniform * ends[-1] >= ends[:-1], axis=0)
