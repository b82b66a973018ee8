"""Router telemetry, computed from what was really dispatched.

Usable inside jit and on summed counts: a step that accumulates microbatches adds their integers
first and measures once. A prediction block's router (MTP) counts as one more layer.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def router_metrics(routing: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
    """Scalars of {path of a block: Routing}, each a mean over layers unless it says otherwise.

    - router/max_violation: (most loaded expert) / (even load) - 1, MaxVio of arXiv 2408.15664
    - router/entropy: of the routing distribution over log E, mean over tokens, in 0..1
    - router/utilization_std: standard deviation of load / (even load)
    - router/dead_experts: experts of all layers together that got no token
    - router/dropped_fraction: of all choices that tokens made, those that capacity dropped

    Empty when no layer has experts; all layers that do have equally many.
    """
    if not routing:
        return {}
    layers = jax.tree.map(lambda *blocks: jnp.concatenate(blocks), *routing.values())
    counts = layers.counts.astype(jnp.float32)  # [L, E]; float: their sum may pass 2^31
    share = counts / jnp.maximum(counts.mean(-1, keepdims=True), 1e-9)
    dropped = layers.dropped.astype(jnp.float32).sum()
    return {
        "router/max_violation": (share.max(-1) - (counts.sum(-1) > 0)).mean(),  # no token: 0
        "router/entropy": (layers.entropy / jnp.maximum(layers.tokens, 1)).mean(),
        "router/utilization_std": share.std(-1).mean(),
        "router/dead_experts": (counts == 0).sum().astype(jnp.float32),
        "router/dropped_fraction": dropped / jnp.maximum(counts.sum() + dropped, 1),
    }
