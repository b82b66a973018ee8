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
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

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
    """What a compiler made, or refused to make for lack of memory; bytes a device."""

    seconds: float
    memory: dict[str, int]
    """arguments, outputs, aliased (outputs in place of arguments), temporaries, code, total; on the
    host, all together: host."""
    collectives: tuple[Collective, ...]
    refusal: str
    """Why the compiler gave up for lack of memory, in its words; else empty."""
    needed: int
    """Bytes that the refused program needs of a device's memory, as it says; else 0."""
    remarks: tuple[str, ...]
    """Warnings about shardings that it could not follow."""
    text: str
    """The program as it is scheduled; empty if there is none."""


def compile_program(lowered: jax.stages.Lowered, mesh: Mesh, quick: bool = False) -> Program:
    """Compile for the mesh's devices. What does not fit gives a Program with a `refusal`.

    `quick` does not wait for machine code, three quarters of the time, and leaves its bytes 0: the
    compiler goes on in a thread, so the process should end soon, by os._exit.
    """
    start, outcome = time.perf_counter(), Future()
    options = {"xla_dump_hlo_as_text": True}
    if mesh.devices.flat[0].platform == "cpu":  # nobody runs this code: no effort for it
        options["xla_backend_optimization_level"] = 0

    def work(folder: str) -> None:
        try:
            outcome.set_result(lowered.compile(compiler_options=options | {"xla_dump_to": folder}))
        except BaseException as error:
            outcome.set_exception(error)

    # JAX cannot always print what a newer libtpu made; it prints that itself.
    folder = tempfile.mkdtemp()
    try:
        with quiet() as said:
            if quick:
                threading.Thread(target=work, args=(folder,), daemon=True).start()
                _wait(pathlib.Path(folder), outcome)
            else:
                work(folder)
        compiled, refusal = None, ""
        if outcome.done():
            try:
                compiled = outcome.result()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                refusal = str(error)
        text, buffers = _dumped(folder, PROGRAM), _dumped(folder, BUFFERS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    memory = _memory(compiled.memory_analysis()) if compiled else memory_of(buffers)
    found = () if refusal else collectives(text, mesh)
    remarks = tuple(dict.fromkeys(line for line in said if "rematerialization" in line))
    return Program(seconds, memory, found, refusal, needed_bytes(refusal), remarks, text)


PROGRAM, BUFFERS = "*after_optimizations.txt", "*after_optimizations-buffer-assignment.txt"
SETTLED = 3.0  # seconds in which a refusal follows the buffers' assignment


def _wait(folder: pathlib.Path, outcome: Future) -> None:
    """Until the compiler is done, or has written program and buffers and goes on past them."""
    since, before = time.perf_counter(), None
    while not outcome.done() and time.perf_counter() - since < SETTLED:
        time.sleep(0.2)
        sizes = {p: p.stat().st_size for name in (PROGRAM, BUFFERS) for p in folder.glob(name)}
        if len(sizes) < 2 or sizes != before:
            since, before = time.perf_counter(), sizes


def _dumped(folder: str, pattern: str) -> str:
    texts = (path.read_text() for path in pathlib.Path(folder).glob(pattern))
    return max(texts, key=len, default="")


def _memory(found: Any) -> dict[str, int]:
    def both(name: str) -> tuple[int, int]:
        return tuple(getattr(found, f"{host}{name}_size_in_bytes", 0) for host in ("", "host_"))

    arguments, host_arguments = both("argument")
    outputs, host_outputs = both("output")
    aliased, host_aliased = both("alias")
    temporaries, host_temporaries = both("temp")
    code, host_code = both("generated_code")
    host = host_arguments + host_outputs - host_aliased + host_temporaries + host_code
    return _sizes(arguments, outputs, aliased, temporaries, code, host)


def _sizes(arguments, outputs, aliased, temporaries, code, host) -> dict[str, int]:
    total = arguments + outputs - aliased + temporaries + code
    return {
        "arguments": arguments, "outputs": outputs, "aliased": aliased,
        "temporaries": temporaries, "code": code, "total": total, "host": host,
    }  # fmt: skip


ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*):$", re.MULTILINE)
HOST = "color 5"  # XLA's number of the host's memory


def memory_of(buffers: str) -> dict[str, int]:
    """The same bytes from the text of a buffer assignment; empty of an empty one."""
    if not buffers:
        return {}
    found = collections.Counter()
    for size, marks in ALLOCATION.findall(buffers):
        on_host = HOST in marks
        if ("color" in marks and not on_host) or "thread-local" in marks or "constant" in marks:
            continue  # registers and caches of the chip; what lies within temporaries
        parameter, result = "parameter" in marks, "live-out" in marks
        kind = "arguments" if parameter else "outputs" if result else "temporaries"
        found["host" if on_host else kind] += int(size)
        found["aliased"] += int(size) * (parameter and result and not on_host)
    kept = found["aliased"]
    return _sizes(
        found["arguments"], found["outputs"] + kept, kept, found["temporaries"], 0, found["host"]
    )


SIZE = r"\(?([\d.]+)([KMGT]?)\)?"
NEEDED = re.compile(rf"{SIZE} (?:exceeds available HBM|of [\d.]+[KMGT]? hbm)")


def needed_bytes(refusal: str) -> int:
    """What a refused program needs of the memory, in the compiler's own words; 0: it does not say.

    Of "HLO temporaries (189.75G) exceeds available HBM (95.73G)" and "Used 117.9G of 95.74G hbm".
    """
    found = NEEDED.search(refusal)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
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
BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")  # the latter of SparseCores
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
FOUND = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
SHAPE = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
PARTITIONS = re.compile(r"num_partitions=(\d+)")
FAR = re.compile(r'= \((\S+), .* send\(.*_xla_megascale_transfer_type="(\w+)"')


def collectives(text: str, mesh: Mesh) -> tuple[Collective, ...]:
    """Those of a compiled program's text, gathered by kind and axes, the most bytes first.

    A program for several slices is one slice's: its collectives join devices of the slice, and what
    goes to other slices is handed to the host, one row of the axis `slice`.
    """
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    counts, sent = collections.Counter(), collections.Counter()
    partitions = PARTITIONS.search(text.partition("\n")[0])
    one_slice = partitions and int(partitions[1]) * mesh.shape["slice"] == mesh.size
    sizes = tuple(
        (axis, size)
        for axis, size in mesh.shape.items()
        if size > 1 and not (one_slice and axis == "slice")
    )
    for name, lines in bodies.items():
        for line in lines if times[name] else ():
            if found := FOUND.search(line):
                shapes, kind, started = found.groups()
                axes, size = _joined(_joins(line), sizes)
                one = _sent(kind, shapes, bool(started), size)
                if name.startswith("all-reduce-scatter"):
                    kind, one = "reduce-scatter", one / 2  # the TPU's form: a part of it is kept
            elif found := FAR.search(line):
                kind = found[2].lower().replace("_", "-").replace("one-to-one", KINDS[4])
                axes, size = ("slice",), mesh.shape["slice"]
                one = _sent_far(kind, found[1], size)
            else:
                continue
            counts[kind, axes] += times[name]
            sent[kind, axes] += times[name] * one
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
    """What a loop that counts up from 0 is compared with.

    0 where that is no constant: such loops only take what exceeds a buffer (ops/dispatch).
    """
    numbers = [
        int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)
    ]
    return max(numbers, default=0)


def _sent(kind: str, shapes: str, started: bool, size: int) -> float:
    """Bytes a device sends: by rings, (n - 1) / n of the whole, twice for an all-reduce."""
    sizes = _bytes(shapes)
    if kind == "collective-permute":
        return sizes[0]
    whole = max(sizes, default=0) if started and kind == "all-gather" else sum(sizes)
    part = (size - 1) / size
    if kind == "reduce-scatter":
        return whole * (size - 1)  # its result is a part
    return 2 * whole * part if kind == "all-reduce" else whole * part


def _sent_far(kind: str, operand: str, size: int) -> float:
    """The same, from what a device hands to its host."""
    (given,) = _bytes(operand)
    if kind == "collective-permute":
        return given
    if kind == "all-gather":
        return given * (size - 1)  # it is a part
    return given * (2 if kind == "all-reduce" else 1) * (size - 1) / size


def _bytes(shapes: str) -> list[float]:
    return [
        math.prod(map(int, dims.split(","))) * _itemsize(dtype) if dims else 0
        for dtype, dims in SHAPE.findall(shapes)
    ]


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
    """The mesh axes that a collective joins, all or a part of one; ("?",) for other groups.

    And how many devices a group has.
    """
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
    for axis in names:  # or they are parts of one
        if all(any(group <= whole for whole in _along((axis,), sizes)) for group in groups):
            return (axis,), max(map(len, groups))
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
