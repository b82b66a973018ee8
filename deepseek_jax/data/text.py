"""Text files as documents: which files, their text in pieces, and the line where they are broken.

A file larger than 1 MiB becomes several documents, cut after a line where there is one: one file
of 2 GB and ten thousand tiny ones take the same memory.
"""

import collections
import contextlib
import functools
import glob
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.core.errors import InputError

MIB = 1 << 20

# Tests, data tables and copies of other packages are no good text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SKIPPED |= {"encodings", "lib2to3", "pydoc_data", "__pycache__"}


class Document(NamedTuple):
    """A text and the name that decides its side: documents of one key stay together."""

    key: str
    text: str


class File(NamedTuple):
    """A file of a source, and its name relative to the source's root."""

    path: pathlib.Path
    key: str


@contextlib.contextmanager
def reported(where: str = "") -> Iterator[None]:
    """What the operating system refuses, as an InputError; `where` if it names no file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or where}: {error.strerror or error}") from None


def matched_files(patterns: tuple[str, ...]) -> list[File]:
    """The files that names and globs match (`**` crosses folders), sorted, each once.

    Raises InputError for a pattern that matches no file.
    """
    found: dict[pathlib.Path, str] = {}
    for pattern in patterns or ("",):
        full = os.path.expanduser(pattern)
        if os.path.isdir(full):
            raise InputError(f"{pattern}: a folder; give its files, such as {pattern}/**/*.txt")
        # A name that exists may hold characters that a glob would read.
        plain = os.path.isfile(full)
        names = [full] if plain else filter(os.path.isfile, glob.glob(full, recursive=True))
        root = os.path.dirname(full if plain else re.split(r"[*?[]", full)[0])
        matches = {pathlib.Path(name): name[len(root) :].lstrip("/") for name in names}
        if not matches:
            raise InputError(f"{pattern!r}: no such file; check the paths")
        found = matches | found
    return [File(*item) for item in sorted(found.items())]


def decoded(data: bytes, path: pathlib.Path, line: int) -> str:
    """`data`, which begins on line `line` of the file, as text; InputError names the bad line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        shown = f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})"
        raise InputError(f"{shown}; convert it, as with iconv -f ENCODING -t UTF-8") from None


def text_documents(files: list[File]) -> Iterator[Document]:
    """The documents of text files; a file's pieces share its key, unless it is the only file."""
    for file in files:
        for number, piece in enumerate(_pieces(file.path, alone=len(files) == 1)):
            yield Document(f"{file.key}#{number}" if len(files) == 1 else file.key, piece)


def _pieces(path: pathlib.Path, alone: bool) -> Iterator[str]:
    """A file's text in pieces of at most 1 MiB; smaller ones in a lone file, to hold some out."""
    size = path.stat().st_size if alone else 64 * MIB
    limit = min(MIB, max(size // 64, min(4096, size // 8), min(32, size // 2), 4))
    line, block = 1, b""
    with open(path, "rb") as stream:
        while block := block + stream.read(limit - len(block)):
            end = len(block)
            if end == limit:  # cut after the last line, or else before a character that may go on
                cut = (i for i in range(end - 1, end - 5, -1) if block[i] & 0xC0 != 0x80)
                end = block.rfind(b"\n") + 1 or next(cut, 0) or end
            yield decoded(block[:end], path, line)
            line += block.count(b"\n", 0, end)
            block = block[end:]


def standard_library_files() -> list[File]:
    """The Python sources of this machine's standard library that may be used."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = [File(path, path.relative_to(root).as_posix()) for path in sorted(root.rglob("*.py"))]
    files = [file for file in found if SKIPPED.isdisjoint(file.key.split("/"))]
    if not files:
        raise InputError(f"{root}: this Python carries no sources of its standard library")
    return files


@functools.lru_cache(maxsize=1)
def distinct(files: tuple[File, ...]) -> list[File]:
    """The files, without those that share over 30 % of their lines with one already kept."""
    # line -> numbers of the kept files that have it
    owners: dict[bytes, list[int]] = collections.defaultdict(list)
    kept: list[File] = []
    for file in files:
        data = file.path.read_bytes()
        lines = [line.strip() for line in data.splitlines() if line.strip()]
        shared = collections.Counter(owner for line in lines for owner in owners.get(line, ()))
        with contextlib.suppress(UnicodeDecodeError):  # a few are in old encodings on purpose
            if max(shared.values(), default=0) <= 0.3 * len(lines) and data.decode():
                for line in set(lines):
                    owners[line].append(len(kept))
                kept.append(file)
    return kept
