"""Documents as tokens on disk: one memory-mapped file of ids and an index, made once and cached.

A cache folder is named by a hash of all that went into it, written under another name and renamed
when whole, so that neither a killed nor a second process leaves half of one.
"""

import array
import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import records, sources
from deepseek_jax.data.records import Encoded
from deepseek_jax.data.text import MIB, Document, reported
from deepseek_jax.data.tokenizer import BPE, Tokenizer, load_tokenizer, train_bpe

VERSION = 1  # of the cached form, and of how documents and tokens are made
SAMPLE = 32 * MIB  # text that a BPE is trained on at most
INDEX = np.dtype([("hash", "<u8"), ("num_bytes", "<i8"), ("length", "<i8")])

T = TypeVar("T")


class Corpus:
    """A source's documents, each [bos] tokens [eos]; pickled as the name of its folder.

    Attributes:
      tokens: the ids of all documents, one after another (mapped from disk).
      starts, lengths: where each document's ids are [n].
      num_bytes: the UTF-8 bytes of each document's text [n].
      hashes: of each document's key [n], uint64.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        meta = json.loads((directory / "meta.json").read_text())
        self.tokens = np.memmap(directory / "tokens.bin", meta["dtype"], "r")
        index = np.load(directory / "index.npy", mmap_mode="r")
        self.lengths, self.num_bytes = np.array(index["length"]), index["num_bytes"]
        self.hashes, self.starts = index["hash"], np.cumsum(self.lengths) - self.lengths
        if not meta["tokens"] == len(self.tokens) == self.lengths.sum():
            raise ValueError(f"{directory}: damaged")

    def __reduce__(self):
        return Corpus, (self.directory,)

    def document(self, number: int) -> Encoded:
        """One document."""
        end = self.starts[number] + self.lengths[number]
        tokens = self.tokens[self.starts[number] : end]
        return Encoded(int(self.hashes[number]), int(self.num_bytes[number]), tokens)

    def documents(self, fraction: float, training: bool) -> np.ndarray:
        """The numbers of the documents of one side, ascending."""
        return np.flatnonzero(held_out(self.hashes, fraction) != training)


def key_hash(key: str) -> int:
    """64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out [n] bool: those of small hashes, never none; all only at 1."""
    if fraction == 1:
        return np.ones(len(hashes), bool)
    mask = hashes < np.uint64(int(fraction * 2.0**64))
    if len(mask) < 2:
        raise InputError("there is only one document, so none can be held out: give at least two")
    if mask.any() and not mask.all():
        return mask
    mask = hashes == hashes.min()
    return mask if not mask.all() else np.arange(len(mask)) == 0


def open_corpus(source: sources.Plain, tokenizer: Tokenizer, cache: pathlib.Path) -> Corpus:
    """The source's documents as tokens, from the cache or made now.

    Raises InputError for whatever is wrong with the source, or when the cache cannot be written.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    def build(directory: pathlib.Path) -> None:
        index = array.array("Q")
        with open(directory / "tokens.bin", "wb") as out:
            stream = _encoded(source, tokenizer)
            total = sources.num_bytes(source)
            for document in _shown(stream, lambda d: d.num_bytes, "tokenizing", total):
                out.write(document.tokens.astype(dtype).tobytes())
                index.extend((document.hash, document.num_bytes, len(document.tokens)))
            meta = {"dtype": dtype.str, "tokens": out.tell() // dtype.itemsize}
        np.save(directory / "index.npy", np.array(index, "<u8").view(INDEX))
        (directory / "meta.json").write_text(json.dumps(meta))

    files = [(name, _sha256(content)) for name, content in sorted(tokenizer.files().items())]
    return _cached(cache, ["tokens", sources.fingerprint(source), files], build, Corpus)


def _encoded(source: sources.Plain, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Tokenize on all cores while the next texts are read and the last results are used."""
    if isinstance(source, sources.Records):
        yield from records.read(source.path)
        return
    waiting = None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for batch in itertools.chain(_batched(sources.documents(source)), [None]):
            texts = [document.text for document in batch or ()]
            ahead = (batch, pool.submit(tokenizer.encode_batch, texts)) if batch else None
            if waiting:
                for document, ids in zip(waiting[0], waiting[1].result(), strict=True):
                    tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id])
                    yield Encoded(key_hash(document.key), len(document.text.encode()), tokens)
            waiting = ahead


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= 4 * MIB or len(batch) >= 8192:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def open_bpe(
    config: BPE, plain: list[sources.Plain], fraction: float, cache: pathlib.Path
) -> Tokenizer:
    """The BPE of the sources' training sides, from the cache or trained now."""

    def build(directory: pathlib.Path) -> None:
        scans = [_scan(source) for source in plain]
        share = SAMPLE / sum(int(sizes.sum()) for _, sizes in scans)
        train_bpe(config, sample(scans, share)).save(directory)

    def sample(scans: list, share: float) -> Iterator[str]:
        """Training documents, thinned evenly by a second hash when there are too many."""
        for source, (hashes, _) in zip(plain, scans, strict=True):
            kept = ~held_out(hashes, fraction)
            for number, document in enumerate(sources.documents(source)):
                if kept[number] and key_hash(f"{number} {document.key}") < share * 2.0**64:
                    yield document.text

    prints = [sources.fingerprint(source) for source in plain]
    facts = ["bpe", config.vocab_size, fraction, SAMPLE, prints]
    return _cached(cache, facts, build, load_tokenizer)


def _scan(source: sources.Plain) -> tuple[np.ndarray, np.ndarray]:
    """The hash and the size of every document, in one pass over them."""
    hashes, sizes = array.array("Q"), array.array("q")
    stream = sources.documents(source)
    for document in _shown(stream, lambda d: sizes[-1], "reading", sources.num_bytes(source)):
        hashes.append(key_hash(document.key))
        sizes.append(len(document.text.encode()))
    return np.array(hashes), np.array(sizes)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _cached(
    cache: pathlib.Path,
    facts: list,
    build: Callable[[pathlib.Path], None],
    load: Callable[[pathlib.Path], T],
) -> T:
    """What `load` reads from the folder named by `facts`, filled by `build` if need be."""
    path = cache / _sha256(json.dumps([VERSION, *facts]).encode())[:32]
    damage = (OSError, ValueError, KeyError, InputError)
    with contextlib.suppress(*damage):
        return load(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with reported(f"{cache} (--data.cache-dir)"):
        cache.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.lock", "w") as lock:
            with contextlib.suppress(OSError):  # some network file systems cannot lock
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(*damage):  # another process may have built it meanwhile
                return load(path)
            for left in (path, *cache.glob(f"{path.name}.*.tmp")):  # damaged, or of a killed one
                shutil.rmtree(left, ignore_errors=True)
            try:
                partial.mkdir()
                build(partial)
                partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return load(path)


def _shown(
    items: Iterable[T], size: Callable[[T], int], verb: str, total: int | None
) -> Iterator[T]:
    """The items, and on stderr how far they are when they take more than a few seconds."""
    live = sys.stderr.isatty()
    pause, end = (1, "   \r") if live else (10, "\n")
    done, start = 0, time.monotonic()
    last = start
    for item in items:
        yield item
        done, now = done + size(item), time.monotonic()
        if now - last > pause:
            last, rate = now, done / (now - start) / 1e6
            line = f"{verb}: {done / 1e6:,.1f} MB, {rate:.1f} MB/s"
            if total:
                left = int(max(total - done, 0) / 1e6 / rate)
                line += f", {min(done / total, 1):.0%}, {left // 60}:{left % 60:02d} left"
            print(line, end=end, file=sys.stderr, flush=True)
    if live and last > start:
        print(file=sys.stderr)
