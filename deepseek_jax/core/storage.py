"""Where things lie: on a disk, or as objects in a Google Cloud Storage bucket (gs://bucket/name).

An `Object` has the part of pathlib's methods that a bucket can serve. An object is put whole or not
at all; it cannot be appended to, renamed or locked, and a folder is there while something is under
it. In place of a lock there is `put_if`, which puts only onto the generation that was read. The
client is TensorStore's: it finds credentials as Google's own do (GOOGLE_APPLICATION_CREDENTIALS,
gcloud, the machine's account), retries for about two minutes, and reads and puts objects as wholes
in memory. TENSORSTORE_GCS_HTTP_URL names another server of the same protocol.
"""

import atexit
import concurrent.futures
import dataclasses
import fnmatch
import functools
import hashlib
import io
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeAlias, TypeVar

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require

Item = TypeVar("Item")
Found = TypeVar("Found")
THREADS = 16  # objects that are read or put at once
RETRIES = {"max_retries": 7, "initial_delay": "1s", "max_delay": "32s"}
REFUSED = ("NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ARGUMENT")


def _driver(bucket: str) -> dict[str, Any]:
    return {"driver": "gcs", "bucket": bucket, "context": {"gcs_request_retries": RETRIES}}


@functools.cache
def _bucket(name: str) -> Any:
    return require("tensorstore").KvStore.open(_driver(name)).result()


def in_bucket(path: Any) -> bool:
    """Whether a name is a URL and so none of a file on a disk."""
    return isinstance(path, Object) or "://" in str(path)


@dataclasses.dataclass(frozen=True, order=True)
class Object:
    """A name in a bucket: gs://bucket/some/name, without a slash at its end."""

    url: str

    def __post_init__(self):
        bucket, slash, name = self.url.removeprefix("gs://").partition("/")
        if not self.url.startswith("gs://") or not bucket or (slash and not name):
            raise InputError(
                f"{self.url}: not a gs://bucket/name; other object storage is not promised the "
                "conditional puts that a run needs: copy it, or mount it as a folder"
            )

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Object":
        return Object(f"{self.url}/{name}".rstrip("/"))

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's ending, with its dot."""
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "Object":
        """What stands before the last slash."""
        return Object(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> "Object":
        """A neighbor."""
        return self.parent / name

    def absolute(self) -> "Object":
        """Itself."""
        return self

    def expanduser(self) -> "Object":
        """Itself."""
        return self

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: there are no folders to make."""

    @property
    def _key(self) -> str:
        return self.url.removeprefix("gs://").partition("/")[2]

    def _call(
        self, method: str, *arguments: Any, timeout: float | None = None, **names: Any
    ) -> Any:
        """What a method of the bucket answers."""
        try:
            bucket = _bucket(self.url.removeprefix("gs://").partition("/")[0])
            return getattr(bucket, method)(*arguments, **names).result(timeout)
        except ValueError as error:
            status, _, reason = str(error).partition(": ")
            why = f"{status}: {reason.partition(' [http')[0]}"
            if status in REFUSED or "Invalid GCS bucket" in reason:
                raise InputError(
                    f"{self}: {why}; check the bucket's name, and that you may use it"
                ) from None
            raise OSError(None, why, self.url) from None

    def read(self, timeout: float | None = None) -> tuple[bytes | None, bytes]:
        """The content (None: there is none) and its generation, for `put_if`."""
        found = self._call("read", self._key, timeout=timeout)
        return (found.value if found.state == "value" else None), found.stamp.generation

    def read_bytes(self) -> bytes:
        """The content; FileNotFoundError when there is none."""
        if (content := self.read()[0]) is None:
            raise FileNotFoundError(None, "No such object", self.url)
        return content

    def read_text(self) -> str:
        """The content as text; FileNotFoundError when there is none."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Put the object in place of what was there."""
        self._call("write", self._key, content)

    def write_text(self, text: str) -> None:
        """Put the object in place of what was there."""
        self.write_bytes(text.encode())

    def put_if(
        self, content: bytes | None, generation: bytes, timeout: float | None = None
    ) -> bytes | None:
        """Put the object (None: delete it) if it still has the `generation` that `read` gave.

        The new generation; None when it has another by now, or when an answer was lost on the way
        and the repeated request found its own: whoever needs to know reads it again.
        """
        stamp = self._call("write", self._key, content, if_equal=generation, timeout=timeout)
        return stamp.generation or None

    def generation(self) -> bytes:
        """What changes whenever the object does."""
        return self._call("read", self._key, byte_range=slice(0, 0)).stamp.generation

    def exists(self) -> bool:
        """Whether there is such an object; a folder is none."""
        return self._call("read", self._key, byte_range=slice(0, 0)).state == "value"

    is_file = exists

    def is_dir(self) -> bool:
        """Whether anything lies under this name."""
        return bool(self.names())

    def unlink(self) -> None:
        """Delete the object, if there is one."""
        self._call("write", self._key, None)

    def names(self) -> list[str]:
        """The names of all objects under this one, relative to it, sorted."""
        prefix = f"{self._key}/" if self._key else ""
        span = require("tensorstore").KvStore.KeyRange(prefix, f"{prefix[:-1]}0" if prefix else "")
        found = self._call("list", span, strip_prefix_length=len(prefix.encode()))
        return sorted(name.decode() for name in found)

    def glob(self, pattern: str) -> "Iterator[Object]":
        """What lies right under this name and matches."""
        children = sorted({name.partition("/")[0] for name in self.names()})
        return (self / child for child in children if fnmatch.fnmatchcase(child, pattern))

    def delete_all(self, names: Iterable[str]) -> None:
        """Delete objects under this name."""
        for _ in at_once(lambda name: (self / name).unlink(), names):
            pass


Path: TypeAlias = pathlib.Path | Object


def located(path: str | Path) -> Path:
    """The path or object that a user means; InputError for a URL that is not of gs://."""
    if isinstance(path, Object):
        return path
    return Object(str(path).rstrip("/")) if in_bucket(path) else pathlib.Path(path)


def on_disk(path: str, what: str) -> pathlib.Path:
    """The path of a folder to write; InputError, naming `what`, for a URL."""
    if in_bucket(path):
        raise InputError(f"{what} {path}: must be a folder on this machine; copy it afterwards")
    return pathlib.Path(path)


def put(path: Path, content: bytes) -> None:
    """Write a small file so that a kill leaves the old one or the new one."""
    if isinstance(path, Object):
        path.write_bytes(content)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def read_all(objects: Iterable[Object]) -> Iterator[bytes]:
    """The contents of objects in their order, some read ahead."""
    return at_once(Object.read_bytes, objects)


def at_once(
    call: Callable[[Item], Found], items: Iterable[Item], threads: int = THREADS
) -> Iterator[Found]:
    """What `call` gives for each item, in their order, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        yield from pool.map(call, items)


def kvstore(folder: Object) -> dict[str, Any]:
    """What lies under a name, as TensorStore describes it."""
    bucket, _, path = folder.url.removeprefix("gs://").partition("/")
    return _driver(bucket) | {"path": f"{path}/"}


def opened(path: Path) -> BinaryIO:
    """A file to read; an object is in memory."""
    return io.BytesIO(path.read_bytes()) if isinstance(path, Object) else open(path, "rb")


@contextmanager
def as_file(path: Path) -> Iterator[pathlib.Path]:
    """A file on this disk, for libraries that take nothing else; an object's copy goes again."""
    if not isinstance(path, Object):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as copy:
        copy.write(path.read_bytes())
        copy.flush()
        yield pathlib.Path(copy.name)


def fetched(path: Path, threads: int = THREADS) -> pathlib.Path:
    """A folder on this disk; of objects a copy (in $TMPDIR), which goes with the process.

    As many objects as `threads` are in memory at a time.
    """
    if not isinstance(path, Object):
        return path
    base = tempfile.mkdtemp(prefix="deepseek_jax-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    folder = pathlib.Path(base, path.name)

    def copy(name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((path / name).read_bytes())

    for _ in at_once(copy, path.names(), threads):
        pass
    return folder


def nearby(run_dir: Path, name: str) -> pathlib.Path:
    """A run's folder `name` on this host's disk: in the run directory, or else in $TMPDIR."""
    if isinstance(run_dir, Object):
        own = hashlib.sha256(run_dir.url.encode()).hexdigest()[:16]
        return pathlib.Path(tempfile.gettempdir(), f"deepseek_jax-{os.getuid()}-{own}", name)
    return run_dir / name


def matched(pattern: str) -> list[Object]:
    """The objects that a name or glob matches, sorted; `**` crosses folders, as in files' globs."""
    if pattern.endswith("/"):
        return []
    plain = Object(pattern)
    if plain.exists():
        return [plain]
    root = Object(re.split(r"[*?[]", pattern)[0].rpartition("/")[0])
    translated = re.compile(_translated(pattern))
    found = (root / name for name in root.names())
    return [each for each in found if translated.fullmatch(each.url)]


def _translated(pattern: str) -> str:
    """A glob as a regular expression; wildcards match no name that begins with a dot."""
    folders = r"(?:(?!\.)[^/]+/)*"

    def piece(found: re.Match) -> str:
        word = found[0]
        if word.startswith("**"):
            return folders if word == "**/" else rf"{folders}(?!\.)[^/]+"
        if word[0] not in "*?[":
            return re.escape(word)
        inner = {"*": "[^/]*", "?": "[^/]", "[": r"\["}.get(word) or _set(word[1:-1])
        return (r"(?!\.)" if pattern[found.start() - 1] == "/" else "") + inner

    def _set(word: str) -> str:
        negated = word.startswith("!")
        plain = word[negated:].replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
        return f"[{'^/' if negated else ''}{plain}]"

    return re.sub(r"\*\*+/?|[*?]|\[!?\]?[^]]*\]|\[|[^*?[]+", piece, pattern)
