"""Rows of training data cut from a stream of documents; every row is a function of its number.

An epoch's stream is its documents in an order drawn from (seed, epoch), each [bos] tokens [eos].
A row is a stretch of `sequence_length` tokens of it, and the rows come in a drawn order too. A
document may go on in another row: its targets look past the row's end, so every token of a
document but its first is a target exactly once an epoch.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.corpus import Corpus, held_out

Batch = dict[str, np.ndarray]


class _Epoch(NamedTuple):
    documents: np.ndarray  # [n]: in the stream's order
    starts: np.ndarray  # [n + 1]: where each begins in the stream, and the stream's end
    rows: np.ndarray | None  # [num_rows]: the drawn order of the rows; None: as they stand


class Rows:
    """One side of a corpus as rows; the held-out side stands in its own order, undrawn."""

    def __init__(
        self,
        corpus: Corpus,
        fraction: float,
        sequence_length: int,
        num_targets: int,
        seed: int | None,
    ):
        """Rows of the training side, or with seed None of the held-out side."""
        self._arguments = (corpus, fraction, sequence_length, num_targets, seed)
        mask = held_out(corpus.hashes, fraction)
        self.documents = np.flatnonzero(mask if seed is None else ~mask)
        self.num_tokens = int(corpus.lengths[self.documents].sum())
        self.num_rows = -(-self.num_tokens // sequence_length)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the side's documents."""
        return int(self._arguments[0].num_bytes[self.documents].sum())

    def token_lists(self) -> Iterator[np.ndarray]:
        """The ids of every document of the side, [bos] and [eos] included."""
        corpus = self._arguments[0]
        for document in self.documents:
            start = corpus.starts[document]
            yield corpus.tokens[start : start + corpus.lengths[document]]

    def __reduce__(self):
        return Rows, self._arguments

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows by number [B] as a batch; numbers past an epoch go on in the next one.

        Rows past the end of the held-out side are empty (padding only).
        """
        _, _, length, num_targets, seed = self._arguments
        epochs, rows = np.divmod(numbers, self.num_rows)
        if seed is None:
            epochs, rows = np.zeros_like(rows), numbers
        pieces = [self._cut(int(e), rows[epochs == e]) for e in np.unique(epochs)]
        if len(pieces) == 1:
            return pieces[0]
        out = empty_batch(len(numbers), length, num_targets)
        for epoch, piece in zip(np.unique(epochs), pieces, strict=True):
            fill(out, epochs == epoch, piece)
        return out

    def _cut(self, number: int, rows: np.ndarray) -> Batch:
        corpus, _, length, num_targets, _ = self._arguments
        epoch = self._epoch(number)
        if epoch.rows is not None:
            rows = epoch.rows[rows]
        starts = rows[:, None] * length
        at = starts + np.arange(length + num_targets)  # [B, T + targets]: places in the stream
        inside = at < epoch.starts[-1]
        document = np.searchsorted(epoch.starts, at, side="right") - 1
        document = np.minimum(document, len(epoch.documents) - 1)
        begin = epoch.starts[document]
        place = corpus.starts[epoch.documents[document]] + (at - begin)
        tokens = np.where(inside, corpus.tokens[np.where(inside, place, 0)], 0).astype(np.int32)
        real = inside[:, :length]
        targets, weights = [], []
        for ahead in range(1, num_targets + 1):
            later = slice(ahead, ahead + length)
            same = inside[:, later] & (document[:, later] == document[:, :length])
            targets.append(np.where(same, tokens[:, later], 0))
            weights.append(same)
        segments = document[:, :length] - document[:, :1] + 1
        positions = at[:, :length] - np.maximum(begin[:, :length], starts)
        return {
            "tokens": tokens[:, :length],
            "targets": np.stack(targets, axis=-1),
            "weights": np.stack(weights, axis=-1).astype(np.float32),
            "segments": np.where(real, segments, 0).astype(np.int32),
            "positions": np.where(real, positions, 0).astype(np.int32),
        }

    def _epoch(self, number: int) -> _Epoch:
        corpus, seed = self._arguments[0], self._arguments[-1]
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) > 1:  # a batch may span two
                    del self._epochs[next(iter(self._epochs))]
                documents, rows = self.documents, None
                if seed is not None:
                    documents = documents[drawn_order(len(documents), seed, 2 * number)]
                    rows = drawn_order(self.num_rows, seed, 2 * number + 1)
                starts = np.concatenate([[0], np.cumsum(corpus.lengths[documents])])
                self._epochs[number] = _Epoch(documents, starts, rows)
            return self._epochs[number]


def empty_batch(num_rows: int, length: int, num_targets: int) -> Batch:
    """Rows of padding."""
    flat, deep = (num_rows, length), (num_rows, length, num_targets)
    return {
        "tokens": np.zeros(flat, np.int32),
        "targets": np.zeros(deep, np.int32),
        "weights": np.zeros(deep, np.float32),
        "segments": np.zeros(flat, np.int32),
        "positions": np.zeros(flat, np.int32),
    }


def fill(batch: Batch, where: np.ndarray, rows: Batch) -> None:
    """Put rows into the places of a batch that a mask [B] names."""
    for name, values in rows.items():
        batch[name][where] = values


def drawn_order(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) drawn from the key: our own, so that no library changes it."""
    return np.argsort(drawn_bits(np.arange(count), *key), kind="stable")


def drawn_bits(numbers: np.ndarray, *key: int) -> np.ndarray:
    """64 random bits for each number [n] and key (splitmix64), uint64 [n]."""
    bits = np.zeros(1, np.uint64)
    for part in (*key, numbers):
        value = np.atleast_1d(part).astype(np.int64).view(np.uint64)
        bits = (bits ^ value) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits
