"""Select, map and compare pytree leaves by path."""

import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.core.errors import InputError

# `segment_0/block_0/attention/q/weight` from a jax key path.
_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The tree as {path: leaf}, in tree order."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)}


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`jax.tree.map` whose function gets the path's name first."""
    return jax.tree.map_with_path(lambda path, leaf: function(_name(path), leaf), tree)


def matching(patterns: Iterable[str], paths: Iterable[str], where: str) -> set[str]:
    """The paths that patterns choose: `text/*` adds what it matches, `!*/bias` then takes away.

    Where none adds, all paths are there to begin with. InputError, with the nearest paths and parts
    of paths, for a pattern that matches none; `where` says what the patterns are.
    """
    paths = list(paths)
    added, taken = set[str](), set[str]()
    for pattern in patterns:
        found = {path for path in paths if fnmatch.fnmatchcase(path, pattern.removeprefix("!"))}
        if not found:
            parents = {f"{path[:i]}/*" for path in paths for i, c in enumerate(path) if c == "/"}
            near = difflib.get_close_matches(pattern, [*sorted(parents), *paths], 5)
            near = near or sorted({path.split("/")[0] for path in paths})
            raise InputError(
                f"{where}: {pattern!r} matches no parameter; there are {', '.join(near)}"
            )
        (taken if pattern.startswith("!") else added).update(found)
    return (added or set(paths)) - taken


def split(tree: Any, keep: Callable[[str], bool]) -> tuple[Any, Any]:
    """Two trees of this form: the leaves whose paths are kept, and the others; None elsewhere."""
    kept = map_with_path(lambda path, leaf: leaf if keep(path) else None, tree)
    return kept, map_with_path(lambda path, leaf: None if keep(path) else leaf, tree)


def joined(one: Any, other: Any) -> Any:
    """The tree that `split` took apart."""
    absent = lambda node: node is None  # noqa: E731
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=absent)


def added_up(function: Callable[[Any], Any], items: Any) -> Any:
    """The sum of function(item) over the items' first dimension, one after another (a scan)."""

    def add(total: Any, item: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(item)), None

    function = jax.jit(function)  # traced once, not for its shapes and again for the scan
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], items))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zero, items)[0]


def difference(ours: dict[str, tuple], theirs: dict[str, tuple], most: int = 5) -> str:
    """How two {path: shape} tables differ, in a sentence; empty when they agree."""
    rows = [f"{name} is missing" for name in ours if name not in theirs]
    rows += [f"{name} is not in this model" for name in theirs if name not in ours]
    for name, here in ours.items():
        if here != (there := theirs.get(name, here)):
            rows.append(f"{name} is {there} where this model has {here}")
    return "; ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
