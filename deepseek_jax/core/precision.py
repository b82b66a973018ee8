"""Which dtype parameters, arithmetic and outputs use."""

import dataclasses
import pathlib
from typing import Literal

import jax.numpy as jnp

from deepseek_jax.core import target

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes. Norms, softmaxes, router scores and losses are float32 whatever these say."""

    compute: Literal["auto", Dtype] = "auto"
    """Arithmetic of matmuls and activations; auto picks by hardware and says what."""
    params: Dtype = "float32"
    """Stored parameters (the router bias stays float32)."""
    loss_scale: float = 32768.0
    """Where float16's dynamic loss scale starts (other dtypes do not scale)."""
    loss_scale_growth: int = 2000
    """Finite float16 steps after which the loss scale doubles."""

    def __post_init__(self):
        scale, growth = self.loss_scale, self.loss_scale_growth
        if scale < 1 or growth < 1:
            given = f"precision.loss_scale ({scale}) and precision.loss_scale_growth ({growth})"
            raise ValueError(f"{given} must be at least 1.")


def compute_dtype(precision: Precision) -> tuple[jnp.dtype, str]:
    """The dtype of arithmetic on this process's devices, and why, in a few words."""
    if precision.compute != "auto":
        return jnp.dtype(precision.compute), "as configured"
    platform = target.platform()
    if platform != "cpu":
        return jnp.dtype(jnp.bfloat16), f"auto: {platform} has bfloat16 matrix units"
    if found := {"amx_bf16", "avx512_bf16"} & _cpu_flags():
        return jnp.dtype(jnp.bfloat16), f"auto: this CPU multiplies bfloat16 ({min(found)})"
    return jnp.dtype(jnp.float32), "auto: this CPU has no bfloat16 arithmetic"


def _cpu_flags() -> set[str]:
    info = pathlib.Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()
