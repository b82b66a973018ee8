"""The device mesh from its axis sizes, multi-host start, and this process's share of a batch."""

import contextlib
import dataclasses
import math
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils

from deepseek_jax.core.axes import MESH_AXES
from deepseek_jax.core.errors import InputError, exit_code

FINISHING = 3600  # seconds that processes which are done wait for one that still writes the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each mesh axis; one of them may be -1: all devices that the others leave."""

    slice: int = 1
    """Groups of devices that a slow network joins."""
    stage: int = 1
    """Devices among which layers are dealt: a pipeline."""
    data: int = -1
    fsdp: int = 1
    """Data parallel, with parameters and optimizer state sharded too."""
    context: int = 1
    expert: int = 1
    tensor: int = 1
    stage_chunks: int = 1
    """Separate runs of layers that each stage holds; more shorten the wait for the first and last
    microbatch (interleaved 1F1B), and send more. Microbatches are the accumulation steps."""
    slice_gradients: Literal["float32", "int4"] = "float32"
    """How gradients cross the slow network: exactly, or in four bits with error feedback."""

    @property
    def by_slice(self) -> bool:
        """Whether a step has each slice's gradients apart before it adds them up."""
        return self.slice_gradients == "int4"

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            rule = "mesh sizes must be at least 1, one of them may be -1"
            raise ValueError(f"{rule}; they are {vars(self)}.")
        if self.stage_chunks < 1:
            raise ValueError(f"mesh.stage_chunks is {self.stage_chunks}; it must be at least 1.")


def start_processes() -> None:
    """Join the other processes when the environment names a coordinator; else nothing.

    JAX_COORDINATOR_ADDRESS=auto is enough where JAX knows the cluster (Cloud TPU, GKE's TPUs,
    Slurm, Open MPI); elsewhere it is host:port of process 0, and JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say the rest.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address or jax.distributed.is_initialized():
        return
    if address == "auto":  # JAX would take the word for a host's name
        del os.environ["JAX_COORDINATOR_ADDRESS"]
    given = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    count, rank = (None, None) if None in given else map(int, given)
    # It would swallow a SIGTERM that comes before the loop listens; the loop agrees by itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        num_processes=count, process_id=rank, shutdown_timeout_seconds=FINISHING
    )


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
    """Within it an error ends this process, if it is one of several, without JAX's way of leaving.

    That waits until all processes leave, and the others wait for this one in the next step.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, SystemExit):
            raise
        if (code := exit_code(error)) is None:
            traceback.print_exception(error)
        sys.stdout.flush()
        os._exit(1 if code is None else code)


def rows_share(sharding: jax.sharding.Sharding, rows: int) -> tuple[int, int]:
    """Which part of a batch's rows this process reads, of how many parts: (index, count).

    Processes that hold the same rows (their devices differ in `tensor`, say) read the same part.
    Raises InputError when a process's devices do not hold one block of rows.
    """
    parts = [part[0] for part in sharding.addressable_devices_indices_map((rows,)).values()]
    spans = sorted({(part.start or 0, rows if part.stop is None else part.stop) for part in parts})
    size = sum(stop - start for start, stop in spans)
    first = spans[0][0]
    if spans[-1][1] - first != size or rows % size or first % size:
        where = f"process {jax.process_index()} would hold rows {spans} of {rows}"
        raise InputError(f"mesh: {where}, not one block; order the axes so that each has a block")
    return first // size, rows // size


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
