"""What training carries from step to step, and all that a checkpoint restores."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """One training state; every field is arrays.

    Attributes:
      step: int32, steps done, skipped ones included.
      params: the model's parameters, router biases among them.
      opt_state: the optimizer's memory.
      ema: an averaged copy of the parameters, or None.
      loss_scale: float32, what float16 losses are multiplied by (unused by other dtypes).
      good_steps: int32, finite steps since the loss scale last changed.
      skipped: int32, consecutive steps skipped up to this one because something was not finite.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    loss_scale: jax.Array
    good_steps: jax.Array
    skipped: jax.Array


def initial_state(
    params: Any, optimizer: optax.GradientTransformation, loss_scale: float
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=None,
        loss_scale=jnp.asarray(loss_scale, jnp.float32),
        good_steps=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )
