"""From a `Data` config to batches: opens sources, tokenizes, splits, packs, mixes and prefetches.

Row i of the training data is a pure function of (seed, config, i): a run's place in its data is
one integer, whatever the batch size, the number of processes or of workers.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import sources
from deepseek_jax.data.corpus import (
    cache_folder,
    check_sides,
    digest,
    make_tokenizer,
    open_corpus,
)
from deepseek_jax.data.packing import Batch, Mixed, Rows
from deepseek_jax.data.tokenizer import BPE, Tokenizer, TokenizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a model is trained and evaluated on."""

    source: sources.Source = sources.StandardLibrary()
    tokenizer: TokenizerConfig = BPE()
    """Not used with Records: their own tokenizer serves every source of a mixture."""
    held_out: float = 0.05
    """The share of documents kept for evaluation, by a hash of their names."""
    eval_tokens: int | None = None
    """At most this many held-out tokens are scored: the first documents that fit, as much from each
    part of a mixture. None: all."""
    num_workers: int = 0
    """Processes that make batches; 0: a thread of this process."""
    cache_dir: str = ""
    """Where tokens are kept; empty: deepseek_jax in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self):
        check_sides(self.held_out, self.num_workers, self.cache_dir)
        if self.eval_tokens is not None and self.eval_tokens < 1:
            raise ValueError(f"data.eval_tokens ({self.eval_tokens}) must be at least 1.")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training rows by number, and the held-out documents that are scored."""

    tokenizer: Tokenizer
    train: Mixed
    held: list[Rows]
    fingerprint: str
    """A hash that stays while the tokenizer, the documents and their order do."""

    @property
    def eval_bytes(self) -> int:
        """The UTF-8 bytes of the documents that are scored."""
        return sum(rows.num_bytes for rows in self.held)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The held-out documents in order; each source's last batch is filled with padding."""
        for rows in self.held:
            for first in range(0, rows.num_rows, batch_size):
                yield rows.batch(np.arange(first, first + batch_size))

    def held_out_text(self) -> bytes:
        """The held-out documents, concatenated, as the tokenizer gives them back."""
        documents = (rows.corpus.document(i).tokens for rows in self.held for i in rows.documents)
        return b"".join(self.tokenizer.decode_bytes(tokens.tolist()) for tokens in documents)

    def describe(self) -> str:
        """The documents, tokens and bytes of both sides, in a line."""
        parts = []
        for name, side in (("training", self.train.rows), ("held out", self.held)):
            counts = [(len(rows.documents), rows.num_tokens, rows.num_bytes) for rows in side]
            documents, tokens, size = map(sum, zip(*counts, strict=True))
            parts.append(f"{name}: {documents:,} documents, {tokens:,} tokens, {size / 1e6:.1f} MB")
        return "; ".join([*parts, f"vocabulary: {self.tokenizer.vocab_size:,}"])


def open_data(
    config: Data,
    *,
    sequence_length: int,
    num_targets: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    whole: bool = False,
) -> Dataset:
    """The data of a config, tokenized on first use and read from the cache from then on.

    `seed` draws the order of documents and rows, and a mixture's parts. A `tokenizer` (a
    checkpoint's own) reads the text instead of the config's; `whole` holds out every document.
    Raises InputError when the data cannot be read or the cache not be written.
    """
    cache = cache_folder(config.cache_dir)
    parts = sources.parts(config.source)
    plain = [part.source for part in parts]
    with sources.reported(f"{cache} (--data.cache-dir)"):
        if tokenizer is None:
            tokenizer = make_tokenizer(config.tokenizer, plain, config.held_out, cache)
        corpora = [open_corpus(source, tokenizer, cache) for source in plain]
    shape = (1.0 if whole else config.held_out, sequence_length, num_targets)
    training = [Rows(corpus, *shape, seed + i) for i, corpus in enumerate(corpora)]
    limit = config.eval_tokens and config.eval_tokens // len(parts)
    held = [Rows(corpus, *shape, None, limit) for corpus in corpora]
    if not any(rows.num_rows for rows in held):
        raise InputError(f"data.eval_tokens ({config.eval_tokens}) has room for no document")
    order = [(c.fingerprint, p.weight, p.schedule) for c, p in zip(corpora, parts, strict=True)]
    fingerprint = digest([tokenizer.files(), order, shape[:2], seed])
    return Dataset(tokenizer, Mixed(training, parts, seed), held, fingerprint)


class Batches(Iterator[Batch]):
    """Batches made ahead, by a thread or by processes; `close()` ends these."""

    def __init__(self, iterator: grain.DatasetIterator):
        # Grain's clean-up fails once the interpreter's own has begun: `finalize` runs before, and
        # must then hold the only reference.
        self._held = [iterator]
        self.close = weakref.finalize(self, lambda held: held.pop().close(), self._held)

    def __next__(self) -> Batch:
        return next(self._held[0])


def _serve(worker: int, num_workers: int) -> None:
    """Make a worker end with the main process, however that ends, and never before it.

    Ctrl-C reaches all processes; the main one saves, and still needs batches until it has.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def batches(
    dataset: Dataset,
    *,
    start: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> Batches:
    """This process's contiguous part of the batches of rows from `start` on, without end.

    Batch k holds the rows [start + k * batch_size, start + (k + 1) * batch_size).
    """
    if batch_size % process_count:
        raise InputError(f"batch_size {batch_size} does not divide over {process_count} processes")
    if not flags.FLAGS.is_parsed():  # Grain asks absl, whose own main() is not ours
        flags.FLAGS.mark_as_parsed()
    own = np.split(start + np.arange(batch_size), process_count)[process_index]
    train = dataset.train
    steps = grain.MapDataset.range(2**48)  # rows never end
    source = steps.map(lambda step: train.batch(own + step * batch_size))
    stream = source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        stream = stream.mp_prefetch(options, worker_init_fn=_serve)
    return Batches(iter(stream))
