"""Rows of training data: stretches of documents, drawn from a mixture; each depends on its number.

An epoch's stream is its documents in an order drawn from (seed, epoch), each [bos] tokens [eos].
A row is a stretch of `sequence_length` tokens of it, and the rows come in a drawn order too. A
document may go on in another row: its targets look past the row's end, so every token of a
document but its first is a target exactly once an epoch.

Row i of a mixture draws its source from (seed, i) and weights(i), and takes the row of that source
whose number is the source's count among the rows before i: nothing but i is remembered.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.sources import Weighted

Batch = dict[str, np.ndarray]
CHUNK = 1 << 16  # rows whose sources are drawn at once


class _Epoch(NamedTuple):
    starts: np.ndarray  # [n + 1]: where each document begins in the stream, and the stream's end
    shift: np.ndarray  # [n]: from a place in the stream to that in the corpus
    rows: np.ndarray  # [num_rows]: the drawn order of the rows


class Rows:
    """One side of a corpus as rows: with a seed the training side, with None the held-out side.

    The held-out side has one epoch, in its own order, and ends before `limit` tokens are exceeded.
    """

    def __init__(
        self,
        corpus: Corpus,
        fraction: float,
        length: int,
        num_targets: int,
        seed: int | None,
        limit: int | None = None,
    ):
        self._arguments = (corpus, fraction, length, num_targets, seed, limit)
        self.corpus, self.length, self.num_targets, self._seed = corpus, length, num_targets, seed
        self.documents = corpus.documents(fraction, training=seed is not None)
        if limit is not None:
            self.documents = self.documents[np.cumsum(corpus.lengths[self.documents]) <= limit]
        self.num_tokens = int(corpus.lengths[self.documents].sum())
        self.num_bytes = int(corpus.num_bytes[self.documents].sum())
        self.num_rows = -(-self.num_tokens // length)
        self._epoch = functools.lru_cache(2)(self._drawn)  # a batch may span two

    def __reduce__(self):
        return Rows, self._arguments

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows by ascending number [B]; past the held-out side's end they are only padding."""
        if self._seed is None:
            return self._cut(self._epoch(0), numbers)
        epochs = numbers // self.num_rows
        cut = []
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            cut.append(self._cut(epoch, epoch.rows[numbers[epochs == number] % self.num_rows]))
        return _joined(cut)

    def _cut(self, epoch: _Epoch, rows: np.ndarray) -> Batch:
        length, starts = self.length, rows[:, None] * self.length
        at = starts + np.arange(length + self.num_targets)  # [B, T + targets]: places in the stream
        inside = at < epoch.starts[-1]
        at = np.minimum(at, epoch.starts[-1] - 1)
        document = np.searchsorted(epoch.starts, at, side="right") - 1
        tokens = self.corpus.tokens[at + epoch.shift[document]].astype(np.int32) * inside
        ahead = np.arange(length)[:, None] + np.arange(1, self.num_targets + 1)  # [T, targets]
        same = inside[:, ahead] & (document[:, ahead] == document[:, :length, None])
        real, document = inside[:, :length], document[:, :length]
        positions = at[:, :length] - np.maximum(epoch.starts[document], starts)
        return {
            "tokens": tokens[:, :length],
            "targets": tokens[:, ahead] * same,
            "weights": same.astype(np.float32),
            "segments": ((document - document[:, :1] + 1) * real).astype(np.int32),
            "positions": (positions * real).astype(np.int32),
        }

    def _drawn(self, number: int) -> _Epoch:
        documents, rows = self.documents, np.arange(self.num_rows)
        if self._seed is not None:
            documents = documents[drawn_order(len(documents), self._seed, 2 * number)]
            rows = drawn_order(self.num_rows, self._seed, 2 * number + 1)
        starts = np.concatenate([[0], np.cumsum(self.corpus.lengths[documents])])
        return _Epoch(starts, self.corpus.starts[documents] - starts[:-1], rows)


class Mixed:
    """The training rows of several sources as one endless sequence.

    `rows` are of any kind that makes batches of ascending numbers, as `Rows` does.
    """

    def __init__(self, rows: Sequence[Any], parts: Sequence[Weighted], seed: int):
        self.rows, self._parts, self._seed = rows, parts, seed
        self._chunk = functools.lru_cache(2)(self._numbered)
        # How many rows of a chunk each part has.
        self._counts = functools.cache(lambda c: np.bincount(self._draw(c), minlength=len(parts)))

    def __reduce__(self):
        return Mixed, (self.rows, self._parts, self._seed)

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows by ascending number [B]."""
        if len(self.rows) == 1:  # every row is its own: nothing is drawn or copied
            return self.rows[0].batch(numbers)
        part, row = self.origin(numbers)
        found = _joined([self.rows[which].batch(row[part == which]) for which in np.unique(part)])
        back = np.argsort(np.argsort(part, kind="stable"))
        return {name: values[back] for name, values in found.items()}

    def origin(self, numbers: np.ndarray) -> np.ndarray:
        """The part of each row (by ascending number [B]) and its number within that part [2, B]."""
        chunks = numbers // CHUNK
        found = [self._chunk(int(c))[:, numbers[chunks == c] % CHUNK] for c in np.unique(chunks)]
        return np.concatenate(found, axis=1)

    def _numbered(self, chunk: int) -> np.ndarray:
        """The part of every row of a chunk, and the row's number within that part [2, CHUNK]."""
        parts = self._draw(chunk)
        found = np.stack([parts, parts])
        for which in range(len(self._parts)):
            before = sum(self._counts(earlier)[which] for earlier in range(chunk))
            found[1, parts == which] = before + np.arange(np.sum(parts == which))
        return found

    def _draw(self, chunk: int) -> np.ndarray:
        """The part of every row of a chunk."""
        numbers = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
        ends = np.cumsum([part.weights(numbers) for part in self._parts], axis=0)
        uniform = (drawn_bits(numbers, self._seed, len(self._parts)) >> np.uint64(11)) * 2.0**-53
        return np.sum(uniform * ends[-1] >= ends[:-1], axis=0)


def _joined(batches: list[Batch]) -> Batch:
    """The rows of several batches, one after another."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@functools.lru_cache(4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's `count` examples, int64 [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def stacked(rows: Sequence[Any]) -> Any:
    """Rows, arrays or dicts of such, as one batch."""
    if not isinstance(rows[0], dict):
        return np.stack(rows)
    return {name: stacked([row[name] for row in rows]) for name in rows[0]}


def drawn_order(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) drawn from the key: our own, so that no library changes it."""
    return np.argsort(drawn_bits(np.arange(count), *key), kind="stable")


def drawn_bits(numbers: np.ndarray, *key: int) -> np.ndarray:
    """64 random bits for each number [n] and key (splitmix64), uint64 [n]."""
    bits = np.zeros(1, np.uint64)
    for part in (*key, numbers):
        bits = (bits ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits
