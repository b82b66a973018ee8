"""Mixture of experts: router, routed experts, shared experts, telemetry of what was dispatched."""

import dataclasses
import math
import os
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from deepseek_jax.core import target
from deepseek_jax.core.axes import BATCH_AXES
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.linear import Dtypes, SwiGLU, weight
from deepseek_jax.layers.router import Balance, Gate, check_router
from deepseek_jax.ops import routing
from deepseek_jax.ops.exchange import Exchange, exchanged
from deepseek_jax.ops.experts import routed_experts
from deepseek_jax.parallel.manual import gathered, in_region, manual_axes, per_device
from deepseek_jax.parallel.sharding import num_parts, tokens_spec, weight_spec

SOUND = "--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropless:
    """Every token reaches every expert it chose."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Each expert takes at most `factor` times its even share; later positions drop first.

    The share is of the whole microbatch, so it grows with the row length. Serving and evaluation
    never drop.
    """

    factor: float = 1.25

    def __post_init__(self):
        if self.factor <= 0:
            raise ValueError(f"dispatch.factor is {self.factor}; a capacity must be above 0.")


Dispatch: TypeAlias = Dropless | Capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture-of-experts feed-forward layer."""

    num_experts: int
    expert_dim: int
    router: routing.Router
    num_shared_experts: int = 0
    """Experts every token passes; one MLP of width num_shared_experts * expert_dim."""
    dispatch: Dispatch = Dropless()
    balance: Balance = Balance()
    exchange: Exchange = Exchange()

    def __post_init__(self):
        if min(self.num_experts, self.expert_dim) < 1 or self.num_shared_experts < 0:
            raise ValueError(
                f"num_experts ({self.num_experts}) and expert_dim ({self.expert_dim}) must be at "
                f"least 1, num_shared_experts ({self.num_shared_experts}) at least 0."
            )
        check_router(self.router, self.num_experts)


class Routing(NamedTuple):
    """What one layer's router did with a microbatch; stacked layers add a leading dimension."""

    counts: Int[Array, "*R E"]
    """Tokens dispatched to each expert, after drops, padding excluded."""
    dropped: Int[Array, "*R"]
    """Choices that found their expert full."""
    tokens: Int[Array, "*R"]
    """Tokens routed (padding excluded)."""
    entropy: Float[Array, "*R"]
    """Normalized entropy of the routing distribution, summed over tokens."""
    sequence_loss: Float[Array, "*R"]
    """V3's sequence-wise loss, summed over rows."""
    uniform_loss: Float[Array, "*R"]
    """KL from the mean routing distribution to the uniform one, of this microbatch."""
    z_loss: Float[Array, "*R"]
    """Squared log-sum-exp of the router's logits, summed over tokens."""
    chosen: Int[Array, "*R B T A"] | None = None
    """The experts that each token chose, before drops; E is padding. Training leaves it out."""


class Experts(nn.Module):
    """The routed experts' weights, and their application to chosen tokens."""

    config: MoE
    embed_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        experts: Int[Array, "B T A"],
        weights: Float[Array, "B T A"],
        order: Int[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Int[Array, " E"], Int[Array, ""]]:
        c, capacity = self.config, None
        if isinstance(c.dispatch, Capacity):
            choices = experts.size * math.prod(
                jax.lax.axis_size(axis) for axis in manual_axes(*BATCH_AXES, "context")
            )
            capacity = max(1, math.ceil(c.dispatch.factor * (choices / c.num_experts)))
        e, d, f = c.num_experts, self.embed_dim, c.expert_dim
        inward, outward = expert_axes(c)
        home = experts_home(c)
        held = e // num_parts(jax.sharding.get_abstract_mesh().shape, manual_axes(*home))
        leaves = [
            weight(self, name, shape, axes, reduced=(1,), outputs=(2,))
            for name, axes, shape in (
                ("gate", inward, (held, d, f)),
                ("up", inward, (held, d, f)),
                ("down", outward, (held, f, d)),
            )
        ]
        given = x, experts, weights
        if in_region():
            rows, time = manual_axes(*BATCH_AXES), manual_axes("context")
            where = {"rows": rows, "order": order, "time": time[0] if time else None}
            return _of_this_device(c, home, capacity, where, *given, leaves)
        spec = tokens_spec(*x.shape[:2])
        if target.partitioned() and spec:
            shapes = weight_spec(inward, (e, d, f)), weight_spec(outward, (e, f, d))
            return _on_each_device(c, home, spec, shapes, capacity, order)(*given, *leaves)
        return _on_one_device(capacity, *given, *leaves)


def expert_axes(config: MoE) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Logical axes of the weights into the experts' hidden layer, and out of it."""
    spread = "experts_over_slices" if config.exchange.kind == "two_hop" else "experts"
    return (spread, "embed", "expert_mlp"), (spread, "expert_mlp", "embed")


def experts_home(config: MoE) -> tuple[str, ...]:
    """The axes of the current mesh along which devices keep their own experts; tokens travel.

    Empty where experts come to the tokens. InputError when the mesh cannot split them evenly.
    """
    mesh, kind = jax.sharding.get_abstract_mesh(), config.exchange.kind
    if mesh.empty or kind == "none":
        return ()
    if (
        kind == "ragged"
        and target.platform() == "gpu"
        and SOUND not in os.environ.get("XLA_FLAGS", "")
    ):
        raise InputError(
            "model.moe.exchange.kind is ragged: XLA on GPUs gets its gradients wrong "
            f"(marin-community/marin#8077); set XLA_FLAGS={SOUND}, or take padded"
        )
    if kind == "ragged" and target.limited():
        raise InputError(
            "model.moe.exchange.kind is ragged, for which libtpu has no program on v5e chips; take "
            "padded"
        )
    wanted = ("slice", "expert") if kind == "two_hop" else ("expert",)
    wanted = tuple(axis for axis in wanted if mesh.shape[axis] > 1)
    if config.num_experts % num_parts(mesh.shape, wanted):
        raise InputError(
            f"model.moe.exchange.kind is {kind}, which needs num_experts ({config.num_experts}) to "
            f"split evenly over mesh {' x '.join(wanted)}; change mesh.expert"
        )
    return wanted


def _on_one_device(capacity, x, experts, weights, *leaves):
    """`routed_experts` of [B, T, width]; XLA splits it where there are more devices."""
    given = x, experts, weights
    if capacity is not None:  # position before row: a later token must not take an earlier's place
        given = [jnp.swapaxes(a, 0, 1) for a in given]
    tokens = (a.reshape(-1, a.shape[-1]) for a in given)
    y, counts, dropped = routed_experts(*tokens, *leaves, capacity=capacity)
    y = y.reshape(given[0].shape)
    return (y if capacity is None else jnp.swapaxes(y, 0, 1)), counts, dropped


def _on_each_device(config: MoE, home, spec: PartitionSpec, leaf_specs, capacity, order):
    """Every device sorts its own tokens; experts come to them, or they go to the experts.

    Left to itself, XLA would gather all tokens instead, or sum their products over the mesh. Where
    the tensor axis splits the experts' width, their parts of the result are added up.
    """
    inward, outward = leaf_specs
    first, *last = (*outward, None, None, None)[:3]  # a spec may leave out what is whole
    turned = PartitionSpec(first, *reversed(last))
    rows, time = spec[0], spec[1]
    split = jax.sharding.get_abstract_mesh().shape[time] > 1
    keep = ("tensor", home, *home)  # an entry of a spec is an axis or several

    def of_one(x, experts, weights, order, *leaves):
        *leaves, down = leaves
        leaves = [gathered(w, inward, keep, x.dtype) for w in leaves]
        # Turned: its parts' last dimension may be narrower than a TPU's lanes, and of a gather
        # along it XLA keeps a copy of all layers' through the loop.
        leaves.append(gathered(down.mT, turned, keep, x.dtype).mT)
        where = {"rows": rows, "order": order, "time": time if split else None}
        found = _of_this_device(config, home, capacity, where, x, experts, weights, leaves)
        y, counts, dropped = found
        if "tensor" in inward:
            y = jax.lax.psum(y.astype(jnp.float32), "tensor").astype(x.dtype)
        return y, *jax.lax.psum((counts, dropped), (*rows, time))

    def run(x, experts, weights, *leaves):
        ordered = PartitionSpec(time) if order is not None else PartitionSpec()
        specs = (spec, spec, spec, ordered, inward, inward, outward)
        whole = PartitionSpec()
        return per_device(of_one, specs, (spec, whole, whole))(x, experts, weights, order, *leaves)

    return run


def _of_this_device(config: MoE, home, capacity, where, x, experts, weights, leaves):
    """Its tokens' results [B, T, D], what each expert got of them, and its drops."""
    num_experts, dropped = config.num_experts, jnp.int32(0)
    if capacity is not None:
        kept = routing.within_capacity(experts, capacity, num_experts, **where)
        dropped = (~kept & (experts < num_experts)).sum(dtype=jnp.int32)
        experts = jnp.where(kept, experts, num_experts)
    given = [a.reshape(-1, a.shape[-1]) for a in (x, experts, weights)]
    if home:
        everyone = manual_axes(*jax.sharding.get_abstract_mesh().shape)
        y = exchanged(config.exchange, num_experts, everyone, _apply, *given, tuple(leaves))
        counts = routing.expert_counts(experts, experts[..., 0] >= 0, num_experts).sum(0)
    else:
        y, counts, _ = routed_experts(*given, *leaves)
    return y.reshape(x.shape), counts, dropped


def _apply(x, experts, weights, leaves, load):
    """Own experts' part of any tokens' results."""
    return routed_experts(x, experts, weights, *leaves, expected=load.choices)[0]


class MixtureOfExperts(nn.Module):
    """Shared plus routed experts; also returns what the router did."""

    config: MoE
    embed_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Int[Array, "B T"] | None,
        order: Int[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        c = self.config
        valid = jnp.ones(x.shape[:2], bool) if segments is None else segments > 0
        gate = Gate(c.router, self.embed_dim, c.num_experts, self.dtypes, name="router")
        logits, routes = gate(x)
        experts = jnp.where(valid[..., None], routes.experts, c.num_experts)
        layer = Experts(c, self.embed_dim, self.dtypes, name="experts")
        y, counts, dropped = layer(x, experts, routes.weights, order)
        if c.num_shared_experts:
            width = c.num_shared_experts * c.expert_dim
            y = y + SwiGLU(self.embed_dim, width, self.dtypes, name="shared")(x)
        chosen = routing.expert_counts(routes.experts, valid, c.num_experts)
        time, everywhere = manual_axes("context"), manual_axes(*BATCH_AXES, "context")
        return y, Routing(
            counts=counts,
            dropped=dropped,
            tokens=valid.sum(dtype=jnp.int32),
            entropy=routing.entropy(routes.probabilities, valid),
            sequence_loss=routing.sequence_loss(
                chosen, routes.probabilities, valid, c.router.num_active_experts, time
            ),
            uniform_loss=routing.uniform_loss(routes.probabilities, valid, everywhere),
            z_loss=routing.z_loss(logits, valid),
            chosen=experts,
        )
