"""Folders of tensors as Hugging Face lays them out: safetensors shards with an index, or `.bin`.

Shards are mapped into memory, so a tensor costs what is read of it. Two forms are undone on the
way: transformers 5 may fuse a layer's experts into one tensor, and DeepSeek-V3 stores matrices as
float8 with a scale a block of 128 x 128 (named "inverse", but multiplied). Nothing is unpickled but
by torch's weights-only reader.
"""

import contextlib
import functools
import itertools
import json
import math
import pathlib
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.integrity import sync
from deepseek_jax.checkpoint.parts import BUFFER, Piece, reserve, write_at
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.core.storage import Path, located
from deepseek_jax.data.sources import one_line

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
}  # fmt: skip
DTYPES = {name: jnp.dtype(kind) for name, kind in DTYPES.items()}
FLOAT8, EXPONENT = DTYPES["F8_E4M3"], DTYPES["F8_E8M0"]
NAMES = {kind: name for name, kind in DTYPES.items()}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 128  # rows and columns that share a float8 scale
SCALE = "_scale_inv"
LARGE = threading.Lock()  # of the tensors over a buffer, one is in memory at a time


class Tensor(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    """The values; a view of the file where its form allows that."""


class Source(NamedTuple):
    """Where a weight of ours comes from: `read(index)` gives the part that an index tuple names."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple], np.ndarray]


def open_tensors(directory: str | pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a folder by their names, experts apart and float8 undone.

    Raises InputError, naming the file or tensor, when there are none, a file is not what its header
    says, or the index and the files disagree.
    """
    directory = pathlib.Path(directory)
    found = _unfused(_stored(directory))
    return {
        name: _wide(name, tensor, found.get(name + SCALE))
        for name, tensor in found.items()
        if not name.endswith(SCALE)
    }


def open_scales(directory: str | pathlib.Path) -> dict[str, Tensor]:
    """The scales of a folder's float8 tensors, by the names of these."""
    found = _stored(pathlib.Path(directory))
    return {n.removesuffix(SCALE): tensor for n, tensor in found.items() if n.endswith(SCALE)}


def is_folder_of_tensors(directory: str | Path) -> bool:
    """Whether this looks like a Hugging Face checkpoint rather than one of ours."""
    path = located(directory)
    held = any(next(path.glob(kind), None) for kind in ("*.safetensors*", "pytorch_model*"))
    return held and (path / "config.json").exists()


def _stored(directory: pathlib.Path) -> dict[str, Tensor]:
    for pattern, index, opened in (
        ("*.safetensors", INDEX, mapped),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json", _unpickled),
    ):
        files = sorted(path.name for path in directory.glob(pattern))
        if not files and not (directory / index).exists():
            continue
        listed = _weight_map(directory / index) if (directory / index).exists() else None
        if listed is not None:
            files = sorted(set(listed.values()))
        elif len(files) > 1:
            raise InputError(f"{directory}: {len(files)} files of tensors and no {index}")
        found: dict[str, Tensor] = {}
        for file in files:
            tensors = opened(directory / file)
            for name in tensors:
                if name in found or (listed is not None and listed.get(name) != file):
                    raise InputError(f"{directory / file}: holds {name}, which is listed elsewhere")
            found |= tensors
        if missing := sorted(set(listed or ()) - set(found)):
            raise InputError(f"{directory / index}: lists {missing[0]}, which no file holds")
        return found
    raise InputError(f"{directory}: there are no safetensors or pytorch_model*.bin files")


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    try:
        listed = dict(json.loads(path.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an index of tensors ({error})") from None
    for file in listed.values():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise InputError(f"{path}: names {file!r}, which is no file of this folder")
        if not (path.parent / file).exists():
            raise InputError(f"{path.parent / file}: missing; the index needs it")
    return listed


def mapped(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file: a length, a JSON header, the values."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 10**8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors, ends = {}, []
        for name, entry in header.items():
            dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            if end - begin != math.prod(shape) * dtype.itemsize or min(begin, *shape, 0) < 0:
                raise ValueError(f"{name} does not have the size of its shape")
            ends.append((begin, end))
            tensors[name] = Tensor(shape, dtype, _mapping(path, 8 + length + begin, shape, dtype))
        ends.sort()
        starts = [0, *(end for _, end in ends)]
        if [begin for begin, _ in ends] != starts[:-1]:
            raise ValueError("its tensors overlap or leave gaps")
        if 8 + length + starts[-1] != size:
            raise ValueError(f"it should have {8 + length + starts[-1]} bytes and has {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None
    return tensors


def _mapping(path, offset, shape, dtype) -> Callable[[], np.ndarray]:
    return lambda: np.memmap(path, dtype, "r", offset, shape) if 0 not in shape else np.zeros(0)


def _unpickled(path: pathlib.Path) -> dict[str, Tensor]:
    torch = require("torch")
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        tensors = {name: _of_torch(tensor) for name, tensor in loaded.items()}
    except Exception as error:  # torch raises what pickle does, and more
        raise InputError(f"{path}: not a file of tensors alone ({one_line(error)})") from None
    return {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}


def _of_torch(tensor: Any) -> np.ndarray:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind == "bfloat16" or kind.startswith("float8"):  # numpy has no such type: the bits move
        bits = require("torch").uint8 if tensor.element_size() == 1 else require("torch").int16
        return tensor.contiguous().view(bits).numpy().view(jnp.dtype(kind))
    return tensor.numpy()


def _unfused(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5's fused experts as the hub's: one gate, up and down an expert."""
    found = {}
    for name, tensor in stored.items():
        match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if not match or len(tensor.shape) != 3:
            found[name] = tensor
            continue
        count, rows, columns = tensor.shape
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        rows //= len(parts)
        for expert in range(count):
            for number, part in enumerate(parts):
                index = expert, slice(number * rows, (number + 1) * rows)
                found[f"{match[1]}.{expert}.{part}.weight"] = Tensor(
                    (rows, columns), tensor.dtype, lambda t=tensor, i=index: t.read()[i]
                )
    return found


def _wide(name: str, tensor: Tensor, scale: Tensor | None) -> Tensor:
    """A tensor as numbers to use: float8 times its blocks' scales, float32."""
    if scale is None:
        if tensor.dtype.itemsize == 1 and tensor.dtype.kind not in "bui":
            raise InputError(f"{name}: float8 without its {name + SCALE}")
        return tensor
    blocks = tuple(-(-n // BLOCK) for n in tensor.shape)
    if len(blocks) != 2 or scale.shape != blocks:
        raise InputError(f"{name + SCALE}: has shape {scale.shape}; {tensor.shape} needs {blocks}")
    read = lambda: dequantized(tensor.read(), scale.read())  # noqa: E731
    return Tensor(tensor.shape, np.dtype(np.float32), read)


def dequantized(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 [R, C] of float8 values and a scale a block of 128 x 128; edges may be short."""
    if scales.dtype == np.uint8:  # e8m0 as its bits
        scales = scales.view(EXPONENT)
    wide = scales.astype(np.float32).repeat(BLOCK, 0)[: values.shape[0]]
    return values.astype(np.float32) * wide.repeat(BLOCK, 1)[:, : values.shape[1]]


def quantized(wide: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """Float8 e4m3 values and float32 scales a block of 128 x 128, its largest value at 448."""
    rows, columns = wide.shape
    edges = [(0, -rows % BLOCK), (0, -columns % BLOCK)]
    blocks = np.abs(np.pad(wide.astype(np.float32), edges))
    blocks = blocks.reshape(-1, BLOCK, blocks.shape[1] // BLOCK, BLOCK).max((1, 3))
    scales = np.where(blocks == 0, 1, blocks / np.float32(448)).astype(np.float32)
    if power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales))).astype(np.float32)
    return narrowed(wide, scales), scales


def narrowed(wide: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float8 values nearest to `wide` over given scales; too large ones are clipped."""
    ones = np.ones(wide.shape, FLOAT8)
    ratio = wide.astype(np.float32) / dequantized(ones, scales)
    return np.clip(ratio, -448, 448).astype(FLOAT8)


class Entry(NamedTuple):
    """A tensor to write, made when its turn comes, by `read` in any dtype and layout."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(directory: pathlib.Path, entries: Iterable[Entry], max_bytes: int) -> None:
    """Write safetensors shards of at most `max_bytes` (or of one tensor), and their index."""
    files = shards(entries, max_bytes)
    for name, held in files.items():
        write_shard(directory / name, held)
    write_index(directory, files)


def shards(entries: Iterable[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """Which tensors go into which file of at most `max_bytes`, or of one tensor."""
    found: list[list[Entry]] = [[]]
    for entry in entries:
        if found[-1] and sum(e.size for e in found[-1]) + entry.size > max_bytes:
            found.append([])
        found[-1].append(entry)
    if len(found) == 1:
        return {WHOLE: found[0]}
    name = "model-{:05d}-of-{:05d}.safetensors".format
    return {name(number, len(found)): shard for number, shard in enumerate(found, 1)}


def write_index(directory: pathlib.Path, files: dict[str, list[Entry]]) -> None:
    """Write the index of several shards; one alone has none."""
    if len(files) == 1:
        return
    weight_map = {entry.name: file for file, shard in files.items() for entry in shard}
    total = sum(entry.size for shard in files.values() for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def to_pickle(directory: pathlib.Path) -> None:
    """Turn a folder's one safetensors file into PyTorch's form, its values mapped, not read."""
    stored, target = directory / WHOLE, directory / "pytorch_model.bin"
    if not stored.exists():  # a killed call had come so far
        return
    torch = require("torch")
    state = {}
    for name, tensor in mapped(stored).items():
        kind = getattr(torch, tensor.dtype.name)
        if 0 in tensor.shape:
            state[name] = torch.empty(tensor.shape, dtype=kind)
            continue
        bits = np.dtype(f"int{8 * tensor.dtype.itemsize}")
        values = np.memmap(stored, bits, "c", tensor.read().offset, tensor.shape)
        state[name] = torch.from_numpy(values).view(kind)
    torch.save(state, target)
    sync(target)
    stored.unlink()


def write_shard(path: pathlib.Path, entries: list[Entry]) -> None:
    """Write one safetensors file."""
    piece = shard_piece(path.name, entries)
    piece.begin(path)
    for _, task in piece.tasks:
        task(path)


def shard_piece(name: str, entries: list[Entry]) -> Piece:
    """One safetensors file, whose tensors several threads write; scales go with their values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.size
        kind = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape)}
        header[entry.name] = kind | {"data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def start(path: pathlib.Path) -> None:
        reserve(path, 8 + len(text) + end)
        with path.open("r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)

    def fill(some: list[Entry], path: pathlib.Path) -> dict[str, Any]:
        with LARGE if some[0].size > BUFFER else contextlib.nullcontext():
            for entry in some:
                start = 8 + len(text) + header[entry.name]["data_offsets"][0]
                write_at(path, start, entry.read(), entry.dtype)
        return {}

    groups = itertools.groupby(entries, lambda entry: entry.name.removesuffix(SCALE))
    held = [list(group) for _, group in groups]
    tasks = [(sum(e.size for e in some), functools.partial(fill, some)) for some in held]
    return Piece(name, start, tasks)
