"""Which checkpoint directories can be trusted, and who may write a run.

A checkpoint `<step>/` carries manifest.json: the size and SHA-256 of each of its files, written
last. Orbax loads flipped bits without a word, so every file is hashed before a restore. Saves and
deletions work under other names (`<step>.saving`, `<step>.deleting`): a directory named by a bare
number was complete once, and is damaged if it does not match its manifest now. In a bucket nothing
can be renamed: there the manifest, put last and deleted first, makes a step a checkpoint.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping

from deepseek_jax.checkpoint.lease import Lease
from deepseek_jax.core import storage
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import Object, Path

MANIFEST = "manifest.json"


def sync(path: pathlib.Path) -> None:
    """Make a file's content, or a directory's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _fingerprint(path: Path) -> list:
    if isinstance(path, Object):
        content = path.read_bytes()
        return [len(content), hashlib.sha256(content).hexdigest()]
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def write_manifest(directory: pathlib.Path, known: Mapping[str, list] | None = None) -> None:
    """Flush everything under `directory` to the disk, then record its files' fingerprints.

    The `known` ones are [size, SHA-256] by name, so that these files are not read again.
    """
    files, temporary = {}, directory / f"{MANIFEST}.tmp"
    for stale in (directory / MANIFEST, temporary):  # of a call that was killed
        stale.unlink(missing_ok=True)
    for path in sorted(directory.rglob("*")):
        sync(path)
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            files[name] = (known or {}).get(name) or _fingerprint(path)
    temporary.write_text(json.dumps({"files": files}, indent=1))
    sync(temporary)
    temporary.replace(directory / MANIFEST)
    sync(directory)


def damage(directory: Path) -> str:
    """What is wrong with a checkpoint directory, in a few words; empty when every file is sound."""
    try:
        files = dict(json.loads((directory / MANIFEST).read_text())["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST}: {getattr(error, 'strerror', 'no table of fingerprints')}"

    def fault(name: str) -> str:
        try:
            sound = _fingerprint(directory / name) == files[name]
        except (OSError, ValueError) as error:
            return f"{name}: {getattr(error, 'strerror', error)}"
        return "" if sound else f"{name} does not match its size and SHA-256"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        return next((found for found in pool.map(fault, files) if found), "")


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints under a checkpoints directory, sound or not, ascending."""
    if isinstance(directory, Object):
        parts = [name.split("/") for name in directory.names()]
        return sorted(int(p[0]) for p in parts if p[0].isdecimal() and p[1:] == [MANIFEST])
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal() and p.is_dir())


def newest_good(directory: Path) -> int | None:
    """The newest step whose files are sound; None when there are no checkpoints at all.

    Warns on stderr, a line each, about newer ones that are damaged; InputError when all are.
    """
    bad = {}
    for step in reversed(steps(directory)):
        if not (reason := damage(directory / str(step))):
            for other, why in bad.items():
                message = f"checkpoint {directory / str(other)} is damaged ({why})"
                print(f"warning: {message}; using {directory / str(step)} instead", file=sys.stderr)
            return step
        bad[step] = reason
    if bad:
        table = ", ".join(f"{step} ({why})" for step, why in bad.items())
        hint = "put one back from a copy, or move them away to start from the beginning"
        raise InputError(f"{directory}: every checkpoint is damaged: {table}; {hint}")
    return None


def resolve(path: str | Path) -> pathlib.Path:
    """The step directory that a run, checkpoints or step directory stands for, verified.

    A run or checkpoints directory gives its newest good one; out of a bucket comes a copy, which
    goes with the process. Raises InputError when there is none.
    """
    return storage.fetched(_resolved(storage.located(path)))


def _resolved(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a run directory or a checkpoint in it")
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    inside = (path / MANIFEST).exists() or (path / "state").is_dir() or path.name.isdecimal()
    if inside and directory is path:
        if reason := damage(path):
            raise InputError(f"{path}: this checkpoint is damaged: {reason}")
        return path
    if (step := newest_good(directory)) is None:
        raise InputError(f"{path}: there is no checkpoint here; give a run directory that has some")
    return directory / str(step)


def remove(directory: Path) -> None:
    """Delete a checkpoint, if it exists; a kill half-way leaves nothing that looks like one."""
    if isinstance(directory, Object):
        (directory / MANIFEST).unlink()
        directory.delete_all(directory.names())
        return
    doomed = directory.with_name(f"{directory.name}.deleting")
    if directory.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(directory: Path, step: str = "*") -> None:
    """Delete what saves and deletions that did not finish left of `step` (of every step)."""
    if isinstance(directory, Object):
        names = directory.names()
        whole = {name.removesuffix(MANIFEST) for name in names if name.endswith(f"/{MANIFEST}")}
        torn = [n for n in names if n.partition("/")[0] == step or step == "*"]
        directory.delete_all(n for n in torn if f"{n.partition('/')[0]}/" not in whole)
        return
    for path in [*directory.glob(f"{step}.saving*"), *directory.glob(f"{step}.deleting")]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lock_run(run_dir: str | Path, seconds: float = 60.0) -> Iterator[None]:
    """Hold the right to write a run directory (made if missing); it goes with the process.

    In a bucket it is a lease of `seconds`. Raises InputError when another process holds it. One
    process of a job asks for all of them.
    """
    if isinstance(bucket := storage.located(run_dir), Object):
        with contextlib.closing(Lease(bucket, seconds)):
            yield
        return
    path = pathlib.Path(run_dir) / "run.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            other = f"another process (pid {file.read().strip()}) is training in {run_dir}"
            raise InputError(f"{other}; stop it or choose another run directory") from None
        os.register_at_fork(after_in_child=file.close)  # a worker that outlives us must not hold it
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield
