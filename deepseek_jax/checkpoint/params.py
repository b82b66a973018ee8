"""Checkpoints as plain zarr folders, which Orbax opens but did not write.

What stands in one beside the arrays; parameters alone, written in pieces by any processes and read
leaf by leaf.
"""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore

from deepseek_jax.checkpoint import integrity, objects
from deepseek_jax.checkpoint.parts import BUFFER, Piece, in_parts, reserve, write_at
from deepseek_jax.checkpoint.safetensors import Source
from deepseek_jax.core import config as core_config

MAPPED = tensorstore.Context({"file_io_mode": {"mode": "memmap"}})


def write_params(
    directory: pathlib.Path,
    params: dict[str, Source],
    part: tuple[int, int],
    *,
    config: dict,
    files: dict[str, bytes],
    origin: Any,
    progress: Callable[[int, int], None],
) -> list[int]:
    """Write parameters, by their names on disk, as the checkpoint `directory`: see `in_parts`.

    Values are cast to their source's dtype. A leaf is a plain zarr folder, which Orbax opens like
    one in its database, but which any process may write and nothing copies: a file holds one
    expert, or rows of at most BUFFER bytes.
    """

    def finish(whole: pathlib.Path, known: dict[str, Any]) -> None:
        leaves = {f"params/{name}": source for name, source in params.items()}
        add_files(whole, files | orbax_files(leaves) | description(0, 0, leaves, config))
        integrity.write_manifest(whole, known)

    pieces = [_leaf_piece(name, source) for name, source in params.items()]
    return in_parts(directory, pieces, part, origin=origin, finish=finish, progress=progress)


def _leaf_piece(name: str, source: Source) -> Piece:
    folder = f"state/params.{name.replace('/', '.')}"
    (length, *inner), dtype = source.shape, source.dtype
    size = math.prod(source.shape) * dtype.itemsize
    experts = "/experts/" in name
    rows = 1 if experts else math.ceil(length / math.ceil(size / BUFFER))

    def begin(path: pathlib.Path) -> None:
        path.mkdir()
        (path / "zarr.json").write_bytes(objects.zarr_json(source.shape, dtype, (rows, *inner)))

    def fill(number: int, values: np.ndarray, path: pathlib.Path) -> dict[str, Any]:
        file, digest = path / ".".join([str(number), *"0" * len(inner)]), hashlib.sha256()
        full = rows * math.prod(inner) * dtype.itemsize
        reserve(file, full)
        write_at(file, 0, values, dtype, digest)
        digest.update(bytes(full - values.size * dtype.itemsize))  # the last file is a full one
        return {f"{folder}/{file.name}": [full, digest.hexdigest()]}

    def expert(number: int, path: pathlib.Path) -> dict[str, Any]:
        return fill(number, source.read((number,)), path)

    def rest(path: pathlib.Path) -> dict[str, Any]:
        values, said = source.read(()), {}
        for number, start in enumerate(range(0, length, rows)):
            said |= fill(number, values[start : start + rows], path)
        return said

    each = [(size // length, functools.partial(expert, number)) for number in range(length)]
    return Piece(folder, begin, each if experts else [(size, rest)])


def description(step: int, position: int, leaves: dict, config: dict) -> dict[str, bytes]:
    """meta.json and config.json of a checkpoint of these leaves."""
    kinds = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
    meta = {"step": step, "position": position, "leaves": kinds}
    texts = {"meta.json": meta, "config.json": {"version": core_config.VERSION} | config}
    return {name: f"{json.dumps(text, indent=2)}\n".encode() for name, text in texts.items()}


def add_files(directory: pathlib.Path, files: dict[str, bytes]) -> None:
    """Write `files` {name: bytes} under a directory."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def orbax_files(leaves: Iterable[str]) -> dict[str, bytes]:
    """What Orbax 0.12 writes beside the arrays, for plain zarr folders of NumPy arrays."""
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    tables = {"item_handlers": {"state": handler}, "metrics": {}, "performance_metrics": {}}
    times = {"init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0}  # a conversion has no date
    kind = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree_of = {}
    for name in leaves:
        keys = name.split("/")
        metadata = [{"key": key, "key_type": 2} for key in keys]
        tree_of[str(tuple(keys))] = {"key_metadata": metadata, "value_metadata": kind}
    flags = {"use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
    texts = {
        "_CHECKPOINT_METADATA": tables | times | {"custom_metadata": {}},
        "state/_METADATA": {"tree_metadata": tree_of} | flags | {"custom_metadata": None},
    }
    written = {name: json.dumps(text).encode() for name, text in texts.items()}
    return written | {"orbax.checkpoint": b"", "commit_success.txt": b"Checkpoint commit\n"}


def read_params(path: pathlib.Path) -> dict[str, Source]:
    """A checkpoint's parameters by their names on disk, each read when it is asked for.

    Of a leaf only what the index names is read, out of files mapped into memory.
    """
    state, found = path.absolute() / "state", {}
    how = json.loads((state / "_METADATA").read_text())
    for name, text in json.loads((path / "meta.json").read_text())["leaves"].items():
        if name.startswith("params/"):
            dtype, _, sizes = text.partition("[")
            read = _reader(state, name.replace("/", "."), how)
            source = Source(tuple(json.loads(f"[{sizes}")), jnp.dtype(dtype), read)
            found[name.removeprefix("params/")] = source
    return found


def _reader(state: pathlib.Path, leaf: str, how: dict) -> Callable[[tuple], np.ndarray]:
    files = {"driver": "file", "path": f"{state}/"}
    store = {"driver": "ocdbt", "base": files, "path": f"{leaf}/"}
    if not how["use_ocdbt"]:
        store = files | {"path": f"{state}/{leaf}/"}
    spec = {"driver": "zarr3" if how["use_zarr3"] else "zarr", "kvstore": store}
    opened = functools.cache(lambda: tensorstore.open(spec, read=True, context=MAPPED).result())
    return lambda index: opened()[index].read(order="C").result()
