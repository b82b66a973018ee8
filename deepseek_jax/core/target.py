"""The devices that a program is compiled for: this process's own, or described ones elsewhere.

Fast forms are chosen by what will run them. `plan` compiles for chips that nobody has turned on, so
nothing asks JAX for its backend directly.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax

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


def partitioned() -> bool:
    """Whether XLA will split what is being traced over devices, which no Pallas kernel survives."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return len(devices()) > 1
    return any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
