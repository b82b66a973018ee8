"""Router telemetry, computed from what was really dispatched.

Usable inside jit and on summed counts: a step that accumulates microbatches adds their integers
first and measures once. A prediction block's router (MTP) counts as one more layer.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def router_metrics(routing: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
    """Scalars of {path of a block: Routing}, each a mean over layers unless it says otherwise.

    - router/max_violation: (most loaded expert) / (even load) - 1, MaxVio of arXiv 2408.15664
    - router/entropy: of the routing distribution over log E, mean over tokens, in 0..1
    - router/utilization_std: standard deviation of load / (even load)
    - router/dead_experts: experts of all layers together that got no token
    - router/dropped_fraction: of all choices that tokens made, those that capacity dropped

    Empty when no layer has experts.
    """
    if not routing:
        return {}
    violation, entropy, deviation, dead = [], [], [], []
    dropped = chosen = jnp.zeros(())
    for block in routing.values():
        counts = block.counts.astype(jnp.float32)  # [R, E]; float: their sum may pass 2^31
        share = counts / jnp.maximum(counts.mean(-1, keepdims=True), 1e-9)
        violation.append(share.max(-1) - (counts.sum(-1) > 0))  # nothing dispatched: 0, not -1
        deviation.append(share.std(-1))
        entropy.append(block.entropy / jnp.maximum(block.tokens, 1))
        dead.append((counts == 0).sum(-1))
        dropped += block.dropped.sum()
        chosen += block.dropped.sum() + counts.sum()
    return {
        "router/max_violation": jnp.concatenate(violation).mean(),
        "router/entropy": jnp.concatenate(entropy).mean(),
        "router/utilization_std": jnp.concatenate(deviation).mean(),
        "router/dead_experts": jnp.concatenate(dead).sum().astype(jnp.float32),
        "router/dropped_fraction": dropped / jnp.maximum(chosen, 1),
    }
