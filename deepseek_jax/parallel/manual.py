"""Per-device functions: the only caller of `jax.shard_map`, which must not be nested."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def per_device(
    function: Callable[..., Any],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: Any,
    automatic: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """`function`, run on every device of the current mesh on its own part of each argument.

    JAX does not follow how results vary over devices: kernels do not say, and our own slope rules
    and loops of traced length would each have to. So every use has a test of its gradients. Along
    `automatic` axes XLA goes on splitting what is whole here.
    """
    names = set(jax.sharding.get_abstract_mesh().axis_names) - {*automatic}
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
    )


def in_region() -> bool:
    """Whether what is being traced is a per-device function already."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def manual_axes(*axes: str) -> tuple[str, ...]:
    """Those of several devices along which what is being traced is a per-device function."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in axes if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def gathered(x: jax.Array, spec: PartitionSpec, keep: Any = ()) -> jax.Array:
    """Within a per-device function: x, given by `spec`, whole along all entries but those kept.

    Backward, each device gets its own part of the sum over those axes: a reduce-scatter.
    """
    for dimension, axis in enumerate(spec):
        if axis is not None and axis not in keep:
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x
