"""Learning-rate schedules: a linear warmup, then a shape, as functions of the step from 0.

Cosine (arXiv 1608.03983) and warmup-stable-decay (MiniCPM, arXiv 2404.06395).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak down to a fraction of it."""

    final_fraction: float = 0.1
    """What is left of the peak at the last step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD:
    """Warmup-stable-decay: the peak until the last part of the steps, then straight down."""

    decay_fraction: float = 0.2
    """The part of all steps that decays."""
    final_fraction: float = 0.0

    def __post_init__(self):
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"schedule.decay_fraction ({self.decay_fraction}) must lie in (0, 1].")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak, to the end."""


Schedule: TypeAlias = Cosine | WSD | Constant


def make_schedule(schedule: Schedule, warmup_steps: int, num_steps: int) -> Callable[[Any], Any]:
    """The factor of the peak learning rate as a function of the step, 0 to num_steps - 1.

    The warmup's first step has 1/warmup_steps and its last the peak; the schedule's last step has
    exactly its final fraction, which later steps keep. Steps may be arrays.
    """
    last = num_steps - 1

    def factor(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
        if isinstance(schedule, Constant):
            return warm
        cosine = isinstance(schedule, Cosine)
        length = 0 if cosine else max(round(schedule.decay_fraction * num_steps), 1)
        start = max(warmup_steps - 1, 0) if cosine else last - length
        done = jnp.clip((step - start) / max(last - start, 1), 0.0, 1.0)
        left = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if cosine else 1.0 - done
        return warm * (schedule.final_fraction + (1.0 - schedule.final_fraction) * left)

    return factor
