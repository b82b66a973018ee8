"""Documents as tokens on disk: one memory-mapped file of ids and an index, made once and cached.

A cache folder is named by a hash of all that went into it, written under another name and renamed
when whole, so that neither a killed nor a second process leaves half of one.
"""

import array
import concurrent.futures
import contextlib
import fcntl
import hashlib
import heapq
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import records, sources
from deepseek_jax.data.records import Encoded
from deepseek_jax.data.text import MIB, Document, reported
from deepseek_jax.data.tokenizer import BPE, Tokenizer, load_tokenizer, train_bpe

VERSION = 2  # of the cached form, and of how documents and tokens are made
SAMPLE = 32 * MIB  # text that a BPE is trained on at most
INDEX = np.dtype([("hash", "<u8"), ("num_bytes", "<i8"), ("length", "<i8")])


class Corpus:
    """A source's documents, each [bos] tokens [eos]; pickled as the name of its folder.

    Attributes:
      tokens: the ids of all documents, one after another (mapped from disk).
      starts, lengths: where each document's ids are [n].
      num_bytes: the UTF-8 bytes of each document's text [n].
      hashes: of each document's key [n], uint64.
      fingerprint: a hash of all these.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        meta = json.loads((directory / "meta.json").read_text())
        self.fingerprint = meta["sha256"]
        self.tokens = np.memmap(directory / "tokens.bin", meta["dtype"], "r")
        index = np.load(directory / "index.npy", mmap_mode="r")
        self.lengths, self.num_bytes = np.array(index["length"]), index["num_bytes"]
        self.hashes, self.starts = index["hash"], np.cumsum(self.lengths) - self.lengths
        if len(self.tokens) != self.lengths.sum():
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
    if len(hashes) < 2:
        raise InputError("there is only one document, so none can be held out: give at least two")
    limit = min(max(int(fraction * 2.0**64), int(hashes.min()) + 1), int(hashes.max()))
    mask = hashes < np.uint64(limit)
    return mask if mask.any() else np.arange(len(mask)) == 0  # all hashes may be the same


def open_corpus(source: sources.Plain, tokenizer: Tokenizer, cache: pathlib.Path) -> Corpus:
    """The source's documents as tokens, from the cache or made now.

    Raises InputError for whatever is wrong with the source, or when the cache cannot be written.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    def build(directory: pathlib.Path) -> None:
        index, sha256 = array.array("Q"), hashlib.sha256()
        with open(directory / "tokens.bin", "wb") as out:
            for document in _encoded(source, tokenizer):
                content = document.tokens.astype(dtype).tobytes()
                out.write(content)
                sha256.update(content)
                index.extend((document.hash, document.num_bytes, len(document.tokens)))
        sha256.update(index)
        np.save(directory / "index.npy", np.array(index, "<u8").view(INDEX))
        meta = {"dtype": dtype.str, "sha256": sha256.hexdigest()}
        (directory / "meta.json").write_text(json.dumps(meta))

    facts = ["tokens", sources.fingerprint(source), tokenizer.files()]
    return _cached(cache, facts, build, Corpus)


def _encoded(source: sources.Plain, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Tokenize on all cores while the next texts are read and the last results are used."""
    if isinstance(source, sources.Records):
        yield from records.read(source.path)
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        jobs = (
            (batch, pool.submit(tokenizer.encode_batch, [text for _, text in batch]))
            for batch in _batched(source)
        )
        end: list[Any] = [None]
        for (batch, job), _ in itertools.pairwise(itertools.chain(jobs, end)):
            for (key, text), ids in zip(batch, job.result(), strict=True):
                tokens = array.array("I", [tokenizer.bos_id, *ids, tokenizer.eos_id])
                yield Encoded(key_hash(key), len(text.encode()), np.frombuffer(tokens, np.uint32))


def _batched(source: sources.Plain) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in sources.documents(source):
        batch.append(document)
        size += len(document.text) + 512  # what a document takes beside its text
        if size >= 4 * MIB:
            yield batch
            batch, size = [], 0
    yield batch


def open_bpe(
    config: BPE, plain: list[sources.Plain], fraction: float, cache: pathlib.Path
) -> Tokenizer:
    """The BPE of the sources' training sides (an even sample), from the cache or trained now."""

    def build(directory: pathlib.Path) -> None:
        sample: list[tuple] = []  # a heap: what has the largest draw leaves first
        held, size = [], 0
        for part, source in enumerate(plain):
            hashes = array.array("Q")
            for key, text in sources.documents(source):
                number, length = (part, len(hashes)), len(text.encode())
                hashes.append(key_hash(key))
                heapq.heappush(sample, (-key_hash(f"{number} {key}"), number, length, text))
                size += length
                while size > SAMPLE and len(sample) > 1:
                    size -= heapq.heappop(sample)[2]
            held.append(held_out(np.array(hashes), fraction))
        kept = sorted((number, text) for _, number, _, text in sample)
        texts = (text for (part, number), text in kept if not held[part][number])
        train_bpe(config, texts).save(directory)

    prints = [sources.fingerprint(source) for source in plain]
    facts = ["bpe", config.vocab_size, fraction, SAMPLE, prints]
    return _cached(cache, facts, build, load_tokenizer)


def digest(facts: Any) -> str:
    """A hash of what JSON can hold, and of bytes."""
    content = json.dumps(facts, default=lambda data: hashlib.sha256(data).hexdigest())
    return hashlib.sha256(content.encode()).hexdigest()


def _cached(
    cache: pathlib.Path, facts: list, build: Callable[[pathlib.Path], None], load: Callable
) -> Any:
    """What `load` reads from the folder named by `facts`, filled by `build` if need be."""
    path = cache / digest([VERSION, *facts])[:32]
    damage = (OSError, ValueError, KeyError, InputError)
    with contextlib.suppress(*damage):
        return load(path)
    with reported(f"{cache} (--data.cache-dir)"):
        cache.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.lock", "w") as lock:
            with contextlib.suppress(OSError):  # some network file systems cannot lock
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(*damage):  # another process may have built it meanwhile
                return load(path)
            shutil.rmtree(path, ignore_errors=True)
            with made_whole(path) as partial:
                build(partial)
        return load(path)


@contextlib.contextmanager
def made_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to fill, which is renamed to `path` at the end, and deleted on errors."""
    partial = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
