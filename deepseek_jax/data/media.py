"""Sources of media: a folder with a manifest, tar shards, Parquet, ArrayRecord; read by number.

An example's group decides, by its hash, whether it is trained on or held out. What is damaged is
found when it is used: it is counted, named, and the next example of its side takes its place, until
more than a share of the source is damaged. Where an example stands therefore depends on the files
alone, and on nothing that was read before.
"""

import array
import dataclasses
import os
import pathlib
import stat
import sys
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np

from deepseek_jax.core.errors import InputError, printable
from deepseek_jax.core.storage import in_bucket
from deepseek_jax.data.corpus import key_hash
from deepseek_jax.data.shards import (
    ENDINGS,
    MAX_MEDIUM,
    Example,
    Opened,
    captions_of,
    checked_name,
    group_of,
    open_parquet,
    open_records,
    open_tar,
)
from deepseek_jax.data.sources import File, files_digest, json_lines, matched_files, reported

Used = TypeVar("Used")
LISTS = {"image": "images", "audio": "sounds", "video": "videos"}  # fields of a manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Texts:
    texts: tuple[str, ...] = ("text",)
    """The fields that hold captions, such as one a language; each a text or a list of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fields(_Texts):
    group: str = "group"
    """The field that keeps examples on one side; an example without it is its own group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaFolder(_Fields):
    """Files and a manifest with a JSON object a line: {"image": "a.png", "text": "a cat"}.

    Instead of one medium there may be lists of them: `images`, `sounds`, `videos`.
    """

    path: str
    manifest: str = "manifest.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaShards(_Fields):
    """WebDataset's tar files: a.png, a.txt (field text), a.zh.txt (zh), a.json (any fields)."""

    paths: tuple[str, ...]
    """Files or globs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaParquet(_Fields):
    """Parquet files with columns image, audio, video of bytes or of {bytes, path}."""

    paths: tuple[str, ...]
    """Files or globs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaRecords(_Texts):
    """A folder that `shards.write_media` wrote, the examples' groups with them."""

    path: str


MediaSource: TypeAlias = MediaFolder | MediaShards | MediaParquet | MediaRecords


class Media:
    """An opened source; pickled as its description, and then opened anew.

    Attributes:
      source: the description.
      hashes: of each example's group [n], uint64.
      fingerprint: a hash that changes when the examples may have, but not when their files move.
    """

    def __init__(self, source: MediaSource):
        self.source = source
        self.hashes, files, self._read = _opened(source)
        if not len(self.hashes):
            raise InputError(f"{_where(source)}: no examples here")
        what = f"{type(source).__name__} {source.texts} {getattr(source, 'group', '')}"
        self.fingerprint = files_digest(
            what, [file for file in files if os.path.isfile(str(file.path))]
        )

    def __reduce__(self):
        return Media, (self.source,)

    def __len__(self) -> int:
        return len(self.hashes)

    def example(self, number: int) -> Example:
        """One example, undecoded; InputError where it is damaged."""
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        return self._read(int(number))


@dataclasses.dataclass
class Skips:
    """The examples that could not be used, and how many of a source may be."""

    total: int
    share: float = 0.01
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)
    """By number: what was wrong."""

    def add(self, number: int, reason: str) -> None:
        """Count and name an example once; InputError when they are more than the share."""
        if number in self.reasons:
            return
        reason = self.reasons[number] = printable(reason)
        count = len(self.reasons)
        if count > self.share * self.total:
            listed = "; ".join(list(self.reasons.values())[-3:])
            raise InputError(
                f"{count} of {self.total} examples cannot be used, more than {self.share:.2%} "
                f"(the last: {listed}); repair them, or allow a larger share"
            )
        print(f"skipped ({count} of {self.total}): {reason}", file=sys.stderr, flush=True)


class Mistake(InputError):
    """No damage, but what nobody can have meant: it stops a run wherever it is read."""


def usable(numbers: np.ndarray, row: int, use: Callable[[int], Used], skips: Skips) -> Used:
    """What `use` makes of example numbers[row % n], or of the first after it that it can use.

    `use` raises InputError where it cannot. What was skipped before is tried anew: another row may
    have room for it, and a row must not depend on what was read before.
    """
    for step in range(len(numbers)):
        number = int(numbers[(row + step) % len(numbers)])
        try:
            return use(number)
        except Mistake:
            raise
        except InputError as error:
            skips.add(number, str(error))
    raise InputError(f"none of {len(numbers)} examples can be used")


def _where(source: MediaSource) -> str:
    return getattr(source, "path", None) or " ".join(getattr(source, "paths", ()))


def _opened(source: MediaSource) -> Opened:
    if in_bucket(_where(source)):
        raise InputError(f"{_where(source)}: media are read from a disk; copy or mount them")
    with reported(_where(source)):
        match source:
            case MediaFolder():
                return _open_folder(source)
            case MediaShards():
                return open_tar(matched_files(source.paths), source.texts, source.group)
            case MediaParquet():
                return open_parquet(matched_files(source.paths), source.texts, source.group)
            case MediaRecords():
                return open_records(pathlib.Path(source.path).expanduser(), source.texts)


def _open_folder(source: MediaFolder) -> Opened:
    root = pathlib.Path(source.path).expanduser()
    manifest = root / checked_name(source.manifest, source.path)
    records: list[dict[str, Any]] = []
    lines, hashes, names = array.array("q"), array.array("Q"), dict[str, None]()
    for line, record in json_lines(manifest):
        where = f"{manifest}:{line}"
        for kind in ENDINGS:
            if (name := record.get(kind)) is not None:
                if not isinstance(name, str):
                    raise InputError(f"{where}: {kind!r} is not a file's name but {name!r:.60}")
                names[checked_name(name, where)] = None
        record |= _listed(record, where)
        names |= dict.fromkeys(name for kind in LISTS for name in record[LISTS[kind]])
        hashes.append(key_hash(group_of(record, source.group, _name(record, line), where)))
        records.append(record)
        lines.append(line)

    def read(number: int) -> Example:
        record, where = records[number], f"{manifest}:{lines[number]}"
        name = _name(record, lines[number])
        media = {kind: _content(root, record[kind]) for kind in ENDINGS if record.get(kind)}
        for kind, many in LISTS.items():
            media |= {f"{kind} {i}": _content(root, x) for i, x in enumerate(record[many])}
        captions = captions_of(record, source.texts, where)
        return Example(name, group_of(record, source.group, name, where), media, captions)

    files = [File(manifest, source.manifest), *(File(root / name, name) for name in names)]
    return Opened(np.array(hashes, np.uint64), files, read)


def _listed(record: dict[str, Any], where: str) -> dict[str, list[str]]:
    """The record's lists of files, which stay below their folder."""
    found = {}
    for many in LISTS.values():
        names = record.get(many) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{where}: {many!r} is not a list of files' names but {names!r:.60}")
        found[many] = [checked_name(name, where) for name in names]
    return found


def _name(record: dict[str, Any], line: int) -> str:
    """The first medium's file: several captions of one image stay on one side."""
    named = [record[kind] for kind in ENDINGS if record.get(kind)]
    named += [name for many in LISTS.values() for name in record[many]]
    return next(iter(named), f"line {line}")


def _content(root: pathlib.Path, name: str) -> bytes:
    """A file's bytes; InputError for links out of the folder, pipes, and what is too large."""
    path = root / name
    with reported(str(path)):
        if not pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise InputError(f"{path}: refused: a link that leaves the folder")
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"{path}: refused: no plain file")
        if facts.st_size > MAX_MEDIUM:
            raise InputError(f"{path}: {facts.st_size:,} bytes, more than 1 GiB")
        return path.read_bytes()
