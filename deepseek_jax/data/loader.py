"""From a `Data` config to batches: opens sources, splits, tokenizes, packs, mixes and prefetches.

Row i of the training data is a pure function of (seed, config, i): the position of a run is one
integer, whatever the batch size, the number of processes or of workers.
"""

import dataclasses
import os
import pathlib
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import sources
from deepseek_jax.data.corpus import open_bpe, open_corpus
from deepseek_jax.data.mixture import Mixed
from deepseek_jax.data.packing import Batch, Rows, empty_batch, fill
from deepseek_jax.data.sources import Source, StandardLibrary
from deepseek_jax.data.tokenizer import (
    BPE,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    open_tokenizer,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a model is trained and evaluated on."""

    source: Source = StandardLibrary()
    tokenizer: TokenizerConfig = BPE()
    """Records bring their own tokenizer, which then serves every source of a mixture."""
    held_out: float = 0.05
    """The share of documents kept for evaluation, by a hash of their names."""
    num_workers: int = 0
    """Processes that make batches; 0: a thread of this process."""
    cache_dir: str = ""
    """Where tokens are kept; empty: deepseek_jax in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out ({self.held_out}) must lie between 0 and 1.")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers ({self.num_workers}) must not be negative.")


class Dataset:
    """Training rows by number, and the held-out documents."""

    def __init__(self, tokenizer: Tokenizer, train: Mixed, training: list[Rows], held: list[Rows]):
        self.tokenizer = tokenizer
        self.train = train
        self.eval_bytes = sum(rows.num_bytes for rows in held)
        """UTF-8 bytes of all held-out documents."""
        self._training, self._held = training, held

    def train_row(self, number: int) -> Batch:
        """Row `number` of the training data: a batch without its first dimension."""
        return {name: value[0] for name, value in self.train.batch(np.array([number])).items()}

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The held-out documents in order; the last batch is filled up with empty rows."""
        ends = np.cumsum([rows.num_rows for rows in self._held])
        for first in range(0, int(ends[-1]), batch_size):
            numbers = np.arange(first, first + batch_size)
            which = np.minimum(np.searchsorted(ends, numbers, side="right"), len(ends) - 1)
            batch = None
            for part in np.unique(which):
                rows = self._held[part]
                piece = rows.batch(numbers[which == part] - (ends[part] - rows.num_rows))
                if batch is None:
                    batch = empty_batch(batch_size, *piece["targets"].shape[1:])
                fill(batch, which == part, piece)
            yield batch

    def held_out_text(self) -> bytes:
        """The held-out documents, concatenated (as the tokenizer gives them back)."""
        return b"".join(
            self.tokenizer.decode_bytes(tokens.tolist())
            for rows in self._held
            for tokens in rows.token_lists()
        )

    def describe(self) -> str:
        """The documents, tokens and bytes of both sides, in a line."""
        sides = []
        for name, side in (("training", self._training), ("held out", self._held)):
            documents = sum(len(rows.documents) for rows in side)
            tokens = sum(rows.num_tokens for rows in side)
            size = sum(rows.num_bytes for rows in side)
            sides.append(f"{name}: {documents:,} documents, {tokens:,} tokens, {size / 1e6:.1f} MB")
        return "; ".join([*sides, f"vocabulary: {self.tokenizer.vocab_size:,}"])


def open_data(config: Data, *, sequence_length: int, num_targets: int, seed: int) -> Dataset:
    """The data of a config, tokenized on first use and read from the cache from then on.

    Args:
      config: what to read.
      sequence_length: tokens a row.
      num_targets: how many of the tokens that follow each token are its targets.
      seed: of the order of documents and rows, and of a mixture's draws.

    Raises InputError when the data cannot be read or the cache not be written.
    """
    cache = cache_directory(config)
    parts = sources.parts(config.source)
    tokenizer = _tokenizer(config, parts, cache)
    corpora = [open_corpus(part.source, tokenizer, cache) for part in parts]
    shape = (config.held_out, sequence_length, num_targets)
    training = [Rows(corpus, *shape, seed + i) for i, corpus in enumerate(corpora)]
    held = [Rows(corpus, *shape, None) for corpus in corpora]
    return Dataset(tokenizer, Mixed(training, parts, seed), training, held)


def cache_directory(config: Data) -> pathlib.Path:
    """Where tokens are kept."""
    if config.cache_dir:
        return pathlib.Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "deepseek_jax"


def _tokenizer(config: Data, parts: tuple[sources.Part, ...], cache: pathlib.Path) -> Tokenizer:
    plain = [part.source for part in parts]
    prepared = [source for source in plain if isinstance(source, sources.Records)]
    if prepared:
        found = [load_tokenizer(pathlib.Path(source.path) / "tokenizer") for source in prepared]
        if any(tokenizer.files() != found[0].files() for tokenizer in found[1:]):
            names = " and ".join(source.path for source in prepared)
            raise InputError(f"{names}: prepared with different tokenizers; prepare them with one")
        return found[0]
    if isinstance(config.tokenizer, BPE):
        return open_bpe(config.tokenizer, plain, config.held_out, cache)
    return open_tokenizer(config.tokenizer)


class _Cut:
    """Element k is this process's part of the batch k steps after the start."""

    def __init__(self, train: Mixed, start: int, batch_size: int, first: int, size: int):
        self._train, self._start, self._batch_size = train, start, batch_size
        self._own = np.arange(first, first + size)

    def __len__(self) -> int:
        return 2**48  # rows never end

    def __getitem__(self, step: int) -> Batch:
        return self._train.batch(self._start + step * self._batch_size + self._own)


class Batches(Iterator[Batch]):
    """Batches made ahead by a thread or by processes; `close` ends these."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator
        # Grain's own clean-up fails when it runs after the interpreter's: run it before.
        self.close = weakref.finalize(self, iterator.close)

    def __next__(self) -> Batch:
        return next(self._iterator)


def batches(
    dataset: Dataset,
    *,
    start: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> Batches:
    """This process's part of the batches of rows from `start` on, without end.

    Batch k holds rows [start + k * batch_size, start + (k + 1) * batch_size); each process gets its
    contiguous share of them.
    """
    size, rest = divmod(batch_size, process_count)
    if rest:
        raise InputError(f"batch_size {batch_size} does not divide over {process_count} processes")
    if not flags.FLAGS.is_parsed():  # Grain asks absl, whose own main() is not ours
        flags.FLAGS.mark_as_parsed()
    cut = _Cut(dataset.train, start, batch_size, process_index * size, size)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = grain.MapDataset.source(cut).to_iter_dataset(ahead)
    if num_workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return Batches(iter(stream))
