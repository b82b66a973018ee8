"""Tokenized documents in ArrayRecord shards beside a manifest: what `prepare` writes.

A record is two little-endian 64-bit numbers (a hash, which decides the side; the UTF-8 bytes of
the text) and then the ids, [bos] and [eos] included, in the manifest's dtype.
"""

import contextlib
import hashlib
import json
import pathlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.text import MIB, reported

HEADER = struct.Struct("<QQ")
SIDES = {"held_out": 0, "train": 2**64 - 1}  # the hash that puts a document on that side
MODULE = "array_record.python.array_record_module"


class Encoded(NamedTuple):
    """A tokenized document."""

    hash: int
    num_bytes: int
    tokens: np.ndarray


def write(documents: Iterable[Encoded], side: str, file: pathlib.Path) -> str:
    """Write documents of one side as a shard; its SHA-256."""
    try:
        writer = require(MODULE).ArrayRecordWriter(str(file), "group_size:1")
        with contextlib.closing(writer):
            for _, num_bytes, tokens in documents:
                writer.write(HEADER.pack(SIDES[side], num_bytes) + tokens.tobytes())
    except RuntimeError as error:  # the library's, for a full disk too
        raise InputError(f"{file}: cannot write a shard ({error})") from None
    return _sha256(file)


def read(path: str) -> Iterator[Encoded]:
    """The documents of a folder that `prepare` wrote; every file is checked before it is read.

    Raises InputError when the folder, its manifest or a shard is missing or damaged.
    """
    file = pathlib.Path(path, "manifest.json").expanduser()
    with reported():
        content = file.read_bytes()
    try:
        manifest = json.loads(content)
        dtype = np.dtype(manifest["dtype"])
        hashes = {file.with_name(row["file"]): row["sha256"] for row in manifest["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged ({error!r}); run `prepare` again") from None
    for shard, expected in hashes.items():
        with reported():
            found, size = _sha256(shard), shard.stat().st_size
        if found != expected:
            raise InputError(f"{shard}: not the file that manifest.json names (other SHA-256)")
        with contextlib.closing(require(MODULE).ArrayRecordReader(str(shard))) as reader:
            count = reader.num_records()
            step = max(1, 16 * MIB * count // size)
            for first in range(0, count, step):
                for record in reader.read(first, min(first + step, count)):
                    tokens = np.frombuffer(record, dtype, offset=HEADER.size)
                    number, num_bytes = HEADER.unpack_from(record)
                    yield Encoded(number, num_bytes, tokens)


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
