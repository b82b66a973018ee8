"""The router as a layer: a float32 gate, what keeps its load even, and which routers can be.

A bias that balances without an auxiliary loss: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.linear import Dtypes, weight
from deepseek_jax.ops.matmul import dot
from deepseek_jax.ops.routing import (
    Hierarchical,
    Router,
    Routes,
    Sigmoid,
    Softmax,
    hierarchical_routes,
    sigmoid_routes,
    softmax_routes,
)


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
    if router.scale <= 0:
        raise ValueError(f"router.scale is {router.scale}; it must be above 0.")
    if groups < 1 or num_experts % groups:
        raise ValueError(
            f"router.num_groups ({groups}) must divide num_experts ({num_experts}) evenly."
        )
    for name, value, limit, most in (
        ("num_active_experts", top, "num_experts", num_experts),
        ("num_active_groups", chosen, "num_groups", groups),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"router.{name} is {value}; it must be from 1 to {limit} = {most}.")
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
        if isinstance(c, Hierarchical):
            return logits, hierarchical_routes(c, logits, self._logits(x, "groups", c.num_groups))
        if isinstance(c, Softmax):
            return logits, softmax_routes(c, logits)
        shape, axes = (self.num_experts,), ("router",)
        bias = weight(self, "bias", shape, axes, init="zeros", dtype=jnp.dtype(jnp.float32))
        return logits, sigmoid_routes(c, logits, jax.lax.stop_gradient(bias))

    def _logits(self, x, name, count):
        shape, axes = (self.embed_dim, count), ("embed", "router")
        w = weight(self, name, shape, axes, reduced=(0,), outputs=(1,))
        return dot("btd,de->bte", x, w.astype(jnp.float32))
