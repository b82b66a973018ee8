"""Chips that are not here: their published figures, and the devices that stand for them.

A TPU topology is described by libtpu's real compiler. No compiler for GPUs runs without one, so
`h100:64` is that many virtual CPU devices: the same mesh and the same collectives, and an estimate
of the bytes.
"""

import contextlib
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.core.target import published_flops
from deepseek_jax.parallel.compile import quiet


class Chip(NamedTuple):
    """Published figures of one JAX device; bytes, and bytes a second that it sends."""

    memory: float
    """HBM."""
    bandwidth: float
    """Of HBM, read or written."""
    links: float
    """To the devices of its domain: all ICI links of a TPU, NVLink."""
    network: float
    """To devices elsewhere: other slices of TPUs, other NVLink domains."""
    host: float
    """Memory of its host, a device's share."""
    domain: int = 0
    """Devices that the links join; 0: a slice, however large."""


# cloud.google.com/tpu/docs: v5e, v5p, v6e, tpu7x. A tpu7x chip is two devices.
# nvidia.com, data sheets of SXM modules (80 GB A100) and GB200 NVL72; hosts are DGX A100, H100 and
# H200 (2 TB), B200 (4 TB), and 480 GB a Grace; ConnectX-6 and -7 adapters, one a GPU.
CHIPS = {
    "TPU v5 lite": Chip(16 * 2**30, 819e9, 200e9, 3.125e9, 48e9),
    "TPU v5": Chip(95 * 2**30, 2765e9, 600e9, 6.25e9, 112e9),
    "TPU v6 lite": Chip(32 * 2**30, 1640e9, 448e9, 12.5e9, 180e9),
    "TPU7x": Chip(96 * 2**30, 3690e9, 600e9, 6.25e9, 120e9),
    "A100": Chip(80e9, 2039e9, 300e9, 25e9, 256e9, 8),
    "H100": Chip(80e9, 3350e9, 450e9, 50e9, 256e9, 8),
    "H200": Chip(141e9, 4800e9, 450e9, 50e9, 256e9, 8),
    "GB200": Chip(186e9, 8000e9, 900e9, 50e9, 240e9, 72),
    "B200": Chip(180e9, 8000e9, 900e9, 50e9, 512e9, 8),
}
GPUS = ("A100", "H100", "H200", "B200", "GB200")


class Place(NamedTuple):
    """Devices to compile for, and what they are."""

    devices: list[jax.Device]
    kind: str
    chip: Chip
    peak: float
    """bfloat16 FLOPs a second of one."""
    estimate: bool
    """Whether virtual devices stand for them."""


def described(name: str) -> Place:
    """A topology: v5p:8x8x8, v5p:8x8x8@2 (two slices), h100:64; InputError when there is none.

    Virtual devices must be asked for before JAX has made its own.
    """
    gpu = re.fullmatch(r"([a-z]+\d+):(\d+)", name.lower())
    if gpu and gpu[1].upper() in GPUS:
        kind, count = gpu[1].upper(), int(gpu[2])
        devices = _virtual(count, name)
    else:
        devices = _tpus(name)
        kind = devices[0].device_kind
    return Place(devices, kind, chip(kind), published_flops(kind), bool(gpu))


def chip(kind: str) -> Chip:
    """The figures of a kind of device; InputError for an unknown one."""
    for known, figures in CHIPS.items():
        if kind.startswith(known):
            return figures
    raise InputError(f"no figures are known of {kind}; add them to parallel/chips")


OTHERS = ("--xla_cpu_", "--xla_gpu_")  # how flags of the compilers for these begin


def _virtual(count: int, name: str) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has made its devices; perhaps they are enough
        jax.config.update("jax_num_cpu_devices", max(count, 1))
    found = jax.devices("cpu")
    if not 0 < count <= len(found):
        raise InputError(
            f"--topology {name!r} needs {count} virtual devices, and this process has "
            f"{len(found)}: write 1 or more, and ask before JAX starts"
        )
    return found[:count]


def _tpus(name: str) -> list[jax.Device]:
    require("libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no metadata server to ask
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is touched, so several may plan
    # An unknown flag ends the process, without a word, and libtpu knows few of other compilers'. It
    # reads them as late as its first compilation, so they stay away.
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(x for x in flags if not x.startswith(OTHERS))
    shape, _, slices = name.partition("@")
    options = {"num_slices": int(slices)} if slices.isdecimal() and int(slices) > 1 else {}
    try:
        if slices and not slices.isdecimal():
            raise ValueError(f"{slices!r} is no number of slices")
        with quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
            return list(found.devices)
    except Exception as error:  # whatever libtpu says of a name that it does not know
        raise InputError(
            f"--topology {name!r}: the TPU compiler refuses it; write its version and shape, e.g. "
            "v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, slices behind an @ (v5p:8x8x8@2), or "
            f"GPUs as h100:64 ({', '.join(map(str.lower, GPUS))}) ({str(error)[:200]})"
        ) from None
