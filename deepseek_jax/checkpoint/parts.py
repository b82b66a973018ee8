"""Long writing in pieces: shared among processes, taken up where a killed one stopped.

What becomes the folder X grows in X.parts/whole and gets its name when it is complete. A piece is a
file or folder in it; X.parts/done/<number> appears once the piece is safe on the disk, and a piece
without that mark is made anew. Part I of N is a run of neighboring pieces. A process holds a lock
on a byte of X.parts/lock for each of its pieces, and on byte 0 while it starts and completes.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import itertools
import json
import mmap
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deepseek_jax.checkpoint.integrity import sync
from deepseek_jax.core.errors import InputError

THREADS = min(4, 1 + (os.cpu_count() or 1))  # copies, hashes and files run without Python's lock
BUFFER, PAGE = 2**26, 2**12  # bytes that a thread makes at a time; that a disk writes at least
STRIP = 16  # columns: so many cache lines stay in the processor while a matrix is turned
_OF_THREAD = threading.local()

Task = Callable[[pathlib.Path], dict[str, Any]]


class Piece(NamedTuple):
    """A file or folder of the result."""

    path: str
    begin: Callable[[pathlib.Path], None]
    """Makes it, empty."""
    tasks: list[tuple[int, Task]]
    """Bytes, and what fills so many of it; it says what it wrote, as a table of JSON."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(size for size, _ in self.tasks)


def in_parts(
    target: pathlib.Path,
    pieces: list[Piece],
    part: tuple[int, int],
    *,
    origin: Any,
    finish: Callable[[pathlib.Path, dict[str, Any]], None],
    progress: Callable[[int, int], None],
) -> list[int]:
    """Write part (I, N) of the new folder `target`; the numbers of the parts that are missing yet.

    Whoever finds every piece whole calls `finish` with the folder and what the tasks said, and
    gives the folder its name. Pieces of another `origin` (JSON) are thrown away. `progress` is told
    this part's bytes, done and in all. InputError when `target` exists or another process is at
    work on one of the pieces.
    """
    folder = target.with_name(f"{target.name}.parts")
    whole, done, shares = folder / "whole", folder / "done", _shares(pieces, part[1])
    mine = shares[part[0] - 1]
    origin = json.dumps([origin, [(piece.path, piece.size) for piece in pieces]])
    with _claimed(target, folder, f"{part[0]}/{part[1]}", mine, origin) as lock:
        left = [i for i in mine if not (done / str(i)).exists()]
        total, written = (sum(pieces[i].size for i in some) for some in (mine, left))
        written = total - written
        progress(written, total)
        for index, size, said in _written(whole, {i: pieces[i] for i in left}):
            written += size
            progress(written, total)
            if said is not None:
                _mark(done / str(index), json.dumps(said))
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
        if target.exists():  # another completed it while we waited
            return []
        missing = {i for i in range(len(pieces)) if not (done / str(i)).exists()}
        if missing:
            return [n for n, share in enumerate(shares, 1) if not missing.isdisjoint(share)]
        said = [json.loads((done / str(i)).read_text()) for i in range(len(pieces))]
        finish(whole, {key: value for table in said for key, value in table.items()})
        whole.rename(target)
        sync(target.parent)
        shutil.rmtree(folder)
    return []


def check_new(target: pathlib.Path) -> None:
    """InputError when `target` exists; what a kill left beside it, just completed, goes."""
    if target.exists():
        shutil.rmtree(target.with_name(f"{target.name}.parts"), ignore_errors=True)
        raise InputError(f"{target}: exists; choose a new folder, or delete it first")


def _shares(pieces: list[Piece], count: int) -> list[range]:
    """The numbers of each part's pieces: neighbors, about as many bytes in each part."""
    total, before, ends = sum(piece.size for piece in pieces), 0, [0] * (count + 1)
    for number, piece in enumerate(pieces, 1):
        part = min((2 * before + piece.size) * count // max(2 * total, 1), count - 1)
        ends[part + 1] = number  # its middle lies in this part
        before += piece.size
    ends = [max(ends[: i + 1]) for i in range(count + 1)]
    return [range(*pair) for pair in itertools.pairwise(ends)]


def _claimed(
    target: pathlib.Path, folder: pathlib.Path, part: str, mine: range, origin: str
) -> BinaryIO:
    """The lock file, holding the pieces `mine`, once the folder is there and of this `origin`."""
    file, known = _opened(target, folder), folder / "origin"
    try:
        if not known.exists() or known.read_text() != origin:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 1)  # all pieces
            for path in folder.iterdir():
                if path.name != "lock":
                    _remove(path)
            _mark(known, origin)
            fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)
        if mine:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, len(mine), 1 + mine.start)
    except BlockingIOError:
        file.close()
        what = f"another process is at work on part {part} of it"
        raise InputError(f"{target}: {what}; wait for it, or choose another folder") from None
    fcntl.lockf(file, fcntl.LOCK_UN, 1, 0)
    for name in ("whole", "done"):
        (folder / name).mkdir(exist_ok=True)
    return file


def _opened(target: pathlib.Path, folder: pathlib.Path) -> BinaryIO:
    """The lock file of a conversion that is not complete, its first byte locked."""
    while True:
        check_new(target)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # completed, and so removed, just now
            file = (folder / "lock").open("ab")
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
            if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                return file
            file.close()


def _written(
    whole: pathlib.Path, pieces: dict[int, Piece]
) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """Write pieces, a few at once: (number, bytes, what its tasks said or None: not safe yet)."""
    pool, queue = concurrent.futures.ThreadPoolExecutor(THREADS), collections.deque()

    def results() -> Iterator[tuple[int, int, dict[str, Any] | None]]:
        index, path, sizes, tasks = queue.popleft()
        said = {}
        for size, task in zip(sizes, tasks, strict=True):
            said |= task.result()
            yield index, size, None
        for made in (path, *path.rglob("*"), path.parent):
            sync(made)
        yield index, 0, said

    try:
        for index, piece in pieces.items():
            if len(queue) > THREADS:
                yield from results()
            path = whole / piece.path
            _remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            piece.begin(path)
            sizes = [size for size, _ in piece.tasks]
            tasks = [pool.submit(task, path) for _, task in piece.tasks]
            queue.append((index, path, sizes, tasks))
        while queue:
            yield from results()
    finally:
        pool.shutdown(cancel_futures=True)


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _mark(path: pathlib.Path, text: str) -> None:
    """Write a small file that is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)


def reserve(path: pathlib.Path, size: int) -> None:
    """Make a file of `size` zeros; OSError when the disk is too full for it."""
    with path.open("wb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


def write_at(
    path: pathlib.Path, offset: int, values: np.ndarray, dtype: np.dtype, digest: Any = None
) -> None:
    """Write `values`, as `dtype` in C order, into a reserved file; also into a hash, if given.

    All but the edges goes around the page cache (where the file system can do that): filling fresh
    pages takes several times as long as writing to a fast disk, and nobody reads them soon.
    """
    rows = max(1, BUFFER // max(1, values[:1].size * dtype.itemsize))
    with path.open("r+b", 0) as edges, open(path, "r+b", 0, opener=_direct) as body:
        for start in range(0, len(values), rows):
            part = values[start : start + rows]
            first, size = offset % PAGE, part.size * dtype.itemsize
            block = _buffer(first + size)[first:]
            turn(block.view(dtype).reshape(part.shape), part)
            if digest:
                digest.update(block)
            head = min(-first % PAGE, size)
            tail = max(head, size - (first + size) % PAGE)
            for file, begin, end in ((edges, 0, head), (body, head, tail), (edges, tail, size)):
                while begin < end:
                    begin += os.pwrite(file.fileno(), block[begin:end].data, offset + begin)
            offset += size


def _direct(name: str, flags: int) -> int:
    try:
        return os.open(name, flags | getattr(os, "O_DIRECT", 0))
    except OSError:  # not on this file system
        return os.open(name, flags)


def _buffer(size: int) -> np.ndarray:
    """This thread's `size` bytes, at the start of a page; the next call gives them again."""
    if len(getattr(_OF_THREAD, "buffer", ())) < size:
        _OF_THREAD.buffer = mmap.mmap(-1, max(size, BUFFER + PAGE))
    return np.frombuffer(_OF_THREAD.buffer, np.uint8, size)


def turn(made: np.ndarray, values: np.ndarray) -> None:
    """`made[...] = values`, five times as fast as NumPy where `values` are a transposed matrix."""
    if made.dtype == values.dtype:  # NumPy is slower with the types that it does not know
        bits = np.dtype(f"u{made.itemsize}")
        made, values = made.view(bits), values.view(bits)
    if not values.ndim:
        made[...] = values
        return
    step = STRIP if values.strides[-1:] > (values.itemsize,) else max(1, values.shape[-1])
    for start in range(0, values.shape[-1], step):
        made[..., start : start + step] = values[..., start : start + step]
