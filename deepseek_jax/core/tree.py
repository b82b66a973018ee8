"""Select, map and compare pytree leaves by path."""

from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple) -> str:
    """`segment_0/block_0/attention/q/weight` from a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The tree as {path: leaf}, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any, **kwargs: Any) -> Any:
    """`jax.tree.map` whose function gets the path's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest, **kwargs
    )


def difference(ours: dict[str, tuple], theirs: dict[str, tuple], most: int = 5) -> str:
    """How two {path: shape} tables differ, in a sentence; empty when they agree."""
    rows = [f"{name} is missing" for name in ours if name not in theirs]
    rows += [f"{name} is not in this model" for name in theirs if name not in ours]
    for name, here in ours.items():
        if here != (there := theirs.get(name, here)):
            rows.append(f"{name} is {there} where this model has {here}")
    return "; ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
