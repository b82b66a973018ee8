"""Where documents come from: typed descriptions, and their documents as a stream.

The order of a source's documents depends on its files only. A document's key decides, by its hash,
whether it is trained on or held out. A text file larger than 1 MiB becomes several documents, cut
after a line where there is one: one file of 2 GB and ten thousand tiny ones take the same memory.
"""

import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from deepseek_jax.core import storage
from deepseek_jax.core.errors import InputError, unanswered
from deepseek_jax.core.extras import require
from deepseek_jax.core.progress import byte_progress
from deepseek_jax.core.storage import Path, in_bucket, opened

MIB = 1 << 20
SMALL = 64 * MIB  # smaller sources are known by their contents, larger ones by their files' times
MAX_LINE = 256 * MIB

# Tests, data tables and copies of other packages are no good text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SKIPPED |= {"encodings", "lib2to3", "pydoc_data", "__pycache__"}


class Document(NamedTuple):
    """A text and the name that decides its side: documents of one key stay together."""

    key: str
    text: str


class File(NamedTuple):
    """A file of a source, and its name relative to the source's root."""

    path: Path
    key: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """The sources of this machine's Python standard library, without tests and near copies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """UTF-8 text files; each is a document (in pieces of up to 1 MiB)."""

    paths: tuple[str, ...]
    """Files or globs, also gs://bucket/name; `**` crosses folders."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JSONL(TextFiles):
    """Files with one JSON object a line; each holds a document."""

    field: str = "text"
    """The object's field that holds the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(TextFiles):
    """Parquet files; each row holds a document (empty and null ones are left out)."""

    column: str = "text"
    """The column that holds the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """A folder written by `prepare`; it brings its own tokenizer and held-out side."""

    path: str


Plain: TypeAlias = StandardLibrary | TextFiles | JSONL | Parquet | Records
ENDINGS: dict[str, type[TextFiles]] = {".jsonl": JSONL, ".ndjson": JSONL, ".parquet": Parquet}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted:
    """A share of the training rows."""

    weight: float = 1.0
    """Relative to the other parts' weights."""
    schedule: tuple[tuple[int, float], ...] = ()
    """(row number, weight) points, linear in between and flat outside; replaces `weight`."""

    def __post_init__(self):
        rows = [row for row, _ in self.schedule]
        if rows != sorted(set(rows)):
            raise ValueError(f"The row numbers of a mixture's schedule, {rows}, must ascend.")
        weights = [self.weight, *(weight for _, weight in self.schedule)]
        if not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError(f"A mixture's weights, {weights}, must be finite and not negative.")

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """The weight at each row number."""
        places, weights = zip(*self.schedule or ((0, self.weight),), strict=True)
        return np.interp(rows, places, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Weighted):
    """A source of a mixture and its share of the training rows."""

    source: Plain


def check_weights(parts: Sequence[Weighted]) -> None:
    """ValueError where the parts' weights are all 0 at some row."""
    points = np.array([0, *(row for part in parts for row, _ in part.schedule)])
    if not np.all(sum(part.weights(points) for part in parts)):  # linear in between
        raise ValueError("A mixture's parts must have weights that are never all 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources; every training row comes from one of them, drawn by weight."""

    parts: tuple[Part, ...]

    def __post_init__(self):
        check_weights(self.parts)


Source: TypeAlias = Plain | Mixture


def parts(source: Source) -> tuple[Part, ...]:
    """The source as a mixture's parts: for all but a mixture one."""
    return source.parts if isinstance(source, Mixture) else (Part(source=source),)


@contextlib.contextmanager
def reported(where: str = "") -> Iterator[None]:
    """What the operating system refuses, as an InputError; `where` if it names no file.

    A bucket that does not answer stays an OSError.
    """
    try:
        yield
    except OSError as error:
        if unanswered(error):
            raise
        raise InputError(f"{error.filename or where}: {error.strerror or error}") from None


def one_line(error: Exception) -> str:
    """What a library says, short enough for a message of ours."""
    return " ".join(str(error).split())[:160]


def files(source: Plain) -> list[File]:
    """The files that a source reads; InputError when there are none."""
    if isinstance(source, TextFiles):
        return matched_files(source.paths)
    if isinstance(source, Records):
        return matched_files((f"{source.path}/manifest.json", f"{source.path}/*.array_record"))
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = [File(path, path.relative_to(root).as_posix()) for path in sorted(root.rglob("*.py"))]
    kept = [file for file in found if SKIPPED.isdisjoint(file.key.split("/"))]
    if not kept:
        raise InputError(f"{root}: this Python carries no sources of its standard library")
    return kept


def matched_files(patterns: tuple[str, ...]) -> list[File]:
    """The files that names and globs match, sorted, each once; InputError where none is."""
    found: dict[Path, str] = {}
    matches: dict[Path, str]
    for pattern in patterns or ("",):
        if in_bucket(pattern):
            objects = storage.matched(pattern)
            if not objects:
                raise InputError(f"{pattern!r}: no such object; check the name")
            root = pattern if objects[0].url == pattern else re.split(r"[*?[]", pattern)[0]
            root = root.rpartition("/")[0]
            matches = {each: each.url.removeprefix(f"{root}/") for each in objects}
            found = matches | found
            continue
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
    return [File(*item) for item in sorted(found.items(), key=_folders_first)]


def _folders_first(item: tuple[Path, str]) -> list[str]:
    return str(item[0]).split("/")  # as paths are compared, wherever they lie


def fingerprint(source: Plain) -> str:
    """A hash that changes when the documents may have, but not when their files move."""
    what = getattr(source, "field", getattr(source, "column", ""))
    return files_digest(f"{type(source).__name__} {what}", files(source))


def files_digest(what: str, found: list[File]) -> str:
    """A hash of `what` and of the files' contents; of large ones, of their sizes and times."""
    digest = hashlib.sha256(what.encode())
    for known, content in _contents(found) or map(_version, found):
        digest.update(json.dumps(known).encode() + content)
    return digest.hexdigest()


def _contents(found: list[File]) -> list[tuple[Any, bytes]] | None:
    """The files' (key, size) and contents; None when they are large."""
    sizes = (file.path.stat().st_size for file in found if isinstance(file.path, pathlib.Path))
    left, known = SMALL - sum(sizes), []
    for file in found if left >= 0 else ():
        content = file.path.read_bytes()
        left -= len(content) if isinstance(file.path, storage.Object) else 0
        if left < 0:
            break
        known.append(((file.key, len(content), None), content))
    return known if left >= 0 else None


def _version(file: File) -> tuple[Any, bytes]:
    """What changes when a file does, without reading it."""
    if isinstance(file.path, storage.Object):
        return (file.key, None, None), file.path.generation()
    stat = file.path.stat()
    return (file.key, stat.st_size, stat.st_mtime_ns), b""


def kind_of(paths: tuple[str, ...]) -> type[TextFiles]:
    """Which source reads files of these endings; InputError when they are of several kinds."""
    found = {ENDINGS.get(file.path.suffix.lower(), TextFiles) for file in matched_files(paths)}
    if len(found) > 1:
        kinds = " and ".join(sorted(kind.__name__ for kind in found))
        raise InputError(f"{' '.join(paths)}: {kinds}, files of different kinds; give one kind")
    return found.pop()


def documents(source: Plain) -> Iterator[Document]:
    """The source's documents, none empty; InputError names file and line, stderr the progress."""
    found, done = files(source), 0
    compressed = isinstance(source, Parquet)  # their sizes say little, and objects do not say them
    paths = [file.path for file in found if isinstance(file.path, pathlib.Path)]
    known = len(paths) == len(found) and not compressed
    total = sum(path.stat().st_size for path in paths) if known else 0
    progress = byte_progress("documents", every=10)
    progress(0, total)
    for document in filter(lambda document: document.text, _documents(source, found)):
        yield document
        done += len(document.text.encode())
        progress(done, total)
    if not done:
        names = ", ".join(str(file.path) for file in found[:3])
        raise InputError(f"{names}: no text here; give files that are not empty")


def _documents(source: Plain, found: list[File]) -> Iterator[Document]:
    if isinstance(source, StandardLibrary):
        found = distinct(tuple(found))
    alone = len(found) == 1
    for file in found:
        match source:
            case JSONL(field=field):
                yield from _json_documents(file, field)
            case Parquet(column=column):
                yield from _parquet_documents(file, column)
            case Records(path=path):
                raise InputError(f"{path}: already tokenized; it cannot be read as text")
            case _:  # a file's pieces share its key, unless it is the only file
                for number, piece in enumerate(_pieces(file.path, alone)):
                    yield Document(f"{file.key}#{number}" if alone else file.key, piece)


def _pieces(path: Path, alone: bool) -> Iterator[str]:
    """A file's text in pieces of at most 1 MiB; smaller ones in a lone file, to hold some out."""
    line, block = 1, b""
    with opened(path) as stream:
        size = stream.seek(0, os.SEEK_END) if alone else 64 * MIB
        stream.seek(0)
        limit = min(MIB, max(size // 64, min(4096, size // 8), min(32, size // 2), 4))
        while block := block + stream.read(limit - len(block)):
            end = len(block)
            if end == limit:  # cut after the last line, or else before a character that may go on
                cut = (i for i in range(end - 1, end - 5, -1) if block[i] & 0xC0 != 0x80)
                end = block.rfind(b"\n") + 1 or next(cut, 0) or end
            yield decoded(block[:end], path, line)
            line += block.count(b"\n", 0, end)
            block = block[end:]


@functools.lru_cache(maxsize=1)
def distinct(files: tuple[File, ...]) -> list[File]:
    """The files, without those that share over 30 % of their lines with one already kept."""
    owners: dict[bytes, list[int]] = collections.defaultdict(list)  # line -> kept files' numbers
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


def decoded(data: bytes, path: Path, line: int) -> str:
    """`data`, which begins on line `line` of the file, as text; InputError names the bad line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        shown = f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})"
        raise InputError(f"{shown}; convert it, as with iconv -f ENCODING -t UTF-8") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their lines' numbers; InputError names a bad line."""
    with opened(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
            where = f"{path}:{number}"
            if len(line) == MAX_LINE:
                raise InputError(f"{where}: a line of over 256 MiB; is this JSON Lines?")
            content = decoded(line, path, number).removeprefix("\ufeff")
            if content.strip():
                yield number, json_object(content, where)


def json_object(content: str, where: str) -> dict[str, Any]:
    """The object that a text is in JSON; InputError where it is none."""
    try:
        record = json.loads(content)
    except (RecursionError, ValueError) as error:  # ValueError: numbers of over 4,300 digits too
        reason = str(error).replace(" line 1", "")
        raise InputError(f"{where}: not JSON ({reason})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object but {json.dumps(record):.60}")
    return record


def _json_documents(file: File, field: str) -> Iterator[Document]:
    for number, record in json_lines(file.path):
        yield Document(f"{file.key}:{number}", text_field(record, field, f"{file.path}:{number}"))


def text_field(record: dict[str, Any], field: str, where: str) -> str:
    """The text of one field of a JSON object."""
    if field not in record:
        shown = f"{json.dumps(record, default=repr):.60}"
        raise InputError(f"{where}: no field {field!r} in {shown}; set the source's field")
    value = record[field]
    if not isinstance(value, str):
        shown = json.dumps(value, default=repr)  # Parquet has bytes, times and more
        raise InputError(f"{where}: field {field!r} is not a string but {shown:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: field {field!r} has half a surrogate pair") from None
    return value


def _parquet_documents(file: File, column: str) -> Iterator[Document]:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    row, where = 0, f"{file.path}: column {column!r}"
    place = file.path if isinstance(file.path, pathlib.Path) else opened(file.path)
    try:
        with parquet.ParquetFile(place) as table:
            if column not in (names := table.schema_arrow.names):
                only = f"no column {column!r}, only {', '.join(names)}"
                raise InputError(f"{file.path}: {only}; set the source's column")
            batches = table.iter_batches(batch_size=256, columns=[column])
            for row, value in enumerate(value for batch in batches for value in batch.column(0)):
                content = value.as_py()
                if not isinstance(content, str | None):
                    raise InputError(f"{where} holds {value.type}, not strings")
                yield Document(f"{file.key}:{row}", content or "")
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8 in row {row}") from None
    except (arrow.ArrowException, OSError) as error:
        reason = one_line(error)
        raise InputError(f"{file.path}: not a Parquet file that can be read ({reason})") from None
