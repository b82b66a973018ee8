"""Learning-rate schedules: a linear warmup, then a shape, as functions of the step from 0.

Cosine (arXiv 1608.03983) and warmup-stable-decay (MiniCPM, arXiv 2404.06395).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

# The factor of the peak learning rate at a step (an int or an array of them).
Factor: TypeAlias = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak down to a fraction of it."""

    final_fraction: float = 0.1
    """What is left of the peak at the last step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD:
    """Warmup-stable-decay: the peak until the last part of the run, then down."""

    decay_fraction: float = 0.2
    """The part of all steps that decays."""
    final_fraction: float = 0.0
    """What is left of the peak at the last step."""
    shape: Literal["linear", "sqrt"] = "linear"
    """sqrt is 1 - sqrt(progress) (arXiv 2405.18392)."""

    def __post_init__(self):
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(
                f"schedule.decay_fraction is {self.decay_fraction}; it is a part of all steps, "
                "above 0 and at most 1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak, to the end."""


Schedule: TypeAlias = Cosine | WSD | Constant


def make_schedule(schedule: Schedule, warmup_steps: int, num_steps: int) -> Factor:
    """The factor at step 0, 1, ... num_steps - 1 of the peak learning rate.

    The warmup's first step has 1/warmup_steps and its last the peak; the schedule's last step has
    exactly its final fraction, and later steps (there should be none) keep it.
    """

    def factor(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        warm = (step + 1) / max(warmup_steps, 1)
        return jnp.minimum(warm, 1.0) * _shape(schedule, step, warmup_steps, num_steps)

    return factor


def _shape(schedule: Schedule, step: Any, warmup_steps: int, num_steps: int) -> Any:
    last = num_steps - 1
    match schedule:
        case Constant():
            return jnp.ones_like(step)
        case Cosine(final_fraction=final):
            start = max(warmup_steps - 1, 0)
            done = jnp.clip((step - start) / max(last - start, 1), 0.0, 1.0)
            return final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        case WSD(final_fraction=final):
            start = last - max(round(schedule.decay_fraction * num_steps), 1)
            done = jnp.clip((step - start) / max(last - start, 1), 0.0, 1.0)
            fall = done if schedule.shape == "linear" else jnp.sqrt(done)
            return final + (1.0 - final) * (1.0 - fall)
