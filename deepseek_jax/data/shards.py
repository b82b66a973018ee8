"""Examples of media and text, and the files that hold many: tar shards, Parquet, ArrayRecord.

A file is indexed when it is opened and never unpacked; an example is read by its number. Each
format is a function from its files to an `Opened`.

A tar shard is WebDataset's: members that share the name before their first dot are an example
(a.png, a.txt, a.zh.txt, a.json), and those with nothing before or after it (README, .DS_Store,
macOS's ._a.png) are part of none. A record of ours is a little-endian 32-bit length, so many bytes
of JSON (name, group, captions, sizes of the media), and then the media.
"""

import array
import collections
import contextlib
import functools
import json
import pathlib
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.corpus import SHARDS, key_hash, made_whole
from deepseek_jax.data.sources import File, json_object, one_line, reported, text_field

ENDINGS = {
    "image": ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2"),
    "audio": ("wav", "aiff", "aif", "flac", "mp3", "ogg", "opus", "m4a", "mka"),
    "video": ("mp4", "webm", "mkv", "avi", "mov"),
}
KINDS = {ending: kind for kind, endings in ENDINGS.items() for ending in endings}
MAX_MEDIUM = 1 << 30
LENGTH = struct.Struct("<I")


class Example(NamedTuple):
    """Media and what is said of them."""

    name: str
    """For messages."""
    group: str
    """What is trained on or held out together."""
    media: dict[str, bytes]
    """The undecoded files by kind: "image", "audio", "video"; those that there are."""
    captions: dict[str, tuple[str, ...]]
    """By field, such as "text" or a language; only those that there are (or are empty lists)."""


class Opened(NamedTuple):
    """Examples that can be read by number."""

    hashes: np.ndarray
    """uint64 [n], of the groups."""
    files: list[File]
    """What the examples depend on."""
    read: Callable[[int], Example]
    """An example; InputError where it is damaged."""


def checked_name(name: str, where: str) -> str:
    """A relative file name that stays below its folder; InputError otherwise."""
    path = pathlib.PurePosixPath(name)
    if any("\ud800" <= each <= "\udfff" for each in name):
        raise InputError(f"{where}: refused: {name!r:.80} is not UTF-8")
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or "\\" in name:
        raise InputError(f"{where}: refused: {name!r:.80} does not name a file below its folder")
    return name


def captions_of(
    record: dict[str, Any], fields: tuple[str, ...], where: str
) -> dict[str, tuple[str, ...]]:
    """The captions in a record's fields, each a text or a list of them; null and blank are none.

    A list that is empty stays so, for none is not unknown. An object among them, such as a
    conversation's message, stays as its JSON.
    """
    found = {}
    for field in fields:
        if (value := record.get(field)) is not None:
            values = value if isinstance(value, list) else [value]
            texts = [
                _as_json(each, f"{where}: field {field!r}")
                if isinstance(each, dict)
                else text_field({field: each}, field, where)
                for each in values
            ]
            found[field] = tuple(text for text in texts if text.strip())
    return {field: texts for field, texts in found.items() if texts or record[field] == []}


def _as_json(value: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # Parquet has bytes, times and more
        raise InputError(f"{where}: cannot stand in JSON ({one_line(error)})") from None


def group_of(record: dict[str, Any], field: str, default: str, where: str) -> str:
    """The record's group; an example without one is its own."""
    value = record.get(field)
    return default if value is None else str(value) if isinstance(value, int) else text_field(
        record, field, where
    )  # fmt: skip


class _Member(NamedTuple):
    shard: int
    offset: int
    size: int


def open_tar(found: list[File], texts: tuple[str, ...], group: str) -> Opened:
    """The examples of uncompressed tar files; InputError for damage, links and hostile names."""
    examples: dict[tuple[int, str], dict[str, _Member]] = collections.defaultdict(dict)
    for number, file in enumerate(found):
        for name, offset, size in _members(str(file.path)):
            folder, slash, last = name.rpartition("/")
            stem, _, ending = last.partition(".")
            if not (stem and ending):
                continue
            parts = examples[number, folder + slash + stem]
            key = KINDS.get(ending.rpartition(".")[2].lower(), ending.lower())
            if key in parts:
                raise InputError(f"{file.path}: {name}: a second {key} of this example")
            parts[key] = _Member(number, offset, size)
    entries = list(examples.items())

    def content(member: _Member) -> bytes:
        path = found[member.shard].path
        with reported(str(path)), open(str(path), "rb") as stream:
            stream.seek(member.offset)
            data = stream.read(member.size)
        if len(data) != member.size:
            raise InputError(f"{path}: shorter than when it was opened")
        return data

    def record(number: int) -> tuple[dict[str, Any], str, str]:
        """An example's JSON and texts; its name; where it stands."""
        (shard, stem), parts = entries[number]
        where = f"{found[shard].path}: {stem}"
        said: dict[str, Any] = {}
        if "json" in parts:
            said = json_object(_text(content(parts["json"]), f"{where}.json"), f"{where}.json")
        for ending, member in parts.items():
            if ending == "txt" or ending.endswith(".txt"):
                text = _text(content(member), f"{where}.{ending}")
                said[ending.removesuffix("txt").rstrip(".") or "text"] = text.strip()
        return said, f"{found[shard].key}/{stem}", where

    def read(number: int) -> Example:
        said, name, where = record(number)
        parts = entries[number][1]
        media = {kind: content(parts[kind]) for kind in ENDINGS if kind in parts}
        grouped = group_of(said, group, name, where)
        return Example(name, grouped, media, captions_of(said, texts, where))

    hashes = array.array("Q")
    telling = {"json", "txt" if group == "text" else f"{group}.txt"}  # members that may say a group
    for number, ((shard, stem), parts) in enumerate(entries):
        base = f"{found[shard].key}/{stem}"
        if telling & parts.keys():
            with contextlib.suppress(InputError):  # damaged: said when it is read
                said, base, where = record(number)
                base = group_of(said, group, base, where)
        hashes.append(key_hash(base))
    return Opened(np.array(hashes, np.uint64), found, read)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8") from None


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """The (name, offset, size) of a tar's files, which lie one after another, whole."""
    end = 0
    try:
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            total = stream.seek(0, 2)
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                if member.offset_data <= end or member.size < 0:
                    raise InputError(
                        f"{path}: refused: {member.name!r:.80} overlaps another member"
                    )
                end = member.offset_data
                if member.isdir():
                    continue
                name = checked_name(member.name, path)
                if not member.isreg() or member.issparse():
                    raise InputError(
                        f"{path}: refused: {name} is no plain file but a link or device"
                    )
                if (end := end + member.size) > total:
                    raise InputError(f"{path}: truncated in {name}; copy it again")
                if member.size > MAX_MEDIUM:
                    raise InputError(f"{path}: {name} has {member.size:,} bytes, more than 1 GiB")
                yield name, member.offset_data, member.size
            stream.seek(tar.offset)  # tarfile takes any broken header for the end
            if stream.read(512) != bytes(512):
                raise InputError(f"{path}: broken or cut off at byte {tar.offset}; copy it again")
    except InputError:
        raise
    except Exception as error:  # hostile headers make tarfile raise nearly anything
        what = f"not a tar file that can be read ({one_line(error)})"
        hint = "unpack .gz and .xz: a compressed shard cannot be read by number"
        raise InputError(f"{path}: {what}; {hint}") from None


def open_parquet(found: list[File], texts: tuple[str, ...], group: str) -> Opened:
    """The rows of Parquet files with columns image, audio, video (bytes, or {bytes, path})."""
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    refused = (arrow.ArrowException, OSError, UnicodeDecodeError)
    places: list[tuple[int, int, int]] = []  # of each row group: file, number, first row
    starts, hashes, total = array.array("q"), array.array("Q"), 0
    for number, file in enumerate(found):
        try:
            with parquet.ParquetFile(str(file.path)) as table:
                names = set(table.schema_arrow.names)
                if not names & {*ENDINGS, *texts}:
                    wanted = ", ".join([*ENDINGS, *texts])
                    raise InputError(f"{file.path}: no column of {wanted}; it has {sorted(names)}")
                first = 0
                for part in range(table.num_row_groups):
                    places.append((number, part, first))
                    starts.append(total + first)
                    first += table.metadata.row_group(part).num_rows
                default = (f"{file.key}:{row}" for row in range(first))
                bases: Iterable[Any] = default
                if group in names:
                    column = table.read(columns=[group])[group].to_pylist()
                    bases = (
                        base if key is None else str(key)
                        for base, key in zip(default, column, strict=True)
                    )
                hashes.extend(map(key_hash, bases))
                total += first
        except refused as error:
            raise InputError(
                f"{file.path}: not a Parquet file that can be read ({one_line(error)})"
            ) from None

    @functools.lru_cache(maxsize=4)
    def rows(place: int) -> Any:
        number, part, _ = places[place]
        with parquet.ParquetFile(str(found[number].path)) as table:
            names = [name for name in table.schema_arrow.names if name in {*ENDINGS, *texts, group}]
            return table.read_row_group(part, columns=names)

    def read(row: int) -> Example:
        place = int(np.searchsorted(np.asarray(starts), row, side="right")) - 1
        number, _, first = places[place]
        name = f"{found[number].key}:{first + row - starts[place]}"
        where = f"{found[number].path}: row {first + row - starts[place]}"
        try:
            (record,) = rows(place).slice(row - starts[place], 1).to_pylist()
        except refused as error:
            raise InputError(f"{where}: cannot be read ({one_line(error)})") from None
        media = {kind: record[kind] for kind in ENDINGS if record.get(kind) is not None}
        for kind, value in media.items():
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise InputError(
                    f"{where}: column {kind!r} holds no bytes but {type(content).__name__}"
                )
            media[kind] = content
        return Example(
            name, group_of(record, group, name, where), media, captions_of(record, texts, where)
        )

    return Opened(np.array(hashes, np.uint64), found, read)


def write_media(examples: Iterable[Example], folder: pathlib.Path) -> int:
    """Write examples as ArrayRecord into a new folder, whole or not at all; how many."""
    hashes = array.array("Q")
    try:
        with made_whole(folder) as partial:
            path = str(partial / "media.array_record")
            with contextlib.closing(require(SHARDS).ArrayRecordWriter(path, "group_size:1")) as out:
                for name, group, media, captions in examples:
                    sizes = {kind: len(content) for kind, content in media.items()}
                    header = json.dumps([name, group, captions, sizes]).encode()
                    out.write(b"".join([LENGTH.pack(len(header)), header, *media.values()]))
                    hashes.append(key_hash(group))
            np.save(partial / "hashes.npy", np.array(hashes, np.uint64))
    except RuntimeError as error:  # the library's, for a full disk too
        raise InputError(f"{folder}: cannot write media ({one_line(error)})") from None
    return len(hashes)


def open_records(folder: pathlib.Path, texts: tuple[str, ...]) -> Opened:
    """The examples that `write_media` wrote."""
    path = folder / "media.array_record"
    try:
        hashes = np.load(folder / "hashes.npy", allow_pickle=False)
        reader = require(SHARDS).ArrayRecordReader(str(path))
        if hashes.shape != (reader.num_records(),) or hashes.dtype != np.uint64:
            raise ValueError(f"{reader.num_records()} records, hashes of {hashes.shape}")
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise InputError(
            f"{folder}: not a folder of write_media, whole ({one_line(error)})"
        ) from None

    def read(number: int) -> Example:
        where = f"{path}: record {number}"
        try:
            (data,) = reader.read([number])
            (length,) = LENGTH.unpack_from(data)
            name, group, captions, sizes = json.loads(data[LENGTH.size : LENGTH.size + length])
            media, place = {}, LENGTH.size + length
            for kind, size in sizes.items():
                media[kind], place = data[place : place + size], place + size
            if place != len(data):
                raise ValueError(f"{len(data)} bytes in place of {place}")
            return Example(name, group, media, captions_of(captions, texts, where))
        except (
            RuntimeError,
            IndexError,
            ValueError,
            TypeError,
            AttributeError,
            struct.error,
        ) as error:
            raise InputError(f"{where}: damaged ({one_line(error)})") from None

    files = [File(path, path.name), File(folder / "hashes.npy", "hashes.npy")]
    return Opened(hashes, files, read)
