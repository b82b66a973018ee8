"""Emergency checkpoints on each host's own disk: every process writes what its devices hold.

They are written often, beside the durable ones, and serve only the same run on the same mesh and
processes, on hosts that come back with their disks; then nothing is read over the network. A folder
is `<directory>/<run>/process_<i>_of_<n>/<step>`: state.bin (the shards' bytes, one after another),
meta.json and manifest.json. Whatever is missing or damaged anywhere, the durable ones stand in.
"""

import concurrent.futures
import functools
import hashlib
import json
import pathlib
import secrets
import shutil
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.checkpoint import integrity
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import Path, put

KEPT = 2  # when a kill comes, one process may have written a step that another has not
TOLD = 8  # steps that a process tells the others of
# (step, what was saved about it) -> that state's shapes and shardings.
Abstract: TypeAlias = Callable[[int, dict[str, Any]], Any]


def run_name(run_dir: Path) -> str:
    """The random name of a run, made with its directory: all processes get the same."""
    name = 0
    if jax.process_index() == 0:
        file = run_dir / "run_name"
        if not file.exists():
            put(file, str(secrets.randbelow(2**31)).encode())
        name = int(file.read_text())
    return f"{multihost_utils.broadcast_one_to_all(np.int32(name)).item():08x}"


class LocalCheckpoints:
    """This process's emergency checkpoints under `directory` of the run of this name.

    Raises InputError when the directory cannot be made.
    """

    def __init__(self, directory: str | pathlib.Path, run: str):
        own = f"process_{jax.process_index()}_of_{jax.process_count()}"
        self._folder = pathlib.Path(directory) / run / own
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self._folder}: cannot be made ({error.strerror})") from None
        integrity.remove_leftovers(self._folder)

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Copy this process's shards to the host and write them in the background, with `about`.

        `state` may be donated once this returns. Raises what went wrong with the save before.
        """
        self.wait()
        leaves = tree.flatten(state)
        jax.copy_to_host_async(leaves)
        shards = {
            name: {
                _span(shard.index, leaf.shape): np.array(shard.data)
                for shard in leaf.addressable_shards
            }
            for name, leaf in leaves.items()
        }
        self._writing = self._writer.submit(self._write, step, shards, about)

    def _write(self, step: int, shards: dict[str, dict], about: dict[str, Any]) -> None:
        partial = self._folder / f"{step}.saving"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        places, digest, end = {}, hashlib.sha256(), 0
        with (partial / "state.bin").open("wb") as file:
            for name, parts in shards.items():
                for span, array in parts.items():
                    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    digest.update(content)
                    file.write(content)
                    places[f"{name} {array.dtype} {span}"] = end
                    end += content.size
        (partial / "meta.json").write_text(json.dumps({"about": about, "places": places}))
        integrity.write_manifest(partial, {"state.bin": [end, digest.hexdigest()]})
        integrity.remove(self._folder / str(step))
        partial.rename(self._folder / str(step))
        integrity.sync(self._folder)
        for old in integrity.steps(self._folder)[:-KEPT]:
            integrity.remove(self._folder / str(old))

    def wait(self) -> None:
        """Return once nothing is being written; raises what went wrong with the last save."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def newest(self, abstract: Abstract) -> int:
        """The newest step that every process has, whole and for these shardings; -1: none."""
        mine = [step for step in integrity.steps(self._folder) if self._serves(step, abstract)]
        told = np.int32([-1] * TOLD + mine)[-TOLD:]
        everyone = multihost_utils.process_allgather(told).reshape(-1, TOLD)
        return int(max(functools.reduce(np.intersect1d, everyone), default=-1))

    def _serves(self, step: int, abstract: Abstract) -> bool:
        folder = self._folder / str(step)
        if integrity.damage(folder):
            return False
        meta = json.loads((folder / "meta.json").read_text())
        wanted = _places(abstract(step, meta["about"])).values()
        return {place for places in wanted for place, _ in places} <= meta["places"].keys()

    def restore(self, step: int, abstract: Abstract) -> tuple[Any, dict[str, Any]]:
        """The state of a step that `newest` gave, and what was saved about it."""
        folder = self._folder / str(step)
        meta = json.loads((folder / "meta.json").read_text())
        content = np.memmap(folder / "state.bin", np.uint8, "r")
        wanted = abstract(step, meta["about"])
        leaves, values = tree.flatten(wanted), []
        for name, places in _places(wanted).items():
            leaf, parts = leaves[name], []
            shape = leaf.sharding.shard_shape(leaf.shape)
            size = int(np.prod(shape)) * leaf.dtype.itemsize
            for place, device in places:
                start = meta["places"][place]
                part = np.array(content[start : start + size]).view(leaf.dtype).reshape(shape)
                parts.append(jax.device_put(part, device))
            whole = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
            values.append(whole)
        return jax.tree.unflatten(jax.tree.structure(wanted), values), meta["about"]

    def remove(self) -> None:
        """Delete them: everything is in a durable checkpoint."""
        self.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _span(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    spans = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return " ".join(f"{start}:{stop}" for start, stop in spans)


def _places(abstract: Any) -> dict[str, list[tuple[str, jax.Device]]]:
    """By leaf: how each local device's part is named in a meta.json, and that device."""
    return {
        name: [
            (f"{name} {leaf.dtype} {_span(index, leaf.shape)}", device)
            for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
        ]
        for name, leaf in tree.flatten(abstract).items()
    }
