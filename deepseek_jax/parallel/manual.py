"""Per-device functions: the only caller of `jax.shard_map`, which must not be nested."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def per_device(
    function: Callable[..., Any],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: Any,
    *,
    checked: bool = True,
) -> Callable[..., Any]:
    """`function`, run on every device of the current mesh on its own part of each argument.

    `checked=False` is for kernels that say nothing of how their results vary over devices.
    """
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=checked)


def gathered(x: jax.Array, spec: PartitionSpec, keep: tuple[str, ...] = ()) -> jax.Array:
    """Within a per-device function: x, given by `spec`, whole along all axes but those kept.

    Backward, each device gets its own part of the sum over those axes: a reduce-scatter.
    """
    for dimension, axis in enumerate(spec):
        if axis is not None and axis not in keep:
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x
