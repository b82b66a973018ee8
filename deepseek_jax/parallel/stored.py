"""Compiled programs on disk, for each of several CPU processes that are started again.

JAX's compilation cache is written by process 0 alone, and on CPUs the key differs by process: after
a restart all others would compile anew, which is most of the time a restart takes. On accelerators
one entry serves all, and JAX's cache is enough.
"""

import hashlib
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import serialize_executable


def stored(program: Any) -> Callable:
    """A jitted program that is compiled, or found in the cache's directory, when first called.

    It is the program itself where JAX's own cache does this or is off. Call it with one set of
    shapes and shardings only.
    """
    directory = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not directory or jax.default_backend() != "cpu" or jax.process_index() == 0:
        return program
    compiled: Callable | None = None

    def run(*arguments: Any) -> Any:
        nonlocal compiled
        compiled = compiled or _load(program.lower(*arguments), pathlib.Path(directory))
        return compiled(*arguments)

    return run


def _load(lowered: Any, directory: pathlib.Path) -> Callable:
    about = [jax.__version__, os.environ.get("XLA_FLAGS"), jax.process_index(), lowered.as_text()]
    file = directory / f"{hashlib.sha256(repr(about).encode()).hexdigest()}.program"
    if file.exists():
        return serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
    compiled = lowered.compile()
    directory.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    temporary.replace(file)  # a kill leaves none or a whole one
    return compiled
