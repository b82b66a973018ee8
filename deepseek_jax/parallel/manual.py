"""Per-device functions: the only caller of `jax.shard_map`, which nobody else may nest."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.core import target


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


def gathered(
    x: jax.Array, spec: PartitionSpec, keep: Any = (), dtype: jnp.dtype | None = None
) -> jax.Array:
    """Within a per-device function: x, given by `spec`, whole along all entries but those kept.

    Backward, each device gets its own part of the sum over those axes: a reduce-scatter. What is
    about to be cast to bfloat16, as `dtype` says, is rounded to it here, its slopes are not: XLA
    then sends that type, and does not keep every layer's copy in it all through a loop, as it would
    of a mere cast.
    """
    if dtype == jnp.bfloat16:
        kept = jnp.finfo(dtype)
        narrow = functools.partial(
            jax.lax.reduce_precision, exponent_bits=kept.nexp, mantissa_bits=kept.nmant
        )
        x = jax.custom_derivatives.linear_call(
            lambda _, x: narrow(x), lambda _, slope: slope, (), x
        )
    for dimension, axis in enumerate(spec):
        if axis is not None and axis not in keep:
            together = functools.partial(
                jax.lax.all_gather, axis_name=axis, axis=dimension, tiled=True
            )
            apart = functools.partial(scattered, axis=axis, dimension=dimension)
            x = _on_parts(together, apart, x, spec, own=len(_goes(axis)) > 1)
    return x


def scattered(x: jax.Array, axis: Any, dimension: int) -> jax.Array:
    """Within a per-device function: this device's part of the sum over one axis or several."""
    for one, groups in _goes(axis):
        x = jax.lax.psum_scatter(
            x, one, scatter_dimension=dimension, axis_index_groups=groups, tiled=True
        )
    return x


def _goes(axis: Any) -> list[tuple[Any, list[list[int]] | None]]:
    """Axes, and groups of devices along them, whose reduce-scatters in a row are one along `axis`.

    Over all chips at once the TPU's compiler would make every sum whole and then take a part of it
    (libtpu 0.0.52): twice the bytes, and a whole slope's memory.
    """
    mesh, size = jax.sharding.get_abstract_mesh(), jax.lax.axis_size(axis)
    if size * mesh.shape.get("slice", 1) != mesh.size or target.platform() != "tpu":
        return [(axis, None)]
    several = [one for one in (axis if isinstance(axis, tuple) else (axis,)) if mesh.shape[one] > 1]
    if len(several) > 1:
        return [(one, None) for one in several]
    near = next((n for n in range(math.isqrt(size), 1, -1) if size % n == 0), 1)
    if near == 1:
        return [(axis, None)]
    far = [list(range(first, size, near)) for first in range(near)]
    return [(*several, far), (*several, [list(range(i, i + near)) for i in range(0, size, near)])]


def traded(x: jax.Array, spec: PartitionSpec, axis: str, split: int, join: int) -> jax.Array:
    """Within a per-device function: x, given by `spec`, with other dimensions split along an axis.

    Before it is whole along dimension `split`, behind it along `join`: an all-to-all.
    """
    trade = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
    to = functools.partial(trade, split_axis=split, concat_axis=join)
    back = functools.partial(trade, split_axis=join, concat_axis=split)
    return _on_parts(to, back, x, spec)


def _on_parts(
    forward: Any, backward: Any, x: jax.Array, spec: PartitionSpec, own: bool = False
) -> jax.Array:
    """A linear collective and its transpose, each on what a device has along automatic axes too.

    `own`: the transpose is not the one that JAX would make.

    Left to itself XLA makes what a collective takes and gives whole along them: a pipeline's
    weights, in every tick. This is the one per-device function within another; JAX cannot
    differentiate such, hence the transpose.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {a for a in mesh.axis_names if a not in mesh.manual_axes and mesh.shape[a] > 1}
    if not axes and not own:
        return forward(x)
    if axes:
        part = PartitionSpec(*(axis if axis in axes else None for axis in spec))
        names = {"in_specs": part, "out_specs": part, "axis_names": axes, "check_vma": False}
        forward, backward = (jax.shard_map(f, **names) for f in (forward, backward))
    return jax.custom_derivatives.linear_call(
        lambda _, x: forward(x), lambda _, slope: backward(slope), (), x
    )
