"""Tokenized documents on disk: a memory-mapped cache, made once, and the shards of `prepare`.

A cache folder is named by a hash of all that went into it, written under another name and renamed
when whole, so that neither a killed nor a second process leaves half of one.

A shard is an ArrayRecord file beside a manifest. Its records are two little-endian 64-bit numbers
(a hash, which decides the side; the UTF-8 bytes of the text) and then the ids, [bos] and [eos]
included, in the manifest's dtype.
"""

import array
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import heapq
import itertools
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.core.storage import as_file, in_bucket, located
from deepseek_jax.data import sources
from deepseek_jax.data.tokenizer import (
    BPE,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)

VERSION = 2  # of the cached form, and of how documents and tokens are made
SAMPLE = 32 * sources.MIB  # text that a BPE is trained on at most
INDEX = np.dtype([("hash", "<u8"), ("num_bytes", "<i8"), ("length", "<i8")])
HEADER = struct.Struct("<QQ")
SIDES = {"held_out": 0, "train": 2**64 - 1}  # the hash that puts a document on that side
SHARDS = "array_record.python.array_record_module"


class Encoded(NamedTuple):
    """A tokenized document."""

    hash: int
    num_bytes: int
    tokens: np.ndarray


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
        ids = slice(self.starts[number], self.starts[number] + self.lengths[number])
        return Encoded(int(self.hashes[number]), int(self.num_bytes[number]), self.tokens[ids])

    def documents(self, fraction: float, training: bool) -> np.ndarray:
        """The numbers of the documents of one side, ascending."""
        return side(self.hashes, fraction, training)


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


def cache_folder(cache_dir: str) -> pathlib.Path:
    """Where things are kept that are made once: `cache_dir`, or if empty the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache_dir or f"{base}/deepseek_jax").expanduser()


def check_sides(held_out: float, num_workers: int, cache_dir: str) -> None:
    """ValueError unless these fields of a data config can be."""
    if not 0 < held_out < 1:
        raise ValueError(f"data.held_out ({held_out}) must lie between 0 and 1.")
    if in_bucket(cache_dir):
        raise ValueError(f"data.cache_dir ({cache_dir}) must be a folder on a disk.")
    if num_workers < 0:
        raise ValueError(f"data.num_workers ({num_workers}) must not be negative.")


def side(hashes: np.ndarray, fraction: float, training: bool) -> np.ndarray:
    """The numbers of what is trained on, or else held out, ascending."""
    return np.flatnonzero(held_out(hashes, fraction) != training)


def open_corpus(source: sources.Plain, tokenizer: Tokenizer, cache: pathlib.Path) -> Corpus:
    """The source's documents as tokens, from the cache or made now; InputError or OSError."""
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
    return cached(cache, facts, build, Corpus)


def _encoded(source: sources.Plain, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Tokenize on all cores while the next texts are read and the last results are used."""
    if isinstance(source, sources.Records):
        yield from read_shards(source.path)
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


def _batched(source: sources.Plain) -> Iterator[list[sources.Document]]:
    batch, size = [], 0
    for document in sources.documents(source):
        batch.append(document)
        size += len(document.text) + 512  # what a document takes beside its text
        if size >= 4 * sources.MIB:
            yield batch
            batch, size = [], 0
    yield batch


def write_shard(documents: Iterable[Encoded], side: str, file: pathlib.Path) -> str:
    """Write documents of one side as a shard; its SHA-256."""
    try:
        writer = require(SHARDS).ArrayRecordWriter(str(file), "group_size:1")
        with contextlib.closing(writer):
            for _, num_bytes, tokens in documents:
                writer.write(HEADER.pack(SIDES[side], num_bytes) + tokens.tobytes())
    except RuntimeError as error:  # the library's, for a full disk too
        raise InputError(f"{file}: cannot write a shard ({error})") from None
    return _sha256(file)


def read_shards(path: str) -> Iterator[Encoded]:
    """The documents of a folder that `prepare` wrote; InputError when one of them is damaged."""
    file = located(path).expanduser() / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        dtype = np.dtype(manifest["dtype"])
        hashes = {file.with_name(row["file"]): row["sha256"] for row in manifest["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged ({error!r}); run `prepare` again") from None
    for shard, expected in hashes.items():
        with as_file(shard) as copy:
            if _sha256(copy) != expected:
                raise InputError(f"{shard}: not the file that manifest.json names (other SHA-256)")
            for record in _records(copy):
                number, num_bytes = HEADER.unpack_from(record)
                yield Encoded(number, num_bytes, np.frombuffer(record, dtype, -1, HEADER.size))


def _records(shard: pathlib.Path) -> Iterator[bytes]:
    with contextlib.closing(require(SHARDS).ArrayRecordReader(str(shard))) as reader:
        count = reader.num_records()
        step = max(1, 16 * sources.MIB * count // shard.stat().st_size)
        for first in range(0, count, step):
            yield from reader.read(first, min(first + step, count))


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_tokenizer(
    config: TokenizerConfig, plain: list[sources.Plain], fraction: float, cache: pathlib.Path
) -> Tokenizer:
    """The tokenizer that records bring, or else the config's, trained or cached if it must be."""
    prepared = [source.path for source in plain if isinstance(source, sources.Records)]
    found = [load_tokenizer(located(path).expanduser() / "tokenizer") for path in prepared]
    if any(tokenizer.files() != found[0].files() for tokenizer in found):
        raise InputError(f"{' and '.join(prepared)} have different tokenizers: prepare with one")
    if found:
        return found[0]
    if not isinstance(config, BPE):
        return open_tokenizer(config)
    prints = [sources.fingerprint(source) for source in plain]
    facts = ["bpe", repr(config), fraction, SAMPLE, prints]
    build = functools.partial(_train, config, plain, fraction)
    return cached(cache, facts, build, load_tokenizer)


def _train(config: BPE, plain: list[sources.Plain], fraction: float, out: pathlib.Path) -> None:
    """Train a BPE on an even sample of the sources' training sides, and save it."""
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
    train_bpe(config, (text for (part, i), text in kept if not held[part][i])).save(out)


def digest(facts: Any) -> str:
    """A hash of what JSON can hold, and of bytes."""
    content = json.dumps(facts, default=lambda data: hashlib.sha256(data).hexdigest())
    return hashlib.sha256(content.encode()).hexdigest()


def cached(
    cache: pathlib.Path, facts: list, build: Callable[[pathlib.Path], None], load: Callable
) -> Any:
    """What `load` reads from the folder named by `facts`, filled by `build` if need be."""
    path = cache / digest([VERSION, *facts])[:32]
    damage = (OSError, ValueError, KeyError, InputError)
    with contextlib.suppress(*damage):
        return load(path)
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
