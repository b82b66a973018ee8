"""The device mesh from its axis sizes, multi-host start, and this process's share of a batch."""

import dataclasses
import math
import os

import jax
import numpy as np
from jax.experimental import mesh_utils

from deepseek_jax.core.axes import MESH_AXES
from deepseek_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each mesh axis; one of them may be -1: all devices that the others leave."""

    slice: int = 1
    """Groups of devices that a slow network joins."""
    stage: int = 1
    data: int = -1
    fsdp: int = 1
    """Data parallel, with parameters and optimizer state sharded too."""
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = list(vars(self).values())
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            rule = "mesh sizes must be at least 1, one of them may be -1"
            raise ValueError(f"{rule}; they are {vars(self)}.")


def start_processes() -> None:
    """Join the other processes when the environment names a coordinator; else nothing.

    JAX_COORDINATOR_ADDRESS alone is enough where JAX knows the cluster (TPU, Slurm, GKE, MPI);
    elsewhere JAX_NUM_PROCESSES and JAX_PROCESS_ID say the rest.
    """
    if os.environ.get("JAX_COORDINATOR_ADDRESS") and not jax.distributed.is_initialized():
        given = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
        count, rank = (None, None) if None in given else map(int, given)
        jax.distributed.initialize(num_processes=count, process_id=rank)


def make_mesh(shape: MeshShape, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of all seven axes over `devices` (all by default); InputError when they do not fit."""
    devices = devices or jax.devices()
    given = [getattr(shape, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in given if size != -1)
    sizes = tuple(len(devices) // fixed if size == -1 else size for size in given)
    if math.prod(sizes) != len(devices):
        needed = f"{'a multiple of ' if -1 in given else ''}{fixed} devices"
        table = ", ".join(f"mesh.{a} = {s}" for a, s in zip(MESH_AXES, given, strict=True))
        raise InputError(f"the mesh needs {needed}, and there are {len(devices)}: {table}")
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.Mesh(_laid_out(sizes, devices), MESH_AXES, axis_types=auto)


def _laid_out(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices as an array of these sizes, neighbors on the torus near each other.

    An axis of the mesh may take a part of the torus's axis: 16 x 32 of 8 x 8 x 8. InputError when
    the devices lie in slices, several, and the `slice` axis is not as long.
    """
    slices = len({getattr(device, "slice_index", None) for device in devices})
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **options)
    if sizes[0] != slices:
        raise InputError(f"the devices lie in {slices} slices: mesh.slice must be {slices}")
    outer = (slices, *(1 for _ in sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), outer, **options)
