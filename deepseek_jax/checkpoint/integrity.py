"""Which checkpoint directories can be trusted, and who may write a run.

A checkpoint `<step>/` carries manifest.json: the size and SHA-256 of each of its files, written
last. Orbax loads flipped bits without a word, so every file is hashed before a restore. Saves and
deletions work under other names (`<step>.saving`, `<step>.deleting`): a directory named by a bare
number was complete once, and is damaged if it does not match its manifest now.
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
from collections.abc import Iterator

from deepseek_jax.core.errors import InputError

MANIFEST = "manifest.json"
VERSION = 1  # of manifest.json


def write_durably(path: pathlib.Path, text: str) -> None:
    """Put `text` at `path`: after a crash there is either all of it or none."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: pathlib.Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(directory: pathlib.Path) -> None:
    """Flush every file under `directory` to the disk and record its size and SHA-256."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(directory).as_posix()] = [path.stat().st_size, digest]
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
    text = json.dumps({"version": VERSION, "files": files}, indent=1)
    write_durably(directory / MANIFEST, text + "\n")


def damage(directory: pathlib.Path) -> str:
    """What is wrong with a checkpoint directory, in a few words; empty when every file is sound."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
        if manifest["version"] != VERSION:
            return f"{MANIFEST} has version {manifest['version']!r}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is unreadable"

    def fault(name: str) -> str:
        path, (size, digest) = directory / name, files[name]
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            with path.open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == digest
            return "" if same else f"{name} does not match its SHA-256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        return next((found for found in pool.map(fault, files) if found), "")


def steps(directory: pathlib.Path) -> list[int]:
    """The steps of the checkpoints under a checkpoints directory, sound or not, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def newest_good(directory: pathlib.Path) -> int | None:
    """The newest step whose files are sound; None when there are no checkpoints at all.

    Warns on stderr, a line each, about newer ones that are damaged; InputError when all are.
    """
    bad = {}
    for step in reversed(steps(directory)):
        reason = damage(directory / str(step))
        if not reason:
            for name, why in bad.items():
                print(
                    f"warning: checkpoint {directory / str(name)} is damaged ({why}); "
                    f"using {directory / str(step)} instead",
                    file=sys.stderr,
                )
            return step
        bad[step] = reason
    if bad:
        table = ", ".join(f"{step} ({why})" for step, why in bad.items())
        raise InputError(
            f"{directory}: every checkpoint is damaged: {table}; restore one from a backup, or "
            "move them away to start from the beginning"
        )
    return None


def resolve(path: str | pathlib.Path) -> pathlib.Path:
    """The step directory that a run, checkpoints or step directory stands for, verified.

    A run or checkpoints directory gives its newest good one. Raises InputError when there is none.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a run directory or a checkpoint in it")
    if is_step(path):
        if reason := damage(path):
            raise InputError(f"{path}: this checkpoint is damaged: {reason}")
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    step = newest_good(directory)
    if step is None:
        raise InputError(
            f"{path}: there is no checkpoint here; give a run directory (it has checkpoints/), "
            "or one of the numbered directories in its checkpoints/"
        )
    return directory / str(step)


def is_step(path: pathlib.Path) -> bool:
    """Whether a directory is one checkpoint, sound or not (rather than a run or several)."""
    if (path / "checkpoints").is_dir():
        return False
    return (path / MANIFEST).exists() or (path / "state").is_dir() or path.name.isdecimal()


def remove(directory: pathlib.Path) -> None:
    """Delete a checkpoint; a crash half-way leaves nothing that looks like one."""
    doomed = directory.with_name(f"{directory.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    if directory.exists():
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def lock_run(run_dir: str | pathlib.Path) -> Iterator[None]:
    """Hold the right to write a run directory (made if missing); it goes with the process.

    Raises InputError when another process holds it. Of several JAX processes the first one asks.
    """
    run_dir = pathlib.Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "run.lock").open("a+")
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be written ({error.strerror})") from None
    held = True

    def forget():  # a forked worker that outlives us must not keep the lock
        if held:
            file.close()

    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InputError(
                f"another process (pid {holder}) is training in {run_dir}; "
                "wait for it, stop it, or choose another --run-dir"
            ) from None
        os.register_at_fork(after_in_child=forget)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            held = False
