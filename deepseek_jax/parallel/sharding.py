"""Logical names to mesh axes: one table for weights, one for activations, and `constrain`."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core.axes import BATCH_AXES, Spec
from deepseek_jax.core.errors import InputError

# The mesh axis, or axes, that shard each logical axis of a weight.
WEIGHTS: dict[str, str | tuple[str, ...]] = {
    "experts": "expert",
    "experts_over_slices": ("slice", "expert"),
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "expert_mlp"), "tensor"),
    # A pipeline's stages each keep a part of every layer between steps, and embeddings and head.
    **dict.fromkeys(("embed", "q_rank", "kv_rank"), ("fsdp", "stage")),
}


def weight_sharding(mesh: Mesh, spec: Spec, shape: tuple[int, ...]) -> NamedSharding:
    """How a weight lies on the mesh: an axis serves one dimension, and only if it divides it."""
    return NamedSharding(mesh, _weight_spec(mesh.shape, spec.axes, shape))


def weight_spec(axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The same of a weight with these logical axes on the current mesh."""
    return _weight_spec(jax.sharding.get_abstract_mesh().shape, axes, shape)


def _weight_spec(
    sizes: Mapping[str, int], axes: tuple[str, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, size in zip(axes, shape, strict=True):
        wanted = WEIGHTS.get(name, ())
        split = tuple(axis for axis in names_of(wanted) if sizes[axis] > 1 and axis not in used)
        while size % num_parts(sizes, split):
            split = split[:-1]  # the inner axis first
        used |= {*split}
        entries.append(entry_of(split))
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def num_parts(sizes: Mapping[str, int], axes: str | tuple[str, ...]) -> int:
    """Devices along a mesh axis, or along several together."""
    return math.prod(sizes[axis] for axis in names_of(axes))


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def entry_of(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """The entry of a PartitionSpec for these mesh axes."""
    return names if len(names) > 1 else names[0] if names else None


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes of a PartitionSpec."""
    return tuple(axis for entry in spec for axis in names_of(entry))


def without(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The spec, other axes alone."""
    return PartitionSpec(
        *(entry_of(tuple(a for a in names_of(entry) if a not in axes)) for entry in spec)
    )


def tree_shardings(mesh: Mesh, specs: Any, shapes: Any) -> Any:
    """`weight_sharding` of every leaf."""
    return jax.tree.map(lambda spec, leaf: weight_sharding(mesh, spec, leaf.shape), specs, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over every axis that carries batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """How many parts a batch's rows split into."""
    return num_parts(mesh.shape, BATCH_AXES)


def check_batch(mesh: Mesh, sizes: Iterable[Any], length: int) -> None:
    """InputError unless rows of `length` and each size's (batch_size, accumulation_steps) do split.

    Rows must split into two chunks for each device of the context axis (ops/ring).
    """
    shards, chunks = num_batch_shards(mesh), 2 * mesh.shape["context"]
    if chunks > 2 and length % chunks:
        raise InputError(
            f"sequence_length ({length}) must be a multiple of twice mesh.context ({chunks}): "
            "every device gets two chunks of a row"
        )
    for size in sizes:
        if size.batch_size // size.accumulation_steps % shards:
            raise InputError(
                f"batch_size ({size.batch_size}) over accumulation_steps "
                f"({size.accumulation_steps}) does not split over the mesh's {shards} batch shards"
            )


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch as arrays over the whole mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def constrain(x: jax.Array) -> jax.Array:
    """Ask for the activations' layout on the current mesh; without one, x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    manual = mesh.manual_axes  # inside a manual region only the others may be named
    rows = tuple(axis for axis in BATCH_AXES if axis not in manual)
    time = "context" if "context" not in manual else None
    if x.shape[0] % num_parts(mesh.shape, rows):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, time, None))


def tokens_spec(rows: int, length: int) -> PartitionSpec | None:
    """How [B, T, width] lies on the current mesh; None where it does not split evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or length % mesh.shape["context"]:
        return None
    if rows % num_parts(mesh.shape, BATCH_AXES):
        return None
    return PartitionSpec(BATCH_AXES, "context", None)


def flat_tokens(x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """[B, T, D] as [N, D], and the way back; on a mesh each device's tokens stay its own.

    Left to itself, XLA gathers the context axis: it cannot merge two dimensions that are split, and
    every device of it would compute what all of them have.
    """
    rows, length, width = x.shape
    spec = tokens_spec(rows, length)
    sizes = jax.sharding.get_abstract_mesh().shape
    if spec is None or sizes["context"] == 1:
        return x.reshape(-1, width), lambda y: y.reshape(rows, length, -1)
    parts, times = num_parts(sizes, BATCH_AXES), sizes["context"]
    own = rows // parts, length // times
    x = x.reshape(parts, own[0], times, own[1], width).swapaxes(1, 2).reshape(-1, width)

    def back(y: jax.Array) -> jax.Array:
        y = y.reshape(parts, times, *own, -1).swapaxes(1, 2).reshape(rows, length, -1)
        return jax.lax.with_sharding_constraint(y, spec)

    return jax.lax.with_sharding_constraint(x, PartitionSpec((*BATCH_AXES, "context"))), back


def heads_spec(rows: int, *num_heads: int) -> PartitionSpec | None:
    """How [B, T, heads, width] lies on the current mesh where each device has whole sequences.

    None where the context axis splits them, or rows or heads do not split evenly.
    """
    spec = tokens_spec(rows, 1)  # of one token, no context axis gets a part
    if spec is None:
        return None
    parts = jax.sharding.get_abstract_mesh().shape["tensor"]
    even = all(n % parts == 0 for n in num_heads)
    return PartitionSpec(spec[0], None, "tensor", None) if even else None
