"""What training carries from step to step, how it lies on a mesh, and what that takes."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core import tree
from deepseek_jax.parallel.sharding import tree_shardings


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


def place(mesh: Mesh, specs: Any, abstract: TrainState) -> TrainState:
    """The state's shapes with shardings: the optimizer's trees like the parameters they follow."""
    like_params = tree_shardings(mesh, specs, abstract.params)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def follow(part: Any) -> Any:  # a tree like params may lack leaves
        if not isinstance(part, dict):
            return placed(part, everywhere)
        return jax.tree.map(
            lambda s, leaf: None if leaf is None else placed(leaf, s), like_params, part
        )

    state = jax.tree.map(lambda leaf: placed(leaf, everywhere), abstract.replace(params=None))
    return state.replace(
        params=follow(abstract.params),
        opt_state={name: follow(part) for name, part in abstract.opt_state.items()},
    )


def memory_table(state: TrainState) -> str:
    """Every parameter's shape, dtype, sharding, and the bytes a device holds, as text."""

    def local(part: Any) -> int:
        leaves = jax.tree.leaves(part)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    params = tree.flatten(state.params)
    width = max(map(len, params))
    rows = [
        f"{path:{width}}  {x.dtype!s:8}  {list(x.shape)!s:22}  {x.sharding.spec}"
        for path, x in params.items()
    ]
    weights, memory = local(state.params), local(state.opt_state)
    return "\n".join(
        [
            *rows,
            f"bytes a device: parameters {weights:,}, optimizer {memory:,}, gradients {weights:,}; "
            f"together {2 * weights + memory:,} (activations not counted)",
        ]
    )
