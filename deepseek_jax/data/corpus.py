"""Documents as tokens on disk: one memory-mapped file of ids and an index, made once and cached.

A cache folder is named by a hash of all that went into it, written under another name and renamed
when whole, so that a killed or a second process never leaves half of one.
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
from typing import NamedTuple, TypeVar

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import records, sources
from deepseek_jax.data.records import Encoded
from deepseek_jax.data.text import MIB, Document
from deepseek_jax.data.tokenizer import BPE, Tokenizer, load_tokenizer, train_bpe

VERSION = 1  # of the cached form and of what goes into it
SAMPLE = 32 * MIB  # text that a BPE is trained on at most
INDEX = np.dtype([("length", "<i8"), ("num_bytes", "<i8"), ("hash", "<u8")])

T = TypeVar("T")


class Scan(NamedTuple):
    """What one pass over a source's documents tells about each."""

    hashes: np.ndarray  # uint64: of the key
    num_bytes: np.ndarray  # int64: UTF-8 bytes of the text


class Corpus:
    """The tokens of a source's documents, each [bos] tokens [eos]; pickled as its folder's name."""

    def __init__(self, directory: pathlib.Path):
        meta = json.loads((directory / "meta.json").read_text())
        self.directory = directory
        self.tokens = np.memmap(directory / "tokens.bin", meta["dtype"], "r")
        index = np.load(directory / "index.npy", mmap_mode="r")
        self.lengths, self.num_bytes = np.array(index["length"]), index["num_bytes"]
        self.hashes = np.array(index["hash"])
        self.starts = np.cumsum(self.lengths) - self.lengths
        if len(self.tokens) != meta["tokens"] or self.lengths.sum() != meta["tokens"]:
            raise ValueError("its files disagree")

    def __reduce__(self):
        return Corpus, (self.directory,)


def key_hash(key: str) -> int:
    """64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out [n] bool: those of small hashes, and never none or all."""
    mask = hashes < np.uint64(int(fraction * 2.0**64))
    if mask.any() and not mask.all():
        return mask
    if len(hashes) < 2:
        raise InputError("there is only one document, so none can be held out: give at least two")
    mask = hashes == hashes.min()
    return np.arange(len(hashes)) == 0 if mask.all() else mask


def scan(source: sources.Plain) -> Scan:
    """Read every document once: nothing unreadable shows up later."""
    hashes, sizes = array.array("Q"), array.array("q")
    with Progress("reading", None) as progress:
        for document in sources.documents(source):
            hashes.append(key_hash(document.key))
            sizes.append(len(document.text.encode()))
            progress.add(sizes[-1])
    return Scan(np.array(hashes, np.uint64), np.array(sizes, np.int64))


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, total: int | None = None
) -> Iterator[Encoded]:
    """Tokenize a stream on all cores while the stream is read and the results are used."""
    bos, eos = np.array([tokenizer.bos_id]), np.array([tokenizer.eos_id])
    dtype = token_dtype(tokenizer)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        Progress("tokenizing", total) as progress,
    ):
        waiting = None
        for batch in itertools.chain(_batched(documents), (None,)):
            texts = batch and [document.text for document in batch]
            ahead = batch and (batch, pool.submit(tokenizer.encode_batch, texts))
            if waiting:
                for document, ids in zip(waiting[0], waiting[1].result(), strict=True):
                    size = len(document.text.encode())
                    tokens = np.concatenate([bos, np.array(ids, np.int64), eos]).astype(dtype)
                    yield Encoded(key_hash(document.key), size, tokens)
                    progress.add(size)
            waiting = ahead


def _batched(documents: Iterable[Document], size: int = 4 * MIB) -> Iterator[list[Document]]:
    batch, held = [], 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= size or len(batch) >= 8192:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type on disk that holds every id."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def open_corpus(source: sources.Plain, tokenizer: Tokenizer, cache: pathlib.Path) -> Corpus:
    """The source's documents as tokens, from the cache or made now.

    Raises InputError for whatever is wrong with the source, or when the cache cannot be written.
    """

    def build(directory: pathlib.Path) -> None:
        if isinstance(source, sources.Records):
            stream = records.read(source.path)
        else:
            total = int(scan(source).num_bytes.sum())
            stream = encoded(sources.documents(source), tokenizer, total)
        _write(directory, stream, token_dtype(tokenizer))

    name = _name("tokens", sources.fingerprint(source), tokenizer_hash(tokenizer))
    return _cached(cache / name, build, Corpus)


def _write(directory: pathlib.Path, stream: Iterable[Encoded], dtype: np.dtype) -> None:
    rows, total = array.array("Q"), 0
    with open(directory / "tokens.bin", "wb") as out:
        for document in stream:
            out.write(document.tokens.astype(dtype).tobytes())
            rows.extend((len(document.tokens), document.num_bytes, document.hash))
            total += len(document.tokens)
    np.save(directory / "index.npy", np.array(rows, "<u8").view(INDEX))
    (directory / "meta.json").write_text(json.dumps({"tokens": total, "dtype": dtype.str}))


def open_bpe(
    config: BPE, plain: list[sources.Plain], fraction: float, cache: pathlib.Path
) -> Tokenizer:
    """The BPE of the sources' training sides, from the cache or trained now."""

    def build(directory: pathlib.Path) -> None:
        scans = [scan(source) for source in plain]
        share = SAMPLE / sum(int(found.num_bytes.sum()) for found in scans)
        train_bpe(config, _sample(plain, scans, fraction, share)).save(directory)

    prints = [sources.fingerprint(source) for source in plain]
    name = _name("bpe", config.vocab_size, fraction, SAMPLE, *prints)
    return _cached(cache / name, build, load_tokenizer)


def _sample(
    plain: list[sources.Plain], scans: list[Scan], fraction: float, share: float
) -> Iterator[str]:
    """Training documents, thinned evenly by a second hash when there are too many."""
    for source, found in zip(plain, scans, strict=True):
        kept = ~held_out(found.hashes, fraction)
        for number, document in enumerate(sources.documents(source)):
            if kept[number] and key_hash(f"{number} {document.key}") < share * 2.0**64:
                yield document.text


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A hash of the tokenizer's files."""
    digest = hashlib.sha256()
    for name, content in sorted(tokenizer.files().items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _name(*facts: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *facts]).encode()).hexdigest()[:32]


def _cached(
    path: pathlib.Path, build: Callable[[pathlib.Path], None], load: Callable[[pathlib.Path], T]
) -> T:
    """`load(path)`, after `build` has filled it if it is not there or damaged."""
    damage: tuple = (OSError, ValueError, KeyError, InputError)
    with contextlib.suppress(*damage):
        return load(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.lock", "w") as lock:
            with contextlib.suppress(OSError):  # some network file systems cannot lock
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(*damage):  # another process may have built it meanwhile
                return load(path)
            shutil.rmtree(path, ignore_errors=True)
            partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
            try:
                partial.mkdir()
                build(partial)
                with contextlib.suppress(FileExistsError):
                    partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return load(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path.parent}: cannot keep tokens here ({reason}); see --data.cache-dir"
        ) from None


class Progress:
    """A line on stderr for work that takes more than a few seconds."""

    def __init__(self, verb: str, total: int | None):
        self._verb, self._total, self._done = verb, total, 0
        self._start = self._shown = time.monotonic()
        self._wait, self._end = (1, "") if sys.stderr.isatty() else (10, "\n")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown > self._start and not self._end:
            print(file=sys.stderr)

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self._done += num_bytes
        now = time.monotonic()
        if now < max(self._shown + self._wait, self._start + 3):
            return
        self._shown, rate = now, self._done / (now - self._start)
        line = f"{self._verb}: {self._done / 1e6:,.0f}"
        if self._total:
            left = int(max(self._total - self._done, 0) / rate)
            line += f" of {self._total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
            line += f"{left // 60}:{left % 60:02d} left"
        else:
            line += f" MB, {rate / 1e6:.1f} MB/s"
        start, fill = ("", "") if self._end else ("\r", "   ")
        print(start + line + fill, end=self._end, file=sys.stderr, flush=True)
