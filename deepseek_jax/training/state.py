"""What training carries from step to step, how it lies on a mesh, and what that takes."""

import math
import re
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core import tree
from deepseek_jax.models.build import Network
from deepseek_jax.parallel.sharding import tree_shardings
from deepseek_jax.training.slices import abstract_left_out


@flax.struct.dataclass
class TrainState:
    """One training state; every field is arrays, the counters int32."""

    step: jax.Array  # steps done, skipped ones included
    params: Any  # the model's parameters, router biases among them
    opt_state: Any  # the optimizer's memory
    ema: Any  # an averaged copy of the parameters, or None
    loss_scale: jax.Array  # float32, what float16 losses are multiplied by (other dtypes: unused)
    good_steps: jax.Array  # finite steps since the loss scale last changed
    skipped: jax.Array  # consecutive steps skipped up to this one: something was not finite
    left_out: dict[str, jax.Array]  # of gradients between slices: see training/slices; mostly empty


def initial_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    loss_scale: float,
    left_out: dict[str, jax.ShapeDtypeStruct] | None = None,
) -> TrainState:
    """The state before the first step; `left_out` is what `abstract_state` has of it."""
    step, good_steps, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers
    scale = jnp.asarray(loss_scale, jnp.float32)
    nothing = {path: jnp.zeros(x.shape, x.dtype) for path, x in (left_out or {}).items()}
    opt_state = optimizer.init(params)
    return TrainState(step, params, opt_state, None, scale, good_steps, skipped, nothing)


def abstract_state(
    model: Network,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    memory: Literal["device", "pinned_host"] = "device",
    by_slice: bool = False,
) -> TrainState:
    """The state's shapes and shardings; the optimizer's trees lie like the parameters'.

    With `memory` pinned_host they lie so in the hosts' memory; see `on_device`. With `by_slice`
    there is what is left out of gradients between slices, of parameters that learn.
    """
    state = jax.eval_shape(lambda params: initial_state(params, optimizer, 1.0), model.shapes)
    like_params = tree.flatten(tree_shardings(mesh, model.specs, model.shapes))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        parameter = re.sub("^(params|opt_state/[a-z]+)/", "", path)
        sharding = like_params.get(parameter, everywhere)
        if memory == "pinned_host" and parameter in like_params and not path.startswith("params/"):
            sharding = sharding.with_memory_kind(memory)
        return leaf.update(sharding=sharding)

    left_out = abstract_left_out(mesh, model) if by_slice else {}
    learning = tree.flatten(state.opt_state["mu"]) if by_slice else {}
    left_out = {path: leaf for path, leaf in left_out.items() if path in learning}
    return tree.map_with_path(placed, state).replace(left_out=left_out)


def carried(state: TrainState, abstract: TrainState) -> TrainState:
    """The state at the end of a stage as the next one takes it, whose `abstract_state` this is.

    Memory of parameters that go on learning stays, others' goes, and what begins to learn begins
    with zeros.
    """
    have, want = (tree.flatten((x.opt_state, x.left_out)) for x in (state, abstract))
    new = {path: leaf for path, leaf in want.items() if path not in have}

    def nothing() -> dict[str, jax.Array]:
        return {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in new.items()}

    places = {path: leaf.sharding for path, leaf in new.items()}
    made = jax.jit(nothing, out_shardings=places)() if new else {}
    leaves = [made.get(path, have.get(path)) for path in want]
    form = jax.tree.structure((abstract.opt_state, abstract.left_out))
    opt_state, left_out = jax.tree.unflatten(form, leaves)
    return state.replace(opt_state=opt_state, left_out=left_out)


def on_device(state: TrainState) -> TrainState:
    """Within a step: the state with every array in the devices' memory, whence it came or not."""

    def moved(leaf: jax.Array) -> jax.Array:
        far = jax.typeof(leaf).memory_space == jax.memory.Space.Host
        return jax.device_put(leaf, jax.memory.Space.Device) if far else leaf

    return jax.tree.map(moved, state)


def memory_table(state: TrainState) -> str:
    """Every parameter's shape, dtype, sharding, and the bytes a device holds, as text.

    What the optimizer has no memory of is marked: it does not learn (or is a router's bias).
    """

    def local(part: Any) -> int:
        leaves = jax.tree.leaves(part)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    params, learning = tree.flatten(state.params), tree.flatten(state.opt_state["mu"])
    rows = [
        f"{path:42} {x.dtype!s:8} {list(x.shape)!s:20} {x.sharding.spec}"
        + ("" if path in learning else "  no optimizer memory")
        for path, x in params.items()
    ]
    weights, memory = local(params), local((state.opt_state, state.left_out))
    gradients = local([x for path, x in params.items() if path in learning])
    return "\n".join(rows) + (
        f"\nbytes a device: parameters {weights:,}, optimizer {memory:,}, gradients "
        f"{gradients:,}; together {weights + memory + gradients:,} (activations not counted)"
    )
