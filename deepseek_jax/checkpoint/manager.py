"""Checkpoints: asynchronous Orbax saves, one leaf a layer on disk, hashed, kept, restored.

Every Orbax call of the package stands in this file (its v1 API still moves). In memory blocks are
stacked `[repeats, ...]` for the scan; on disk `segment_1/block/x` becomes `layer_1/x`, `layer_2/x`,
...: independent of scan, mesh and stages, and readable in pieces. Beside Orbax's state/ stand
config.json, meta.json (step, data position, leaves), the tokenizer's files and manifest.json. In a
bucket the same files are objects, written without Orbax (checkpoint/objects.py).
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint.experimental import v1 as ocp

from deepseek_jax.checkpoint import integrity, objects
from deepseek_jax.checkpoint.integrity import resolve as resolve  # for whoever loads
from deepseek_jax.checkpoint.params import add_files, description, orbax_files
from deepseek_jax.core import config as core_config
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import Object, Path, located

Restored = collections.namedtuple("Restored", "step state position config")
REST = "left_out/"  # of a state: what int4 gradients between slices have not sent yet
DROPPED = "what gradients had left out is of other slices and dropped: less than a step's rounding"
Layers = dict[str, tuple[int, ...]]  # path of a stacked block -> the absolute layers it holds

# Orbax's threads log each failure with its traceback before `save` or `wait` raises it, and it
# does not take a plain zarr folder for data.
NOISE = ("_SignalingThread", "TensorStore data files not found")
logging.getLogger("absl").addFilter(lambda record: not any(n in record.getMessage() for n in NOISE))


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

    def __init__(self, directory: str | Path, config: Checkpoint, layers: Layers):
        self.directory = located(directory).absolute()
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
        self._attempt = objects.attempt() if isinstance(self.directory, Object) else 0

    def save(self, step: int, state: Any, *, position: int, config: dict, files: dict) -> None:
        """Copy `state` to the host and write it in the background, with `files` {name: bytes}.

        `state` may be donated once this returns. InputError if this save cannot start or the
        previous one failed (the disk is full, for instance).
        """
        self.wait()
        if step == self._last:  # a step's state is a function of the run: nothing can differ
            return
        arrays = _to_disk(state, self._layers)
        files = files | description(step, position, arrays, config)
        try:
            write = self._begun(step, arrays, files)
        except Exception as error:
            raise self._failure(step, error) from error
        self._writing = self._writer.submit(self._finish, step, write)
        if not self._config.asynchronous:
            self.wait()

    def _begun(self, step: int, arrays: dict, files: dict) -> Callable[[], None]:
        """What completes a save; `arrays` are copied by now."""
        whole, partial = self.directory / str(step), self.directory / f"{step}.saving"
        if isinstance(whole, Object):
            found = objects.contents(arrays)
            if jax.process_index() == 0:
                found |= files | orbax_files(arrays)
            return functools.partial(objects.write, whole, found, self._attempt)
        with _context():  # Orbax copies what it is given before it returns
            response = ocp.save_async(partial, unflatten_dict(arrays, sep="/"))

        def complete() -> None:
            response.result()
            if jax.process_index() == 0:
                _complete(partial, whole, files)

        return complete

    def _finish(self, step: int, write: Callable[[], None]) -> None:
        try:
            write()
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
        if isinstance(self.directory, Object):
            return error
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

    def newest(self) -> int | None:
        """The newest good step, the same for all processes; None if there are no checkpoints.

        Warns about damaged newer ones; InputError if all are damaged.
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
        return None if step == -2 else step

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The checkpoint that `newest` gave, by default asked again; None if there is none.

        Its state has the shapes and shardings of `abstract_state`; InputError if it is of another
        model.
        """
        if step is None and (step := self.newest()) is None:
            return None
        self._last = step
        self._bad.update(s for s in integrity.steps(self.directory) if s > step)
        path = self.directory / str(step)
        state, meta = _from_disk(path, abstract_state, self._layers, "")
        return Restored(step, state, meta["position"], read_config(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """The config that a checkpoint was trained with; `path` is what `resolve` gave."""
    return core_config.read_json(located(path) / "config.json")


def last_stage(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded config as its last stage had it: data, sequence_length, objective and so on."""
    own = recorded.get("stages", [{}])[-1]
    return recorded | {name: value for name, value in own.items() if value is not None}


def load_params(path: str | pathlib.Path, abstract_params: Any, layers: Layers) -> Any:
    """Only a checkpoint's parameters, with the dtypes and shardings of `abstract_params`.

    `path` is what `resolve` gave. InputError says how another model's parameters differ.
    """
    return _from_disk(pathlib.Path(path).absolute(), abstract_params, layers, "params/")[0]


def _complete(partial: pathlib.Path, whole: pathlib.Path, files: dict[str, bytes]) -> None:
    """Add `files` and the manifest to what Orbax wrote, and give it its name."""
    add_files(partial, files)
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


def _rests(shapes: dict[str, tuple]) -> dict[str, tuple]:
    return {name: shape for name, shape in shapes.items() if name.startswith(REST)}


def disk_names(name: str, shape: tuple[int, ...], layers: Layers) -> list[str] | None:
    """The names on disk of a stacked leaf's layers; None when the leaf is not one.

    A stack is called segment_0/block, and in a model of several parts image/segment_0/block.
    """
    for block, held in layers.items():
        if f"/{block}/" in f"/{name}/" and shape and shape[0] == len(held):
            *part, _, _ = block.split("/")
            there = ["/".join(["", *part, f"layer_{i}", ""]) for i in held]
            return [f"/{name}/".replace(f"/{block}/", one, 1)[1:-1] for one in there]
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


def _from_disk(path: Path, abstract: Any, layers: Layers, prefix: str) -> tuple[Any, dict]:
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
    wanted, places, leaves = {}, {}, tree.flatten(abstract)
    for name, leaf in leaves.items():
        sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
        rows, shape, lies = disk_names(prefix + name, leaf.shape, layers), leaf.shape, sharding
        if rows and isinstance(sharding, NamedSharding):
            lies = sharding.update(spec=PartitionSpec(*sharding.spec[1:]))
        array = jax.ShapeDtypeStruct(shape[1:] if rows else shape, leaf.dtype, sharding=lies)
        wanted |= dict.fromkeys(rows or [prefix + name], array)
        places[prefix + name] = rows, sharding
    rests = _rests({name: x.shape for name, x in wanted.items()}), _rests(theirs)
    anew = rests[0] != rests[1]  # other slices than those that left it out, or none
    if anew:
        wanted = {name: x for name, x in wanted.items() if name not in rests[0]}
        theirs = {name: shape for name, shape in theirs.items() if name not in rests[1]}
        if rests[1]:
            print(f"warning: {path}: {DROPPED}", file=sys.stderr)
    if difference := tree.difference({name: x.shape for name, x in wanted.items()}, theirs):
        raise InputError(f"{path}: this checkpoint is of another model or optimizer: {difference}")
    if isinstance(path, Object):
        loaded = objects.load(path, wanted)
    else:
        with _context():
            loaded = tree.flatten(ocp.load(path, unflatten_dict(wanted, sep="/")))
    values = []
    for name, (rows, sharding) in places.items():  # popped: stacked rows are freed as they go
        if anew and name.startswith(REST):
            nothing = functools.partial(jnp.zeros, leaves[name].shape, leaves[name].dtype)
            values.append(jax.jit(nothing, out_shardings=sharding)())
            continue
        found = [loaded.pop(row) for row in rows or [name]]
        values.append(jax.jit(jnp.stack, out_shardings=sharding)(found) if rows else found[0])
    return jax.tree.unflatten(jax.tree.structure(abstract), values), meta
