"""Checkpoints as objects in a bucket: every process puts the pieces that its devices hold.

Orbax renames what it has written and its processes share a folder; here neither is there. A leaf is
a plain zarr folder, as `convert` writes it and Orbax opens it from a copy: its chunks are the
devices' shards, cut along the first dimension into at most 64 MiB, so that nobody puts another's
object. Hashes come from memory, nothing touches a disk, and manifest.json is put last: a step
without one is no checkpoint. A process reads back only what its devices need.
"""

import hashlib
import json
import math
import secrets
import time
from typing import Any

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

from deepseek_jax.checkpoint.integrity import MANIFEST
from deepseek_jax.checkpoint.parts import BUFFER
from deepseek_jax.core.storage import Object, at_once, kvstore

WRITTEN = "written"  # tables of what each process of several has put, until the manifest stands
METADATA = {"chunk_key_encoding": {"name": "v2"}}


def zarr_json(shape: tuple[int, ...], dtype: Any, chunk: tuple[int, ...]) -> bytes:
    """What stands in the folder of an uncompressed zarr array."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory"}, "metadata": METADATA}
    kind: dict[str, Any] = {"dtype": tensorstore.dtype(np.dtype(dtype)), "shape": shape}
    layout = tensorstore.ChunkLayout(chunk_shape=chunk)
    made = tensorstore.open(spec, create=True, chunk_layout=layout, **kind).result()
    return made.kvstore.read("zarr.json").result().value


def contents(leaves: dict[str, Any]) -> dict[str, bytes]:
    """The objects that this process puts of a state's leaves, by name.

    A leaf in the host's memory, the same everywhere, is process 0's; of a jax.Array each process
    has its shards. The bytes are copies.
    """
    found, first = {}, jax.process_index() == 0
    for name, leaf in leaves.items():
        folder, here = f"state/{name.replace('/', '.')}", isinstance(leaf, np.ndarray)
        parts = [(leaf, (0,) * leaf.ndim)] if here else _shards(leaf)
        shape = leaf.shape if here else leaf.sharding.shard_shape(leaf.shape)
        chunk = _chunk(shape, leaf.dtype.itemsize)
        if first:
            found[f"{folder}/zarr.json"] = zarr_json(leaf.shape, leaf.dtype, chunk)
        for array, start in parts if first or not here else []:
            rows = chunk[0] if chunk else 1
            for row in range(0, len(array) if chunk else 1, rows):
                piece = array[row : row + rows] if chunk else array
                at = [(begin + row * (i == 0)) // chunk[i] for i, begin in enumerate(start)]
                key = ".".join(map(str, at or [0]))
                found[f"{folder}/{key}"] = np.ascontiguousarray(piece).tobytes()
    return found


def _shards(leaf: jax.Array) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """This process's parts of an array, each held by one process only, and where they begin."""
    return [
        (np.asarray(shard.data), tuple(part.start or 0 for part in shard.index))
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """A shard's shape with as many of its rows as fit into BUFFER and divide them evenly."""
    if not shape:
        return ()
    most = max(1, BUFFER // max(1, math.prod(shape[1:]) * itemsize))
    rows = next(n for n in range(min(most, shape[0]), 0, -1) if shape[0] % n == 0)
    return (rows, *shape[1:])


def attempt() -> int:
    """A number that all processes get alike, and another one after every start."""
    drawn = np.int32(secrets.randbelow(2**31))
    return multihost_utils.broadcast_one_to_all(drawn).item()


def write(folder: Object, found: dict[str, bytes], attempt: int) -> None:
    """Put this process's objects; process 0 then waits for the others', and puts the manifest.

    What earlier attempts have left does not count.
    """

    def put(item: tuple[str, bytes]) -> tuple[str, list]:
        name, content = item
        (folder / name).write_bytes(content)
        return name, [len(content), hashlib.sha256(content).hexdigest()]

    files = dict(at_once(put, found.items()))
    tables = [folder / WRITTEN / f"{attempt}-{i}.json" for i in range(jax.process_count())]
    if jax.process_index():
        tables[jax.process_index()].write_text(json.dumps(files))
        return
    for table in tables[1:]:
        while (content := table.read()[0]) is None:  # a process that dies ends all of them
            time.sleep(0.2)
        files |= json.loads(content)
    (folder / MANIFEST).write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1))
    for table in tables[1:]:
        table.unlink()


def load(folder: Object, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Leaves of a checkpoint by their names, with these dtypes and shardings."""
    opened = {name: _open(folder, name) for name in wanted}
    reads: dict[str, dict[str, Any]] = {}
    for name, leaf in wanted.items():
        store, places = opened[name].result(), leaf.sharding.addressable_devices_indices_map
        reads[name] = {str(index): store[index].read() for index in places(leaf.shape).values()}
    loaded = {}
    for name, leaf in wanted.items():
        parts = {index: read.result() for index, read in reads.pop(name).items()}
        loaded[name] = jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda i, p=parts, d=leaf.dtype: p[str(i)].astype(d)
        )
    return loaded


def _open(folder: Object, name: str) -> Any:
    place = kvstore(folder / f"state/{name.replace('/', '.')}")
    return tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True)
