"""The device mesh from its axis sizes, multi-host start, and this process's share of a batch."""

import dataclasses
import math
import os

import jax

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
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh sizes must be at least 1, one of them may be -1; they are "
                f"{dict(zip(MESH_AXES, sizes, strict=True))}."
            )


def start_processes() -> None:
    """Join the other processes when the environment names a coordinator; else nothing.

    JAX_COORDINATOR_ADDRESS alone is enough where JAX knows the cluster (TPU, Slurm, GKE, MPI);
    elsewhere JAX_NUM_PROCESSES and JAX_PROCESS_ID say the rest.
    """
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not coordinator or jax.distributed.is_initialized():
        return
    count, rank = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    if count is None or rank is None:
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(coordinator, int(count), int(rank))


def make_mesh(shape: MeshShape, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of all seven axes over `devices` (all by default); InputError when they do not fit."""
    devices = devices or jax.devices()
    sizes = [getattr(shape, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        table = ", ".join(f"mesh.{a} = {s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise InputError(
            f"the mesh needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices, and there "
            f"are {len(devices)}: {table}"
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=auto, devices=devices)
