"""Gradients between slices in four bits (ops/compression): which leaves, how they lie, the sum.

Within a slice gradients are added up exactly, each device keeping a part; only these parts cross
the slow network. What rounding leaves out is kept in the state, a share for each slice.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core import tree
from deepseek_jax.core.axes import MESH_AXES, Spec
from deepseek_jax.models.build import Model
from deepseek_jax.ops import compression
from deepseek_jax.parallel.manual import per_device, scattered
from deepseek_jax.parallel.sharding import (
    axes_of,
    entry_of,
    names_of,
    num_parts,
    weight_sharding,
    without,
)

AXIS = "slice"


class Share(NamedTuple):
    """How one leaf's gradients lie that are yet to be added up over slices."""

    at: int
    """Where their dimension of slices stands: after that of stacked layers, which checkpoints
    take apart."""
    dimension: int | None
    """Which of the leaf's dimensions is dealt to the devices that hold the same of it, too."""
    spec: PartitionSpec
    """Of everything, the dimension of slices included."""


def shares(mesh: Mesh, specs: Any, shapes: Any) -> dict[str, Share | None]:
    """By path: how a leaf crosses slices, None if exactly or not at all.

    Norms and biases are small and stay exact; experts dealt to slices have no other share.
    """
    leaves = tree.flatten(shapes)
    flat = tree.flatten(specs).items()
    return {path: _share(mesh, spec, leaves[path].shape) for path, spec in flat}


def _share(mesh: Mesh, spec: Spec, shape: tuple[int, ...]) -> Share | None:
    lies = weight_sharding(mesh, spec, shape).spec
    entries, taken = [names_of(entry) for entry in lies], axes_of(lies)
    entries += [()] * (len(shape) - len(entries))
    if mesh.shape[AXIS] == 1 or AXIS in taken or not (spec.reduced or "vocab" in spec.axes):
        return None
    same = tuple(a for a in MESH_AXES if a != AXIS and a not in taken and mesh.shape[a] > 1)
    at, parts = int(spec.axes[0] == "layers"), num_parts(mesh.shape, same)
    room = [shape[i] // num_parts(mesh.shape, entries[i]) for i in range(len(shape))]
    fits = [i for i in range(at, len(shape)) if room[i] % parts == 0]
    dimension = max(fits, key=room.__getitem__) if fits and same else None
    if dimension is not None:
        entries[dimension] += same
    entries.insert(at, (AXIS,))
    return Share(at, dimension, PartitionSpec(*(entry_of(names) for names in entries)))


def abstract_left_out(mesh: Mesh, model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    """What may be left out of each leaf's sum, by path: shapes and shardings; see `no_left_out`."""
    shapes = tree.flatten(model.shapes)
    return {
        path: jax.ShapeDtypeStruct(
            (*shapes[path].shape[: share.at], mesh.shape[AXIS], *shapes[path].shape[share.at :]),
            jnp.float32,
            sharding=NamedSharding(mesh, share.spec),
        )
        for path, share in shares(mesh, model.specs, model.shapes).items()
        if share
    }


def share_of_slice(
    grad: jax.Array, share: Share | None, spec: PartitionSpec, axes: tuple[str, ...]
) -> jax.Array:
    """Within a per-device function: a device's gradient, as it lies by `spec`, added up over `axes`
    but for what its share leaves to slices."""
    split = axes_of(spec)
    inside = tuple(a for a in MESH_AXES if a in axes and a not in split and a != AXIS)
    if share is None:
        grad = jax.lax.psum(grad, inside) if inside else grad
        return jax.lax.psum(grad, AXIS) if AXIS in axes and AXIS not in split else grad
    if share.dimension is not None and inside:
        grad = scattered(grad, inside, share.dimension)
    elif inside:
        grad = jax.lax.psum(grad, inside)
    return jnp.expand_dims(grad, share.at)


def add_slices(
    grads: Any, left_out: Mapping[str, jax.Array], scale: jax.Array, model: Model
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients added up over slices, and what is left out of them.

    Of `left_out`'s leaves `grads` have each slice's share, times `scale`; what is left out is not
    scaled, so that loss scales may change.
    """
    mesh = jax.sharding.get_abstract_mesh()
    every = shares(mesh, model.specs, model.shapes).items()
    found = {path: share for path, share in every if share and path in left_out}
    specs = {path: share.spec for path, share in found.items()}

    def add(own, left, scale):
        sums, rests = {}, {}
        for path in own:  # one after another: each has several arrays of its leaf's size
            given = jax.lax.optimization_barrier((own[path], left[path], scale))
            total, rest = compression.summed(given[0] / given[2], given[1], AXIS)
            total, rest, scale = jax.lax.optimization_barrier((total * given[2], rest, scale))
            sums[path], rests[path] = total, rest
        return sums, rests

    leaves = tree.flatten(grads)
    whole = {path: without(spec, (AXIS,)) for path, spec in specs.items()}
    apply = per_device(add, (specs, specs, PartitionSpec()), (whole, specs))
    sums, left_out = apply({p: leaves[p] for p in found}, dict(left_out), scale)
    sums = {p: jnp.squeeze(x, found[p].at) for p, x in sums.items()}
    return tree.map_with_path(lambda path, grad: sums.get(path, grad), grads), left_out


def describe(mesh: Mesh, model: Model) -> str:
    """What a step's gradients take on the slow network, in a line."""
    slices, shapes, plain, sent = mesh.shape[AXIS], tree.flatten(model.shapes), 0, 0
    if slices == 1:
        return "gradients: one slice, so nothing crosses the slow network"
    specs = tree.flatten(model.specs)
    for path, share in shares(mesh, model.specs, model.shapes).items():
        shape, count = shapes[path].shape, slices if share else 1
        spec = share.spec if share else weight_sharding(mesh, specs[path], shape).spec
        size = math.prod(shape) * count // num_parts(mesh.shape, axes_of(spec))
        if share or AXIS not in axes_of(spec):
            plain += 4 * size
            sent += compression.wire_bytes(size, slices) if share else 4 * size
    factor = 2 * (slices - 1) / slices
    return (
        f"gradients between {slices} slices: int4 in blocks of {compression.BLOCK}, "
        f"{factor * sent / 1e6:.2f} MB a device and step, {plain / sent:.2f} times less than "
        "in float32"
    )
