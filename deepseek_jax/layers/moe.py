"""Mixture of experts: router, routed experts, shared experts, telemetry of what was dispatched."""

import dataclasses
import functools
import math
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from deepseek_jax.core import target
from deepseek_jax.layers.linear import Dtypes, SwiGLU, weight
from deepseek_jax.layers.router import Balance, Gate, check_router
from deepseek_jax.ops import routing
from deepseek_jax.ops.experts import routed_experts
from deepseek_jax.parallel.manual import gathered, per_device
from deepseek_jax.parallel.sharding import tokens_spec, weight_spec


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
    ) -> tuple[Float[Array, "B T D"], Int[Array, " E"], Int[Array, ""]]:
        c, capacity = self.config, None
        if isinstance(c.dispatch, Capacity):
            capacity = max(1, math.ceil(c.dispatch.factor * (experts.size / c.num_experts)))
            # Position before row: a later token must not take an earlier one's place.
            x, experts, weights = (jnp.swapaxes(a, 0, 1) for a in (x, experts, weights))
        e, d, f = c.num_experts, self.embed_dim, c.expert_dim
        inward = ("experts", "embed", "expert_mlp"), (e, d, f)
        outward = ("experts", "expert_mlp", "embed"), (e, f, d)
        leaves = (
            weight(self, name, shape, axes, reduced=(1,), outputs=(2,))
            for name, (axes, shape) in {"gate": inward, "up": inward, "down": outward}.items()
        )
        apply = functools.partial(_flat, capacity=capacity)
        spec = tokens_spec(*x.shape[:2])
        if capacity is None and target.partitioned() and spec:
            apply = _on_each_device(spec, inward, outward)
        y, counts, dropped = apply(x, experts, weights, *leaves)
        return (y if capacity is None else jnp.swapaxes(y, 0, 1)), counts, dropped


def _flat(x, experts, weights, *leaves, capacity=None):
    """`routed_experts` of [B, T, width]."""
    tokens = (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights))
    y, counts, dropped = routed_experts(*tokens, *leaves, capacity=capacity)
    return y.reshape(x.shape), counts, dropped


def _on_each_device(spec: PartitionSpec, inward: tuple, outward: tuple):
    """Every device sorts its own tokens and has all experts' weights, gathered for this layer.

    Left to itself, XLA would gather all tokens instead, or sum their products over the mesh. Where
    the tensor axis splits the experts' width, their parts of the result are added up.
    """
    batch = (*spec[0], spec[1])
    inward, outward = (weight_spec(*one) for one in (inward, outward))
    split = "tensor" in inward

    def of_one(x, experts, weights, *leaves):
        whole = (
            gathered(w, own, keep=("tensor",))
            for w, own in zip(leaves, (inward, inward, outward), strict=True)
        )
        y, counts, dropped = _flat(x, experts, weights, *whole)
        if split:
            y = jax.lax.psum(y.astype(jnp.float32), "tensor").astype(x.dtype)
        return y, jax.lax.psum(counts, batch), jax.lax.psum(dropped, batch)

    specs = (spec, spec, spec, inward, inward, outward)
    return per_device(of_one, specs, (spec, PartitionSpec(), PartitionSpec()))


class MixtureOfExperts(nn.Module):
    """Shared plus routed experts; also returns what the router did."""

    config: MoE
    embed_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        c = self.config
        valid = jnp.ones(x.shape[:2], bool) if segments is None else segments > 0
        gate = Gate(c.router, self.embed_dim, c.num_experts, self.dtypes, name="router")
        logits, routes = gate(x)
        experts = jnp.where(valid[..., None], routes.experts, c.num_experts)
        layer = Experts(c, self.embed_dim, self.dtypes, name="experts")
        y, counts, dropped = layer(x, experts, routes.weights)
        if c.num_shared_experts:
            width = c.num_shared_experts * c.expert_dim
            y = y + SwiGLU(self.embed_dim, width, self.dtypes, name="shared")(x)
        chosen = routing.expert_counts(routes.experts, valid, c.num_experts)
        return y, Routing(
            counts=counts,
            dropped=dropped,
            tokens=valid.sum(dtype=jnp.int32),
            entropy=routing.entropy(routes.probabilities, valid),
            sequence_loss=routing.sequence_loss(
                chosen, routes.probabilities, valid, c.router.num_active_experts
            ),
            uniform_loss=routing.uniform_loss(routes.probabilities, valid),
            z_loss=routing.z_loss(logits, valid),
            chosen=experts,
        )
