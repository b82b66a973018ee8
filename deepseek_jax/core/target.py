"""The devices that a program is compiled for: this process's own, or described ones elsewhere.

Fast forms are chosen by what will run them. `plan` compiles for chips that nobody has turned on, so
what chooses a form asks here, not JAX's own backend.
"""

import contextlib
import contextvars
import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Iterator, Sequence

import jax

# Dense bfloat16 TFLOP/s of one JAX device, by a part of its device_kind; the first match counts.
# Chips of TPU v2, v3 and 7 (2,307) show up as two devices.
PEAKS = {
    "TPU7": 1153.5, "TPU v6": 918, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459, "TPU v4": 275,
    "TPU v3": 61.5, "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250, "H200": 989,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121,
}  # fmt: skip

# What the TPU compiler only does when asked: other work while an all-to-all is on its way (beside
# ragged ones it does so anyway). It takes memory, for nothing where all of them are small: 0.9 of
# 99 GB of DeepSeek-V3.
ASYNCHRONOUS = {"xla_tpu_enable_async_all_to_all": True}
LIMITED = ("TPU v5 lite", "TPU v5e")  # that compiler gives up on it there, and on ragged ones

PCI = pathlib.Path("/sys/bus/pci/devices")
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
GOOGLE = "0x1ae0"  # the vendor of every TPU there

_DESCRIBED: contextvars.ContextVar[tuple | None] = contextvars.ContextVar("devices", default=None)


@contextlib.contextmanager
def compiling_for(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Within it, programs are written for these devices."""
    token = _DESCRIBED.set(tuple(devices))
    try:
        yield
    finally:
        _DESCRIBED.reset(token)


def devices() -> Sequence[jax.Device]:
    """All devices of the job."""
    return _DESCRIBED.get() or jax.devices()


def platform() -> str:
    """cpu, gpu or tpu."""
    described = _DESCRIBED.get()
    return described[0].platform if described else jax.default_backend()


def limited() -> bool:
    """Whether the chips' routing is what libtpu calls limited: v5e's."""
    return platform() == "tpu" and devices()[0].device_kind.startswith(LIMITED)


def travel_options() -> dict[str, bool]:
    """The compiler's options for a program whose tokens travel between devices."""
    return ASYNCHRONOUS if platform() == "tpu" and not limited() else {}


def partitioned() -> bool:
    """Whether XLA will split what is being traced over devices, which no Pallas kernel survives."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return len(devices()) > 1
    return any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)


def published_flops(kind: str) -> float | None:
    """A second, in bfloat16, of one device of this kind; None for an unknown one."""
    found = (peak for part, peak in PEAKS.items() if part.lower() in kind.lower())
    return next((teraflops * 1e12 for teraflops in found), None)


def leave_absent_tpus() -> None:
    """Keep JAX from libtpu where it is installed for `plan` alone; call it before JAX has devices.

    Without chips libtpu prints errors, and JAX's profiler crashes in it. Nothing changes where a
    TPU or another accelerator's plugin is there, or JAX_PLATFORMS says what to use.
    """
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]  # made while JAX is imported
    if chosen or importlib.util.find_spec("libtpu") is None:
        return
    vendors = (path.read_text().strip() for path in PCI.glob("*/vendor"))
    if GOOGLE not in vendors and not importlib.metadata.entry_points(group="jax_plugins"):
        jax.config.update("jax_platforms", "cpu")


def order_collectives() -> None:
    """Where several CPU devices work together, keep XLA from starting their collectives at will.

    Its threads all wait, each device for one that has begun with another collective: seen on two
    cores, with stages. Call it before JAX has devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    together = "host_platform_device_count" in flags or "JAX_COORDINATOR_ADDRESS" in os.environ
    if together and IN_ORDER.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {IN_ORDER}".strip()
