"""Compile for chips that are not here, and read what the compiler made of it.

PyPI's `libtpu` holds the real TPU compiler and runs on any x86 host. From its program come the
bytes a device holds and, in its text, every collective: how often a step runs it (loops included),
what a device sends by the ring's count, and which mesh axes it joins. FLOPs are not read here: the
compiler counts a loop's body once (models/counts does it by formula).
"""

import collections
import contextlib
import functools
import itertools
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require


class Chip(NamedTuple):
    """Published figures of one JAX device, beside its FLOPs (core/target)."""

    memory: float
    """Bytes of HBM."""
    bandwidth: float
    """Of HBM, bytes a second."""
    links: float
    """Between chips of a slice, all links of a chip together, bytes a second."""


# cloud.google.com/tpu/docs: v5e, v5p, v6e, tpu7x. A tpu7x chip is two devices.
CHIPS = {
    "TPU v5 lite": Chip(16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(32 * 2**30, 1640e9, 448e9),
    "TPU7x": Chip(96 * 2**30, 3690e9, 600e9),
}

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all",
)  # fmt: skip


class Collective(NamedTuple):
    """All collectives of one kind over one set of mesh axes."""

    kind: str
    axes: tuple[str, ...]
    count: int
    """Times a step."""
    bytes: float
    """That a device sends in a step."""


class Program(NamedTuple):
    """What a compiler made; memory in bytes a device, without a program where it did not fit."""

    seconds: float
    memory: dict[str, int]
    """arguments, outputs, aliased (outputs in place of arguments), temporaries, code, total."""
    collectives: tuple[Collective, ...]
    refusal: str
    """Why the compiler gave up for lack of memory, in its words; else empty."""
    remarks: tuple[str, ...]
    """Warnings about shardings that it could not follow."""


def described(name: str) -> list[jax.Device]:
    """The devices of a TPU topology, v5p:8x8x8 for instance; InputError when there is none."""
    require("libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no metadata server to ask
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is touched, so several may plan
    try:
        with _noise():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # whatever libtpu says of a name that it does not know
        raise InputError(
            f"--topology {name!r}: the TPU compiler refuses it; write its version and shape, e.g. "
            f"v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4 ({str(error)[:200]})"
        ) from None
    return list(found)


def chip(device: jax.Device) -> Chip:
    """The figures of a device's kind."""
    for kind, figures in CHIPS.items():
        if device.device_kind.startswith(kind):
            return figures
    raise InputError(f"no figures are known of {device.device_kind}; add them to parallel/compile")


def compile_program(lowered: jax.stages.Lowered, mesh: Mesh) -> Program:
    """Compile for the mesh's devices. What does not fit gives a Program with a `refusal`."""
    start, refusal, compiled = time.perf_counter(), "", None
    with tempfile.TemporaryDirectory() as folder, _noise() as said:
        # JAX cannot always print what a newer libtpu made; it prints that itself.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error)
        texts = pathlib.Path(folder).glob("*after_optimizations.txt")
        text = max((path.read_text() for path in texts), key=len, default="")
    seconds = time.perf_counter() - start
    remarks = [line for line in said if "rematerialization" in line]
    memory = _memory(compiled.memory_analysis()) if compiled else {}
    found = collectives(text, mesh) if compiled else ()
    return Program(seconds, memory, found, refusal, tuple(dict.fromkeys(remarks)))


def _memory(found: Any) -> dict[str, int]:
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values()) - 2 * sizes["aliased"]}


@contextlib.contextmanager
def _noise() -> Iterator[list[str]]:
    """Collects the lines that C++ writes to file descriptor 2, past Python."""
    lines: list[str] = []
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().splitlines()


HEAD = re.compile(r"^\s*(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
FOUND = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
SHAPE = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")


def collectives(text: str, mesh: Mesh) -> tuple[Collective, ...]:
    """Those of a compiled program's text, gathered by kind and axes, the most bytes first."""
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    counts, sent = collections.Counter(), collections.Counter()
    sizes = tuple((axis, size) for axis, size in mesh.shape.items() if size > 1)
    for name, lines in bodies.items():
        for line in lines if times[name] else ():
            if not (found := FOUND.search(line)):
                continue
            shapes, kind, started = found.groups()
            if name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # the TPU's form: reduced, and a part of it kept
            axes, size = _joined(_joins(line), sizes)
            key = kind, axes
            counts[key] += times[name]
            sent[key] += times[name] * _sent(kind, shapes, bool(started), size)
    rows = [Collective(*key, counts[key], sent[key]) for key in counts]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        if head := HEAD.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> collections.Counter:
    """How often a run of the program runs each computation."""
    edges: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            called = CALLED.findall(line)
            for listed in BRANCHES.findall(line):
                called += [part.strip().lstrip("%") for part in listed.split(",")]
            loop = CONDITION.search(line)
            trips = _trips(bodies.get(loop[1], [])) if loop else 1
            edges[name] += [(callee, trips) for callee in called if callee in bodies]
    times = collections.Counter()

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for callee, trips in edges[name]:
            visit(callee, factor * trips)

    if entry:
        visit(entry, 1)
    return times


def _trips(condition: list[str]) -> int:
    """What a loop that counts up from 0 is compared with; 1 where there is no such number."""
    numbers = [
        int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)
    ]
    return max(numbers, default=1)


def _sent(kind: str, shapes: str, started: bool, size: int) -> float:
    """Bytes a device sends: by rings, (n - 1) / n of the whole, twice for an all-reduce."""
    sizes = [
        math.prod(map(int, dims.split(","))) * _itemsize(dtype) if dims else 0
        for dtype, dims in SHAPE.findall(shapes)
    ]
    if kind == "collective-permute":
        return sizes[0]
    whole = max(sizes, default=0) if started and kind == "all-gather" else sum(sizes)
    part = (size - 1) / size
    if kind == "reduce-scatter":
        return whole * (size - 1)  # its result is a part
    return 2 * whole * part if kind == "all-reduce" else whole * part


def _itemsize(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1


def _joins(line: str) -> str:
    """The part of a collective's text that says which devices it joins."""
    found = re.search(
        r"source_target_pairs=\{.*?\}\}|replica_groups=.*?, [a-z_]+=", line + ", end="
    )
    return found[0] if found else ""


@functools.cache  # thousands of lines, few different groups
def _joined(text: str, sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """The mesh axes that a collective joins, ("?",) for groups that are none; devices together."""
    names = tuple(axis for axis, _ in sizes)
    if text.startswith("source_target_pairs"):
        moves = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", text)]
        places = [(_place(a, sizes), _place(b, sizes)) for a, b in moves]
        return tuple(n for i, n in enumerate(names) if any(a[i] != b[i] for a, b in places)), 2
    groups = _groups(text)
    if groups is None:
        return names, math.prod(size for _, size in sizes)
    for count in range(len(names) + 1):
        for axes in itertools.combinations(names, count):
            if groups == _along(axes, sizes):
                return axes, len(next(iter(groups)))
    return ("?",), max(map(len, groups))


def _place(device: int, sizes: tuple[tuple[str, int], ...]) -> list[int]:
    place = []
    for _, size in reversed(sizes):
        place.insert(0, device % size)
        device //= size
    return place


@functools.cache
def _along(axes: tuple[str, ...], sizes: tuple[tuple[str, int], ...]) -> set[frozenset[int]]:
    """Groups of devices that differ along these axes alone."""
    groups = collections.defaultdict(set)
    for device in range(math.prod(size for _, size in sizes)):
        place = zip(sizes, _place(device, sizes), strict=True)
        groups[tuple(at for (axis, _), at in place if axis not in axes)].add(device)
    return set(map(frozenset, groups.values()))


def _groups(text: str) -> set[frozenset[int]] | None:
    """Replica groups in any of XLA's three ways of writing them; None: all devices."""
    if listed := re.search(r"=\{(\{[\d,{} ]*\})\}", text):
        return {
            frozenset(map(int, part.split(","))) for part in re.findall(r"\{([\d,]+)\}", listed[1])
        }
    if iota := re.search(r"=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = (
            [int(n) for n in part.split(",")] if part else None for part in iota.groups()
        )
        return _turned(dims, order or list(range(len(dims))), shape[-1])
    if named := re.search(r"=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = re.findall(r"'([^']+)'=(\d+)", named[1])
        axes = tuple(re.findall(r"'([^']+)'", named[2]))
        return _along(axes, tuple((name, int(size)) for name, size in sizes))
    return None


def _turned(dims: list[int], order: list[int], size: int) -> set[frozenset[int]]:
    """Groups of `size` from device numbers laid out as `dims`, transposed by `order`."""
    steps = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    places = itertools.product(*(range(dims[i]) for i in order))
    numbers = [sum(p * steps[i] for p, i in zip(place, order, strict=True)) for place in places]
    return {frozenset(numbers[i : i + size]) for i in range(0, len(numbers), size)}
