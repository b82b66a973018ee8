"""Experts in another order, with everything that knows their numbers: the output stays the same.

An order says which expert each slot takes. It keeps a router's groups together: they may change
places as a whole, and experts within them.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError

AXES = {  # of one layer's leaves: the dimension that numbers experts, or groups of them
    **dict.fromkeys(("moe/experts/gate", "moe/experts/up", "moe/experts/down"), 0),
    **{"moe/router/weight": 1, "moe/router/bias": 0, "moe/router/groups": 1},
}


def moved(params: Any, orders: Mapping[str, np.ndarray], num_groups: int = 1) -> Any:
    """A tree like `params`, its experts moved: {path of a block: orders [R, E]}, one a layer.

    Any tree that has the parameters' paths in its own will do: moments, or a whole train state, so
    that training goes on. Blocks without an order stay. `num_groups` is the router's. InputError
    where an order is none, or tears a group apart.
    """
    known = set()

    def of_leaf(path: str, leaf: Any) -> Any:
        for block, given in orders.items():
            name = f"/{path}".partition(f"/{block}/")[2]
            if name in AXES:
                known.add(block)
                if len(given) != leaf.shape[0]:
                    raise InputError(f"{block}: {len(given)} orders for {leaf.shape[0]} layers")
                index = np.stack([taken(name, order, num_groups) for order in given])
                shape = [leaf.shape[0], *(1,) * (leaf.ndim - 1)]
                shape[1 + AXES[name]] = -1
                return jnp.take_along_axis(leaf, index.reshape(shape), 1 + AXES[name])
        return leaf

    result = tree.map_with_path(of_leaf, params)
    if unknown := orders.keys() - known:
        raise InputError(f"{', '.join(sorted(unknown))}: not a block with experts")
    return result


def taken(name: str, order: np.ndarray, num_groups: int) -> np.ndarray:
    """What a leaf of one layer takes along AXES[name] when its experts come in this order [E].

    InputError unless each expert comes once and each group's experts together.
    """
    order = np.asarray(order)
    if not np.array_equal(np.sort(order), np.arange(order.size)):
        raise InputError(f"{order.tolist()} is no order of {order.size} experts")
    groups = order.reshape(num_groups, -1) // (order.size // num_groups)
    if (groups != groups[:, :1]).any():
        raise InputError(f"{order.tolist()} tears the router's {num_groups} groups apart")
    return groups[:, 0] if name.endswith("router/groups") else order
