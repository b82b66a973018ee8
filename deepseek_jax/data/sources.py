"""Where documents come from: typed descriptions, and their documents as a stream.

A source's documents come in an order that depends on its files only. Every document has a key,
whose hash decides whether it is trained on or held out.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, TypeAlias

from deepseek_jax.core.config import to_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data import text
from deepseek_jax.data.text import Document, File

SMALL = 64 * text.MIB  # sources up to this size are known by their contents, larger by their times
MAX_LINE = 256 * text.MIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """The sources of the Python standard library on this machine, without tests and near copies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """UTF-8 text files; each is a document (in pieces of up to 1 MiB)."""

    paths: tuple[str, ...]
    """Files or globs; `**` crosses folders."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JSONL:
    """Files with one JSON object a line; each holds a document."""

    paths: tuple[str, ...]
    """Files or globs; `**` crosses folders."""
    field: str = "text"
    """The object's field that holds the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet:
    """Parquet files; each row holds a document (empty and null ones are left out)."""

    paths: tuple[str, ...]
    """Files or globs; `**` crosses folders."""
    column: str = "text"
    """The column that holds the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """A folder written by the `prepare` command; brings its own tokenizer and held-out side."""

    path: str


Plain: TypeAlias = StandardLibrary | TextFiles | JSONL | Parquet | Records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A source of a mixture and its share of the training rows."""

    source: Plain
    weight: float = 1.0
    """Relative to the other parts' weights; shares are their quotients."""
    schedule: tuple[tuple[int, float], ...] = ()
    """(row number, weight) points, linear in between and flat outside; replaces `weight`."""

    def __post_init__(self):
        rows = [row for row, _ in self.schedule]
        if rows != sorted(set(rows)):
            raise ValueError(f"The schedule's row numbers {rows} must ascend.")
        weights = [self.weight, *(weight for _, weight in self.schedule)]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"A mixture's weights must be finite and not negative, not {weights}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources; every training row comes from one of them, drawn by weight."""

    parts: tuple[Part, ...]

    def __post_init__(self):
        if not self.parts:
            raise ValueError("A mixture needs at least one part.")
        points = sorted({0, *(row for part in self.parts for row, _ in part.schedule)})
        for row in points:  # weights are linear in between, so positive sums here are enough
            if sum(weight_at(part, row) for part in self.parts) <= 0:
                raise ValueError(f"The weights of a mixture's parts are all 0 at row {row}.")


Source: TypeAlias = StandardLibrary | TextFiles | JSONL | Parquet | Records | Mixture


def weight_at(part: Part, row: int) -> float:
    """A part's weight at a row number."""
    before = [point for point in part.schedule if point[0] <= row]
    after = [point for point in part.schedule if point[0] > row]
    if not before or not after:
        return (before[-1:] or after[:1] or [(0, part.weight)])[0][1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (row - x0) / (x1 - x0)


def parts(source: Source) -> tuple[Part, ...]:
    """The source as a mixture's parts (one, of weight 1, for all but a mixture)."""
    return source.parts if isinstance(source, Mixture) else (Part(source=source),)


def files(source: Plain) -> list[File]:
    """The files that a source reads; InputError when there are none."""
    match source:
        case StandardLibrary():
            return text.standard_library_files()
        case Records(path=path):
            return text.matched_files((f"{path}/manifest.json", f"{path}/*.array_record"))
        case _:
            return text.matched_files(source.paths)


# Where the files lie does not change what they say.
PLACE: dict[type, dict[str, Any]] = {
    StandardLibrary: {},
    TextFiles: {"paths": ()},
    JSONL: {"paths": ()},
    Parquet: {"paths": ()},
    Records: {"path": ""},
}


def fingerprint(source: Plain) -> str:
    """A hash that changes when the source's documents may have."""
    found = files(source)
    described = dataclasses.replace(source, **PLACE[type(source)])
    digest = hashlib.sha256(json.dumps(to_dict(described)).encode())
    try:
        stats = [file.path.stat() for file in found]
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    by_content = sum(stat.st_size for stat in stats) <= SMALL
    for file, stat in zip(found, stats, strict=True):
        known = (file.key, stat.st_size, None if by_content else stat.st_mtime_ns)
        digest.update(json.dumps(known).encode())
        if by_content:
            with text.open_bytes(file.path) as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def documents(source: Plain) -> Iterator[Document]:
    """The source's documents, none empty, as a stream; InputError names file and line."""
    found = files(source)
    count = 0
    for document in _documents(source, found):
        if document.text:
            count += 1
            yield document
    if not count:
        names = ", ".join(str(file.path) for file in found[:3]) + (", ..." if found[3:] else "")
        raise InputError(f"{names}: no text in {'this file' if len(found) == 1 else 'these files'}")


def _documents(source: Plain, found: list[File]) -> Iterator[Document]:
    match source:
        case StandardLibrary():
            return text.standard_library_documents(found)
        case TextFiles():
            return text.text_documents(found)
        case JSONL(field=field):
            return (doc for file in found for doc in _json_documents(file, field))
        case Parquet(column=column):
            return (doc for file in found for doc in _parquet_documents(file, column))
        case _:
            raise InputError(f"{source}: already tokenized; it cannot be read as text")


def _json_documents(file: File, field: str) -> Iterator[Document]:
    with text.open_bytes(file.path) as stream:
        number = 0
        while line := _line(stream, file.path, number := number + 1):
            content = text.decoded(line, file.path, number)
            if number == 1:
                content = content.removeprefix("\ufeff")
            if content.strip():
                for piece in text.text_pieces(_field(content, field, f"{file.path}:{number}")):
                    yield Document(f"{file.key}:{number}", piece)


def _line(stream: Any, path: pathlib.Path, number: int) -> bytes:
    try:
        line = stream.readline(MAX_LINE)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if len(line) == MAX_LINE and line[-1:] != b"\n":
        raise InputError(f"{path}:{number}: a line of over 256 MiB; is this JSON Lines?")
    return line


def _field(content: str, field: str, where: str) -> str:
    """The text of one JSON line."""
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON that can be read (nested too deeply)") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object, but {_short(record)}")
    if field not in record:
        raise InputError(
            f"{where}: no field {field!r}; there are {', '.join(map(repr, record)) or 'none'} "
            "(the source's `field` names the one that holds the text)"
        )
    value = record[field]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {field!r} is not a string, but {_short(value)}")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{where}: field {field!r} has half a surrogate pair, which is no text")
    return value


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _parquet_documents(file: File, column: str) -> Iterator[Document]:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        with parquet.ParquetFile(file.path) as table:
            if column not in table.schema_arrow.names:
                raise InputError(
                    f"{file.path}: no column {column!r}; there are "
                    f"{', '.join(map(repr, table.schema_arrow.names))} (the source's `column` "
                    "names the one that holds the text)"
                )
            kind = table.schema_arrow.field(column).type
            kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view"):
                raise InputError(f"{file.path}: column {column!r} holds {kind}, not strings")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    content = value.as_py() or ""
                    for piece in text.text_pieces(content):
                        yield Document(f"{file.key}:{row}", piece)
                    row += 1
    except UnicodeDecodeError:
        raise InputError(f"{file.path}: row {row}: column {column!r} is not UTF-8") from None
    except (arrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{file.path}: not a readable Parquet file ({reason})") from None
