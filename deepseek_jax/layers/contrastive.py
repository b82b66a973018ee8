"""Contrastive terms of a whole batch on the current mesh: one side passes around its devices."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.core.axes import BATCH_AXES
from deepseek_jax.core.errors import InputError
from deepseek_jax.ops import contrastive
from deepseek_jax.parallel.manual import in_region, per_device
from deepseek_jax.parallel.sharding import num_parts


def contrastive_terms(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    log_temperature: Float[Array, ""],
    bias: Float[Array, ""] | None = None,
    groups: Int[Array, " B"] | None = None,
    valid: Bool[Array, " B"] | None = None,
    *,
    kind: contrastive.Kind,
    chunk: int = 512,
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """`ops.contrastive.contrastive_terms` of all rows, which lie over the axes that carry batch.

    No device ever has more than its own rows of either side, some other device's, and the logits
    of its own rows with `chunk` columns. Raises InputError where rows do not split evenly.

    Negatives are those of the batch that is given: with accumulation steps, of a microbatch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    options = {"kind": kind, "chunk": chunk}
    if in_region():
        raise ValueError("in a per-device function, call ops.contrastive with its axes")
    axes = tuple(axis for axis in BATCH_AXES if not mesh.empty and mesh.shape[axis] > 1)
    if not axes:
        return contrastive.contrastive_terms(
            first, second, log_temperature, bias, groups, valid, **options
        )
    if first.shape[0] % num_parts(mesh.shape, axes):
        raise InputError(
            f"a contrastive batch of {first.shape[0]} rows does not split over the mesh's "
            f"{num_parts(mesh.shape, axes)} batch shards; change batch_size"
        )
    copies = mesh.size // num_parts(mesh.shape, axes)  # devices that have the same rows

    def of_one(first, second, shared, groups, valid):
        terms = contrastive.contrastive_terms(
            first, second, *shared, groups, valid, axes=axes, **options
        )
        return jax.tree.map(lambda x: jax.lax.psum(x / copies, mesh.axis_names), terms)

    rows, whole = PartitionSpec(axes), PartitionSpec()
    apply = per_device(of_one, (rows, rows, whole, rows, rows), whole)
    return apply(first, second, (log_temperature, bias), groups, valid)
