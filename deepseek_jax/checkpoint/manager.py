"""Checkpoints: asynchronous Orbax saves, one leaf a layer on disk, hashed, kept, restored.

Every Orbax call of the package stands in this file (its v1 API still moves). In memory blocks are
stacked `[repeats, ...]` for the scan; on disk `segment_1/block/x` becomes `layer_1/x`, `layer_2/x`,
...: independent of scan, mesh and stages, and readable in pieces. Beside Orbax's state/ stand
config.json, meta.json (step, data position, leaves), the tokenizer's files and manifest.json.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint.experimental import v1 as ocp

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.integrity import resolve as resolve  # for whoever loads
from deepseek_jax.checkpoint.safetensors import Tensor
from deepseek_jax.core import config as core_config
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError

Restored = collections.namedtuple("Restored", "step state position config")
PIECE = 2**28  # bytes that `write_params` hands to the disk at a time
Layers = dict[str, tuple[int, ...]]  # path of a stacked block -> the absolute layers it holds

# Orbax's threads log each failure with its traceback before `save` or `wait` raises it.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.getMessage())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which checkpoints are kept, and whether training goes on while one is written."""

    keep_last: int = 3
    """The newest checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints of steps divisible by this also stay."""
    asynchronous: bool = True

    def __post_init__(self):
        if self.keep_last < 1 or (self.keep_every is not None and self.keep_every < 1):
            given = f"checkpoint.keep_last ({self.keep_last}) and keep_every ({self.keep_every})"
            raise ValueError(f"{given} must be at least 1.")


class Manager:
    """The checkpoints under `directory`, saved and restored; the caller holds `lock_run`.

    `layers` says which paths of the state are stacked blocks, and of which layers. A state's leaves
    are plain arrays (no typed PRNG keys), none of them empty.
    """

    def __init__(self, directory: str | pathlib.Path, config: Checkpoint, layers: Layers):
        self.directory = pathlib.Path(directory).absolute()
        self._config, self._layers = config, layers
        self._last, self._bad = None, set()  # the step written or restored last; damaged ones
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.directory}: cannot be made ({error.strerror})") from None
        if jax.process_index() == 0:
            integrity.remove_leftovers(self.directory)

    def save(self, step: int, state: Any, *, position: int, config: dict, files: dict) -> None:
        """Copy `state` to the host and write it in the background, with `files` {name: bytes}.

        `state` may be donated once this returns. InputError if this save cannot start or the
        previous one failed (the disk is full, for instance).
        """
        self.wait()
        if step == self._last:  # a step's state is a function of the run: nothing can differ
            return
        arrays = _to_disk(state, self._layers)
        files = files | _description(step, position, arrays, config)
        partial = self.directory / f"{step}.saving"
        try:
            with _context():  # Orbax copies what it is given before it returns
                response = ocp.save_async(partial, unflatten_dict(arrays, sep="/"))
        except Exception as error:
            raise self._failure(step, error) from error
        self._writing = self._writer.submit(self._finish, step, partial, response, files)
        if not self._config.asynchronous:
            self.wait()

    def _finish(self, step: int, partial: pathlib.Path, response: Any, files: dict) -> None:
        whole = self.directory / str(step)
        try:
            response.result()
            if jax.process_index() == 0:
                _complete(partial, whole, files)
            self._last = step
            self._bad.discard(step)
            if jax.process_index() == 0:
                known = [s for s in integrity.steps(self.directory) if s <= step]
                sound, every = [s for s in known if s not in self._bad], self._config.keep_every
                keep = [s for s in sound if every and s % every == 0]
                for old in sorted({*known} - {*keep, *sound[-self._config.keep_last :]}):
                    integrity.remove(self.directory / str(old))
        except Exception as error:  # `wait` raises it in the training thread
            raise self._failure(step, error) from error

    def _failure(self, step: int, error: Exception) -> Exception:
        """The error to raise for a save that failed; its partial directory goes."""
        if jax.process_index() == 0:
            integrity.remove_leftovers(self.directory, str(step))
        reason = " ".join(str(error).split())
        if "no space left" in reason.lower() or "quota" in reason.lower():
            reason = "the disk is full"
        elif not isinstance(error, OSError):
            return error
        left = [s for s in integrity.steps(self.directory) if s not in self._bad]
        kept = f"checkpoint {left[-1]} is intact" if left else "there is no earlier one"
        what = f"{self.directory / str(step)}: this checkpoint could not be written: {reason}"
        return InputError(f"{what}; {kept}; make room, then run the same command again to resume")

    def wait(self) -> None:
        """Return once nothing is being written; raises what went wrong with the last save."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    close = wait  # before the process ends

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest good checkpoint with `abstract_state`'s shapes and shardings; None if none.

        Warns about damaged newer ones; InputError if all are damaged or it is of another model.
        """
        self.wait()
        step, fault = None, InputError(f"{self.directory}: damaged, as process 0 says")
        if jax.process_index() == 0:
            try:
                step = integrity.newest_good(self.directory)
            except InputError as error:  # the others must hear of it, or they wait forever
                step, fault = -1, error
        step = multihost_utils.broadcast_one_to_all(np.int32(-2 if step is None else step)).item()
        if step == -1:
            raise fault
        if step == -2:
            return None
        self._last = step
        self._bad.update(s for s in integrity.steps(self.directory) if s > step)
        path = self.directory / str(step)
        state, meta = _from_disk(path, abstract_state, self._layers, "")
        return Restored(step, state, meta["position"], read_config(path))


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """The config that a checkpoint was trained with; `path` is what `resolve` gave."""
    return core_config.read_json(pathlib.Path(path) / "config.json")


def load_params(path: str | pathlib.Path, abstract_params: Any, layers: Layers) -> Any:
    """Only a checkpoint's parameters, with the dtypes and shardings of `abstract_params`.

    `path` is what `resolve` gave. InputError says how another model's parameters differ.
    """
    return _from_disk(pathlib.Path(path).absolute(), abstract_params, layers, "params/")[0]


def _description(step: int, position: int, leaves: dict, config: dict) -> dict[str, bytes]:
    """meta.json and config.json of a checkpoint of these leaves."""
    kinds = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
    meta = {"step": step, "position": position, "leaves": kinds}
    texts = {"meta.json": meta, "config.json": {"version": core_config.VERSION} | config}
    return {name: f"{json.dumps(text, indent=2)}\n".encode() for name, text in texts.items()}


def _complete(partial: pathlib.Path, whole: pathlib.Path, files: dict[str, bytes]) -> None:
    """Add `files` and the manifest to what Orbax wrote, and give it its name."""
    for name, content in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    integrity.write_manifest(partial)
    integrity.remove(whole)  # a damaged one of the same step
    partial.rename(whole)
    integrity.sync(whole.parent)


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly shrink; the cores are training
    split = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=2**26, shard_axes=(0,))
    # Big stacks of experts are read in pieces: by expert, not across them.
    context.array.saving.scoped_storage_options_creator = lambda _, x: split if x.ndim > 2 else None
    context.pytree.loading.partial_load = True
    return context


def disk_names(name: str, shape: tuple[int, ...], layers: Layers) -> list[str] | None:
    """The names on disk of a stacked leaf's layers; None when the leaf is not one."""
    for block, held in layers.items():
        if f"/{block}/" in f"/{name}/" and shape and shape[0] == len(held):
            return [f"/{name}/".replace(f"/{block}/", f"/layer_{i}/", 1)[1:-1] for i in held]
    return None


def _to_disk(state: Any, layers: Layers) -> dict[str, Any]:
    """By path: the arrays on the host, one a layer."""
    leaves = tree.flatten(state)
    jax.copy_to_host_async(leaves)  # every transfer starts before the first is waited for
    arrays = {}
    for name, leaf in leaves.items():
        here = leaf.is_fully_addressable or leaf.is_fully_replicated
        array = np.asarray(leaf) if here else leaf
        rows = disk_names(name, array.shape, layers)
        arrays |= {row: array[i] for i, row in enumerate(rows)} if rows else {name: array}
    return arrays


def _from_disk(path: pathlib.Path, abstract: Any, layers: Layers, prefix: str) -> tuple[Any, dict]:
    """What a verified checkpoint holds under `prefix`, shaped like `abstract`, and its meta.json.

    Leaves without a sharding come to the first local device.
    """
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a checkpoint of this package ({error})") from None
    theirs = {
        name: tuple(json.loads(text[text.index("[") :]))
        for name, text in meta["leaves"].items()
        if name.startswith(prefix)
    }
    wanted, places = {}, {}
    for name, leaf in tree.flatten(abstract).items():
        sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
        rows, shape, lies = disk_names(prefix + name, leaf.shape, layers), leaf.shape, sharding
        if rows and isinstance(sharding, NamedSharding):
            lies = sharding.update(spec=PartitionSpec(*sharding.spec[1:]))
        array = jax.ShapeDtypeStruct(shape[1:] if rows else shape, leaf.dtype, sharding=lies)
        wanted |= dict.fromkeys(rows or [prefix + name], array)
        places[prefix + name] = rows, sharding
    if difference := tree.difference({name: x.shape for name, x in wanted.items()}, theirs):
        raise InputError(f"{path}: this checkpoint is of another model or optimizer: {difference}")
    with _context():
        loaded = tree.flatten(ocp.load(path, unflatten_dict(wanted, sep="/")))
    values = []
    for name, (rows, sharding) in places.items():  # popped: stacked rows are freed as they go
        found = [loaded.pop(row) for row in rows or [name]]
        values.append(jax.jit(jnp.stack, out_shardings=sharding)(found) if rows else found[0])
    return jax.tree.unflatten(jax.tree.structure(abstract), values), meta


def write_params(
    directory: pathlib.Path,
    params: dict[str, Tensor],
    *,
    config: dict,
    files: dict[str, bytes],
    origin: str,
    progress: Callable[[int, int], None],
) -> None:
    """Write parameters, by their names on disk, as the checkpoint `directory`, some at a time.

    At most two pieces of PIECE bytes, or of one leaf, are in memory. What a killed call of the same
    `origin` had written stays in `directory`.parts and is not written again. `progress` is told
    bytes done and in all.
    """
    parts, partial = (directory.with_name(f"{directory.name}.{x}") for x in ("parts", "saving"))
    shutil.rmtree(partial, ignore_errors=True)
    if not (parts / "origin").exists() or (parts / "origin").read_text() != origin:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        (parts / "origin").write_text(origin)
    done = _written(parts)
    sizes = {name: math.prod(x.shape) * x.dtype.itemsize for name, x in params.items()}
    pieces: list[list[str]] = [[]]
    for name in (name for name in params if name not in done):
        if pieces[-1] and sum(sizes[n] for n in pieces[-1]) + sizes[name] > PIECE:
            pieces.append([])
        pieces[-1].append(name)
    written, response = sum(sizes[name] for name in done), None
    with _context():
        for piece in filter(None, pieces):
            arrays = {f"params/{name}": params[name].read() for name in piece}
            if response:
                response.result()
            progress(written, sum(sizes.values()))
            response = ocp.partial.save_async(parts / "step", unflatten_dict(arrays, sep="/"))
            written += sum(sizes[name] for name in piece)
        if response:
            response.result()
        # Joining moves files about: it works on links, so that a kill leaves the parts as they are.
        shutil.copytree(parts, partial, copy_function=_linked)
        ocp.partial.finalize(partial / "step")
    leaves = {f"params/{name}": tensor for name, tensor in params.items()}
    _complete(partial / "step", directory, files | _description(0, 0, leaves, config))
    shutil.rmtree(partial)
    shutil.rmtree(parts)


def _linked(source: str, target: str) -> None:
    """A second name for a large file; a copy of a small one, which may be rewritten in place."""
    if os.path.getsize(source) > 2**16:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


def _written(parts: pathlib.Path) -> set[str]:
    """The parameters that a killed `write_params` has left whole; what is not whole goes."""
    found = set()
    for folder in [*parts.glob("step.partial_save/*"), *parts.glob("*-tmp")]:
        if (folder / "commit_success.txt").exists() and folder.suffix != ".orbax-checkpoint-tmp":
            tree_of = json.loads((folder / "state" / "_METADATA").read_text())["tree_metadata"]
            keys = ([key["key"] for key in leaf["key_metadata"]] for leaf in tree_of.values())
            found |= {"/".join(key[1:]) for key in keys}
        else:
            shutil.rmtree(folder)
    return found


def read_params(path: pathlib.Path) -> dict[str, Tensor]:
    """A checkpoint's parameters by their names on disk, each read when it is asked for."""
    path, found = path.absolute(), {}
    for name, text in json.loads((path / "meta.json").read_text())["leaves"].items():
        dtype, _, sizes = text.partition("[")
        if name.startswith("params/"):
            shape, kind = tuple(json.loads(f"[{sizes}")), jnp.dtype(dtype)
            read = functools.partial(_read_leaf, path, name, shape, kind)
            found[name.removeprefix("params/")] = Tensor(shape, kind, read)
    return found


@functools.lru_cache(maxsize=2)  # of experts, one is asked for after the other
def _read_leaf(path: pathlib.Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    with _context():
        target = unflatten_dict({name: np.empty(shape, dtype)}, sep="/")
        return tree.flatten(ocp.load(path, target))[name]
