"""Tokenized documents in ArrayRecord shards beside a manifest: what `prepare` writes and trains on.

A record is two little-endian 64-bit numbers (a hash, which decides the side; the UTF-8 bytes of
the text) and then the ids, [bos] and [eos] included, in the manifest's dtype.
"""

import contextlib
import hashlib
import json
import pathlib
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.text import MIB

HEADER = struct.Struct("<QQ")
SIDES = {"held_out": 0, "train": 2**64 - 1}  # the hash that puts a document on that side


class Encoded(NamedTuple):
    """A tokenized document."""

    hash: int
    num_bytes: int
    tokens: np.ndarray


class Shards:
    """Writes documents into shards of about `shard_bytes`, each of one side."""

    def __init__(self, directory: pathlib.Path, dtype: np.dtype, shard_bytes: int):
        self._module = require("array_record.python.array_record_module")
        self._directory, self._dtype, self._limit = directory, dtype, shard_bytes
        self._open: dict[str, Any] = {}  # side -> writer
        self._shards: dict[str, dict] = {}  # side -> the open shard's manifest row
        self.rows: list[dict] = []

    def add(self, document: Encoded, side: str) -> None:
        """Append a document to its side's open shard."""
        if side not in self._open:
            number = sum(row["split"] == side for row in self.rows)
            name = f"{side}-{number:05d}.array_record"
            path = str(self._directory / name)
            self._open[side] = self._module.ArrayRecordWriter(path, "group_size:1")
            row = {"file": name, "split": side, "documents": 0, "tokens": 0, "bytes": 0}
            self._shards[side] = row
            self.rows.append(row)
        row = self._shards[side]
        header = HEADER.pack(SIDES[side], document.num_bytes)
        self._open[side].write(header + document.tokens.astype(self._dtype).tobytes())
        row["documents"] += 1
        row["tokens"] += len(document.tokens)
        row["bytes"] += document.num_bytes
        if row["tokens"] * self._dtype.itemsize >= self._limit:
            self._open.pop(side).close()

    def close(self) -> list[dict]:
        """Finish all shards; their manifest rows, with hashes."""
        for writer in self._open.values():
            writer.close()
        self._open.clear()
        for row in self.rows:
            row["sha256"] = _sha256(self._directory / row["file"])
        return sorted(self.rows, key=lambda row: row["file"])


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of a folder that `prepare` wrote; InputError when it is missing or damaged."""
    file = pathlib.Path(path).expanduser() / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        for row in manifest["shards"]:
            row["file"], row["documents"], row["sha256"]
        np.dtype(manifest["dtype"])
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; `prepare` writes such a folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged ({error}); run `prepare` again") from None
    return manifest


def read(path: str) -> Iterator[Encoded]:
    """The documents of all shards, each shard's hash checked before it is read."""
    module = require("array_record.python.array_record_module")
    manifest = read_manifest(path)
    dtype = np.dtype(manifest["dtype"])
    for row in manifest["shards"]:
        shard = pathlib.Path(path).expanduser() / row["file"]
        try:
            if _sha256(shard) != row["sha256"]:
                raise InputError(f"{shard}: not what manifest.json says (its SHA-256 differs)")
            size = shard.stat().st_size
        except OSError as error:
            raise InputError(f"{shard}: {error.strerror}") from None
        with contextlib.closing(module.ArrayRecordReader(str(shard))) as reader:
            count = reader.num_records()
            step = max(1, 16 * MIB * count // max(size, 1))
            for first in range(0, count, step):
                for record in reader.read(first, min(first + step, count)):
                    tokens = np.frombuffer(record, dtype, offset=HEADER.size)
                    yield Encoded(*HEADER.unpack_from(record), tokens)


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
