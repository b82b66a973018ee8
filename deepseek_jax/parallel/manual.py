"""Per-device functions: the only caller of `jax.shard_map`, which must not be nested."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def per_device(
    function: Callable[..., Any],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: Any,
) -> Callable[..., Any]:
    """`function`, run on every device of the current mesh on its own part of each argument.

    JAX does not follow how results vary over devices: kernels do not say, and our own slope rules
    and loops of traced length would each have to. So every use has a test of its gradients.
    """
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gathered(x: jax.Array, spec: PartitionSpec, keep: Any = ()) -> jax.Array:
    """Within a per-device function: x, given by `spec`, whole along all entries but those kept.

    Backward, each device gets its own part of the sum over those axes: a reduce-scatter.
    """
    for dimension, axis in enumerate(spec):
        if axis is not None and axis not in keep:
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x
