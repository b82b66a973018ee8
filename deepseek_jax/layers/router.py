"""Routers as types: which experts a token goes to, with what weight, and how load is balanced.

Sources: softmax top-k (DeepSeekMoE, arXiv 2401.06066), softmax group-limited (V2, 2405.04434),
sigmoid with a bias that balances without an auxiliary loss (V3, 2412.19437, section 2.1.2).
"""

import dataclasses
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.linear import Dtypes, weight
from deepseek_jax.ops.routing import Routes, hierarchical_routes, sigmoid_routes, softmax_routes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax:
    """Top-k of a softmax; with groups, of the best groups only (V2: a group scores its maximum)."""

    num_active_experts: int
    normalize: bool = False
    """Whether the chosen weights are divided by their sum."""
    scale: float = 1.0
    num_groups: int = 1
    num_active_groups: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Top-k of sigmoid + bias, weighted without the bias; a group scores its top two's sum (V3)."""

    num_active_experts: int
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    num_active_groups: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchical:
    """Two levels: a softmax over groups, then one over the experts inside each chosen group.

    A weight is the product of its group's and its expert's probability. `num_active_experts`
    counts experts in all, the same number from each chosen group.
    """

    num_active_experts: int
    num_groups: int
    num_active_groups: int = 1
    normalize: bool = False
    scale: float = 1.0


Router: TypeAlias = Softmax | Sigmoid | Hierarchical


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
    """What keeps experts evenly loaded; a zero switches its part off."""

    bias_rate: float = 0.001
    """Step of the sigmoid router's bias toward even load (V3's gamma); ignored by softmaxes."""
    sequence_weight: float = 0.0001
    """V3's sequence-wise auxiliary loss (its alpha)."""
    uniform_weight: float = 0.0
    """KL divergence from the mean routing distribution to the uniform one, per microbatch."""
    z_weight: float = 0.0
    """Mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906)."""

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 0:
            raise ValueError(f"no rate or weight of {self} may be negative.")


def check_router(router: Router, num_experts: int) -> None:
    """Raise ValueError unless the router's choices exist among `num_experts` experts."""
    top, groups, chosen = router.num_active_experts, router.num_groups, router.num_active_groups
    if not 1 <= top <= num_experts:
        raise ValueError(
            f"router.num_active_experts is {top}, but there are num_experts = {num_experts}: "
            "it must lie between 1 and that."
        )
    if router.scale <= 0:
        raise ValueError(f"router.scale is {router.scale}; it must be above 0.")
    if groups < 1 or num_experts % groups:
        raise ValueError(
            f"router.num_groups ({groups}) must divide num_experts ({num_experts}) evenly."
        )
    if not 1 <= chosen <= groups:
        raise ValueError(
            f"router.num_active_groups is {chosen}, but there are num_groups = {groups}: "
            "it must lie between 1 and that."
        )
    if top > chosen * (num_experts // groups):
        raise ValueError(
            f"router.num_active_experts is {top}, but {chosen} active groups hold only "
            f"{chosen * (num_experts // groups)} experts: raise num_active_groups."
        )
    if isinstance(router, Hierarchical) and top % chosen:
        raise ValueError(
            f"router.num_active_experts ({top}) must be a multiple of num_active_groups ({chosen})."
        )
    if isinstance(router, Sigmoid) and groups > 1 and num_experts // groups < 2:
        raise ValueError(
            f"router.num_groups ({groups}) leaves one expert a group; a group scores by its top 2."
        )


class Gate(nn.Module):
    """The router's weights: float32 logits of every token for every expert, and its choices."""

    config: Router
    embed_dim: int
    num_experts: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T E"], Routes]:
        c = self.config
        x = x.astype(jnp.float32)
        logits = self._logits(x, "weight", self.num_experts)
        choice = {"num_active": c.num_active_experts, "normalize": c.normalize, "scale": c.scale}
        if isinstance(c, Hierarchical):
            groups = self._logits(x, "groups", c.num_groups)
            routes = hierarchical_routes(
                groups, logits, num_active_groups=c.num_active_groups, **choice
            )
            return logits, routes
        choice |= {"num_groups": c.num_groups, "num_active_groups": c.num_active_groups}
        if isinstance(c, Softmax):
            return logits, softmax_routes(logits, **choice)
        shape, axes = (self.num_experts,), ("router",)
        bias = weight(self, "bias", shape, axes, init="zeros", dtype=jnp.dtype(jnp.float32))
        return logits, sigmoid_routes(logits, jax.lax.stop_gradient(bias), **choice)

    def _logits(self, x, name, count):
        w = weight(
            self, name, (self.embed_dim, count), ("embed", "router"), reduced=(0,), outputs=(1,)
        )
        return jnp.einsum("btd,de->bte", x, w.astype(jnp.float32))
