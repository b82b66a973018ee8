"""Text files as documents: which files, their bytes in pieces, and what is wrong with them by line.

A file larger than 1 MiB becomes several documents, cut after a line where there is one; nothing is
ever read whole, so a 2 GB file and ten thousand tiny ones take the same memory.
"""

import collections
import glob
import io
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.core.errors import InputError

MIB = 1 << 20

# Tests, data tables and copies of other packages.
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


def matched_files(patterns: tuple[str, ...]) -> list[File]:
    """The files that globs match (`**` crosses folders), sorted, each once.

    Raises InputError for a pattern that matches no file.
    """
    if not patterns:
        raise InputError("data.source.paths is empty: give at least one file or glob")
    found: dict[pathlib.Path, str] = {}
    for pattern in patterns:
        full = str(pathlib.Path(pattern).expanduser())
        if pathlib.Path(full).is_dir():
            raise InputError(f"{pattern}: a folder; give its files, such as {pattern}/**/*.txt")
        exists = pathlib.Path(full).exists()  # a name may hold characters that a glob would read
        names = [full] if exists else glob.glob(full, recursive=True)
        paths = sorted(path for path in map(pathlib.Path, names) if path.is_file())
        if not paths:
            raise InputError(f"{pattern}: no such file; check data.source.paths")
        root = paths[0].parent if exists else _root(full)
        for path in paths:
            found.setdefault(path, path.relative_to(root).as_posix())
    return [File(path, key) for path, key in sorted(found.items())]


def _root(pattern: str) -> pathlib.Path:
    """The folders of a glob before its first part that matches more than one name."""
    parts = pathlib.Path(pattern).parts
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return pathlib.Path(*parts[: min(plain, len(parts) - 1)])


def open_bytes(path: pathlib.Path) -> io.BufferedReader:
    """The file opened for reading bytes; InputError when it cannot be."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def decoded(data: bytes, path: pathlib.Path, line: int = 1) -> str:
    """`data`, which begins on line `line` of the file, as text; InputError names the bad line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file, "
            f"for example with iconv -f ENCODING -t UTF-8"
        ) from None


def text_documents(files: list[File]) -> Iterator[Document]:
    """The documents of text files; a file's pieces share its key, unless it is the only file."""
    for file in files:
        for number, piece in enumerate(_pieces(file.path, alone=len(files) == 1)):
            yield Document(f"{file.key}#{number}" if len(files) == 1 else file.key, piece)


def _pieces(path: pathlib.Path, alone: bool) -> Iterator[str]:
    """A file's text in pieces of at most 1 MiB; smaller ones in a lone file, to hold some out."""
    size = path.stat().st_size if path.exists() else 0
    limit = min(MIB, max(size // 64, min(4096, size // 8), 4)) if alone else MIB
    line, rest = 1, b""
    with open_bytes(path) as stream:
        while True:
            try:
                block = rest + stream.read(limit - len(rest))
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}") from None
            if not block:
                return
            end = len(block) if len(block) < limit else _cut(block)
            yield decoded(block[:end], path, line)
            line += block.count(b"\n", 0, end)
            rest = block[end:]


def _cut(block: bytes) -> int:
    """Where to cut: after the last line, or before a character that may go on."""
    end = block.rfind(b"\n") + 1
    if end:
        return end
    end = len(block)
    while end > len(block) - 3 and block[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if end > 1 and block[end - 1] >= 0xC0 else len(block)


def text_pieces(text: str) -> Iterator[str]:
    """A text that is already in memory, in pieces of at most a million characters."""
    start = 0
    while start < len(text):
        end = min(start + MIB, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def standard_library_files() -> list[File]:
    """The Python sources of this machine's standard library that may be used."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        key = path.relative_to(root)
        if SKIPPED.isdisjoint(key.parts) and path.is_file():
            files.append(File(path, key.as_posix()))
    if not files:
        raise InputError(f"{root}: this Python carries no sources of its standard library")
    return files


def standard_library_documents(files: list[File]) -> Iterator[Document]:
    """Whole files, without those that share over 30 % of their lines with one already kept."""
    owners = collections.defaultdict(list)  # line -> the kept files that have it
    for number, file in enumerate(files):
        with open_bytes(file.path) as stream:
            data = stream.read()
        lines = [line.strip() for line in data.splitlines() if line.strip()]
        shared = collections.Counter(owner for line in lines for owner in owners.get(line, ()))
        if not lines or max(shared.values(), default=0) > 0.3 * len(lines):
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError:  # a few versions keep a file in an old encoding on purpose
            continue
        for line in set(lines):
            owners[line].append(number)
        yield Document(file.key, text)
