"""Checkpoints: asynchronous Orbax saves, one leaf a layer on disk, hashed, kept, restored.

Every Orbax call of the package stands in this file (its v1 API still moves). In memory blocks are
stacked `[repeats, ...]` for the scan; on disk `segment_1/block_0/x` becomes `layer_1/x`,
`layer_2/x`, ...: independent of scan, mesh and stages, and readable in pieces. A checkpoint holds

  state/ (Orbax)   config.json   meta.json (step, data position, leaves)   tokenizer files
  manifest.json (see integrity.py)

Left out: saving per-host data positions (the position is one integer, the same everywhere).
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from orbax.checkpoint.experimental import v1 as ocp

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.integrity import lock_run, resolve
from deepseek_jax.core import config as core_config
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError

__all__ = ["Checkpoint", "Layers", "Manager", "Restored", "load_params", "lock_run", "read_config"]
__all__ += ["resolve"]

Layers = dict[str, tuple[int, ...]]  # path of a stacked block -> the absolute layers it holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which checkpoints are kept, and whether training goes on while one is written."""

    keep_last: int = 3
    """The newest checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints of steps divisible by this also stay."""
    asynchronous: bool = True

    def __post_init__(self):
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {self.keep_last}; it must be at least 1.")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"checkpoint.keep_every is {self.keep_every}; it must be at least 1.")


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: Any
    position: int
    config: dict[str, Any]


class Manager:
    """Saves and restores the checkpoints of one run; the caller holds `lock_run`."""

    def __init__(self, directory: str | pathlib.Path, config: Checkpoint, layers: Layers):
        """`directory` is the run's checkpoints/ (made if missing); what killed saves left goes."""
        self.directory = pathlib.Path(directory).absolute()
        self.config = config
        self.layers = layers
        self._good: set[int] = set()  # steps that this process wrote or verified
        self._bad: set[int] = set()
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{self.directory}: {error.strerror}") from None
            for pattern in ("*.saving*", "*.deleting"):
                for leftover in self.directory.glob(pattern):
                    shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self,
        step: int,
        state: Any,
        *,
        position: int,
        config: dict[str, Any],
        files: dict[str, bytes],
    ) -> None:
        """Copy `state` to the host and write it in the background, with the small files beside it.

        `state` may be donated or overwritten as soon as this returns. Raises InputError when this
        save cannot start or the previous one failed (the disk is full, for instance).
        """
        self.wait()
        if step in self._good:  # nothing can have changed: a step's state is a function of the run
            return
        arrays, scalars, keys = _to_disk(state, self.layers)
        meta = {
            "step": step,
            "position": position,
            "leaves": {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()},
            "scalars": scalars,
            "keys": keys,
        }
        texts = {
            "meta.json": json.dumps(meta, indent=1).encode() + b"\n",
            "config.json": _config_text(config),
        }
        try:
            with _context():
                saving = self._path(step, ".saving")
                if jax.process_index() == 0:
                    shutil.rmtree(saving, ignore_errors=True)
                stored = {name: a for name, a in arrays.items() if a.size}  # Orbax refuses empty
                response = ocp.save_async(saving, _nest(stored))
        except Exception as error:
            raise self._failure(step, error) from error
        self._writer = threading.Thread(target=self._finish, args=(step, response, texts | files))
        self._writer.start()
        if not self.config.asynchronous:
            self.wait()

    def _finish(self, step: int, response: Any, files: dict[str, bytes]) -> None:
        try:
            response.result()
            if jax.process_index() != 0:
                return
            saving, final = self._path(step, ".saving"), self._path(step)
            for name, content in files.items():
                path = saving / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            integrity.write_manifest(saving)
            integrity.remove(final)  # a damaged one of the same step
            saving.rename(final)
            integrity.sync_directory(self.directory)
            self._good.add(step)
            self._bad.discard(step)
            self._retire(step)
        except Exception as error:
            self._error = self._failure(step, error)

    def _failure(self, step: int, error: Exception) -> Exception:
        """The error to raise for a save that failed; its partial directory goes."""
        for leftover in self.directory.glob(f"{step}.saving*"):
            shutil.rmtree(leftover, ignore_errors=True)
        text = " ".join(str(error).split())
        full = "no space left" in text.lower() or "quota" in text.lower()
        if not full and not isinstance(error, OSError):
            return error
        reason = "the disk is full" if full else text[:200]
        left = [s for s in integrity.steps(self.directory) if s not in self._bad]
        kept = f"checkpoint {self._path(left[-1])} is intact" if left else "there is no earlier one"
        return InputError(
            f"{self._path(step)}: this checkpoint could not be written: {reason}; {kept}; "
            "free some space and run the same command again to resume"
        )

    def _retire(self, newest: int) -> None:
        every = self.config.keep_every
        known = [s for s in integrity.steps(self.directory) if s <= newest]
        sound = [s for s in known if s not in self._bad]
        keep = set(sound[-self.config.keep_last :])
        keep |= {s for s in sound if every and s % every == 0}
        for step in known:
            if step not in keep:
                integrity.remove(self._path(step))
                self._good.discard(step)

    def wait(self) -> None:
        """Return once nothing is being written; raises what went wrong with the last save."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """The same as `wait`: call it before the process ends."""
        self.wait()

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest good checkpoint as arrays with `abstract_state`'s shapes and shardings.

        None when there is no checkpoint. Warns about damaged newer ones; InputError when all are
        damaged or the checkpoint is of another model.
        """
        self.wait()
        step = _agreed(lambda: integrity.newest_good(self.directory))
        if step is None:
            return None
        self._good.add(step)
        self._bad.update(s for s in integrity.steps(self.directory) if s > step)
        path = self._path(step)
        meta = _read_meta(path)
        state = _from_disk(path, meta, abstract_state, self.layers, "")
        return Restored(step, state, meta["position"], read_config(path))

    def _path(self, step: int, suffix: str = "") -> pathlib.Path:
        return self.directory / f"{step}{suffix}"


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """The config that a checkpoint was trained with; `path` as `resolve` takes it."""
    path = pathlib.Path(path)
    return core_config.read_json(
        (path if integrity.is_step(path) else resolve(path)) / "config.json"
    )


def load_params(path: str | pathlib.Path, abstract_params: Any, layers: Layers) -> Any:
    """Only the parameters of a checkpoint, with `abstract_params`'s dtypes and shardings.

    `path` is what `resolve` gave (or takes). InputError says how another model's differ.
    """
    path = pathlib.Path(path)
    path = path if integrity.is_step(path) else resolve(path)
    return _from_disk(path, _read_meta(path), abstract_params, layers, "params")


def _agreed(choose: Any) -> int | None:
    """What process 0 chooses, on every process."""
    if jax.process_count() == 1:
        return choose()
    chosen = choose() if jax.process_index() == 0 else None
    agreed = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if chosen is None else chosen)))
    return None if agreed < 0 else agreed


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly shrink; the cores are training
    context.pytree.loading.partial_load = True
    return context


def _config_text(config: dict[str, Any]) -> bytes:
    return (json.dumps({"version": core_config.VERSION, **config}, indent=2) + "\n").encode()


def _read_meta(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a checkpoint of this package ({error})") from None


def _split(name: str, shape: tuple[int, ...], layers: Layers) -> list[str] | None:
    """The names on disk of a stacked leaf's layers; None when the leaf is not one."""
    for block, indices in layers.items():
        if f"/{block}/" in f"/{name}/" and shape and shape[0] == len(indices):
            return [f"/{name}/".replace(f"/{block}/", f"/layer_{i}/", 1)[1:-1] for i in indices]
    return None


def _nest(leaves: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, nested)[last] = leaf
    return nested


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_disk(state: Any, layers: Layers) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """By path: host copies of the arrays, one a layer; plain numbers; the kinds of PRNG keys."""
    leaves = tree.flatten(state)
    scalars = {n: x for n, x in leaves.items() if isinstance(x, bool | int | float | str)}
    sources = {n: x for n, x in leaves.items() if n not in scalars}
    keys = {n: str(jax.random.key_impl(x)) for n, x in sources.items() if _is_key(x)}
    sources |= {n: jax.random.key_data(sources[n]) for n in keys}
    for source in sources.values():  # start every transfer before waiting for the first
        if isinstance(source, jax.Array) and source.is_fully_addressable:
            source.copy_to_host_async()
    arrays = {}
    for name, source in sources.items():
        spread = isinstance(source, jax.Array) and not (
            source.is_fully_addressable or source.is_fully_replicated
        )
        # A copy in either case: the next step overwrites the state while Orbax is still writing.
        array = jnp.copy(source) if spread else np.array(source)
        rows = _split(name, array.shape, layers)
        arrays |= {name: array} if rows is None else {r: array[i] for i, r in enumerate(rows)}
    return arrays, scalars, keys


def _inner(sharding: Sharding) -> Sharding:
    """The sharding of one row of a stacked array."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*sharding.spec[1:])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


@functools.lru_cache(maxsize=256)
def _stack(sharding: Sharding) -> Any:
    return jax.jit(lambda *rows: jnp.stack(rows), out_shardings=sharding)


def _from_disk(
    path: pathlib.Path, meta: dict[str, Any], abstract: Any, layers: Layers, prefix: str
) -> Any:
    """The leaves under `prefix` of a verified checkpoint, shaped and placed like `abstract`."""
    wanted, rows_of, theirs = {}, {}, {}
    for name, text in meta["leaves"].items():
        if name.startswith(f"{prefix}/") or not prefix:
            dtype, _, shape = text.partition("[")
            theirs[name] = jax.ShapeDtypeStruct(json.loads(f"[{shape}"), jnp.dtype(dtype))
    leaves = {f"{prefix}/{n}" if prefix else n: x for n, x in tree.flatten(abstract).items()}
    for name, leaf in leaves.items():
        if name in meta["scalars"]:
            continue
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        rows = _split(name, data.shape, layers)
        rows_of[name] = rows, sharding
        shape, inner = (
            (data.shape, sharding) if rows is None else (data.shape[1:], _inner(sharding))
        )
        for row in [name] if rows is None else rows:
            wanted[row] = jax.ShapeDtypeStruct(shape, data.dtype, sharding=inner)
    if difference := tree.difference(wanted, theirs):
        raise InputError(f"{path}: this checkpoint is of another model: {difference}")
    with _context():
        loaded = ocp.load(path, _nest({name: x for name, x in wanted.items() if x.size}))
    loaded = tree.flatten(loaded)
    loaded |= {
        name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
        for name, x in wanted.items()
        if not x.size
    }

    def assemble(name: str, leaf: Any) -> Any:
        if name in meta["scalars"]:
            value = meta["scalars"][name]
            return jnp.asarray(value, leaf.dtype) if hasattr(leaf, "dtype") else value
        rows, sharding = rows_of[name]
        whole = loaded.pop(name) if rows is None else _stack(sharding)(*map(loaded.pop, rows))
        kind = meta["keys"].get(name)
        return jax.random.wrap_key_data(whole, impl=kind) if kind else whole

    values = [assemble(name, leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), values)
