"""Routing as pure functions: scores, choices, weights, and the losses that keep load even.

Sources: DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) and V3 (2412.19437, equations 12 to 20),
router z-loss (ST-MoE, 2202.08906). Everything is float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# DeepSeek adds 1e-20; its square, which the gradient divides by, would underflow float32.
TINY = 1e-18


class Routes(NamedTuple):
    """Where tokens go: expert ids, their weights, and the distribution they were chosen from."""

    experts: Int[Array, "*T A"]
    weights: Float[Array, "*T A"]
    probabilities: Float[Array, "*T E"]


def _limit_to_groups(
    scores: Float[Array, "*T E"], num_groups: int, num_active_groups: int, best: int
) -> Float[Array, "*T E"]:
    """Scores with all but the best groups at -inf; a group scores the sum of its `best` highest."""
    grouped = scores.reshape(*scores.shape[:-1], num_groups, -1)
    group_scores = jax.lax.top_k(grouped, best)[0].sum(-1)
    chosen = jax.lax.top_k(group_scores, num_active_groups)[1]
    keep = jax.nn.one_hot(chosen, num_groups, dtype=bool).any(-2)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _choose(
    ranking: Float[Array, "*T E"],
    scores: Float[Array, "*T E"],
    num_active: int,
    normalize: bool,
    scale: float,
) -> tuple[Int[Array, "*T A"], Float[Array, "*T A"]]:
    """The top experts by `ranking`, weighted by their `scores`."""
    experts = jax.lax.top_k(jax.lax.stop_gradient(ranking), num_active)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + TINY)
    return experts, weights * scale


def softmax_routes(
    logits: Float[Array, "*T E"],
    *,
    num_active: int,
    normalize: bool,
    scale: float,
    num_groups: int = 1,
    num_active_groups: int = 1,
) -> Routes:
    """Softmax, then top-k, of the best groups only when there are several (V2: group maximum)."""
    scores = jax.nn.softmax(logits, axis=-1)
    ranking = scores
    if num_groups > 1:
        ranking = _limit_to_groups(scores, num_groups, num_active_groups, best=1)
    return Routes(*_choose(ranking, scores, num_active, normalize, scale), scores)


def sigmoid_routes(
    logits: Float[Array, "*T E"],
    bias: Float[Array, " E"],
    *,
    num_active: int,
    normalize: bool,
    scale: float,
    num_groups: int = 1,
    num_active_groups: int = 1,
) -> Routes:
    """V3: chosen by sigmoid + bias, weighted by the sigmoid alone; a group scores its top two."""
    scores = jax.nn.sigmoid(logits)
    ranking = scores + bias.reshape((1,) * (scores.ndim - 1) + bias.shape)
    if num_groups > 1:
        ranking = _limit_to_groups(ranking, num_groups, num_active_groups, best=2)
    probabilities = scores / (scores.sum(-1, keepdims=True) + TINY)
    return Routes(*_choose(ranking, scores, num_active, normalize, scale), probabilities)


def hierarchical_routes(
    group_logits: Float[Array, "*T groups"],
    logits: Float[Array, "*T E"],
    *,
    num_active: int,
    normalize: bool,
    scale: float,
    num_active_groups: int,
) -> Routes:
    """Two softmaxes: over groups, then over the experts of each chosen group; weights multiply."""
    num_groups = group_logits.shape[-1]
    size = logits.shape[-1] // num_groups
    of_group = jax.nn.softmax(group_logits, axis=-1)
    grouped = logits.reshape(*logits.shape[:-1], num_groups, size)
    of_expert = jax.nn.softmax(grouped, axis=-1)
    probabilities = of_group[..., None] * of_expert
    groups = jax.lax.top_k(jax.lax.stop_gradient(of_group), num_active_groups)[1]
    inside = jnp.take_along_axis(probabilities, groups[..., None], axis=-2)
    per_group = num_active // num_active_groups
    local = jax.lax.top_k(jax.lax.stop_gradient(inside), per_group)[1]
    weights = jnp.take_along_axis(inside, local, axis=-1).reshape(*logits.shape[:-1], num_active)
    experts = (groups[..., None] * size + local).reshape(*logits.shape[:-1], num_active)
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + TINY)
    probabilities = probabilities.reshape(logits.shape)
    return Routes(experts.astype(jnp.int32), weights * scale, probabilities)


def expert_counts(
    experts: Int[Array, "B T A"], valid: Bool[Array, "B T"], num_experts: int
) -> Int[Array, "B E"]:
    """How many valid tokens of each row chose each expert."""
    chosen = experts[..., None] == jnp.arange(num_experts)[None, None, None, :]
    return (chosen & valid[:, :, None, None]).sum((1, 2), dtype=jnp.int32)


def sequence_loss(
    counts: Int[Array, "B E"],
    probabilities: Float[Array, "B T E"],
    valid: Bool[Array, "B T"],
    num_active: int,
) -> Float[Array, ""]:
    """V3's sequence-wise balance loss (equations 17 to 20), summed over rows, without its alpha.

    Equation 18 counts each token's top experts by score alone; `counts` are of the experts really
    chosen, bias and group limit included: the same while the bias is 0 and there is one group.
    """
    num_experts = counts.shape[-1]
    lengths = jnp.maximum(valid.sum(-1, keepdims=True), 1).astype(jnp.float32)
    load = counts * (num_experts / num_active) / lengths
    mean = jnp.where(valid[..., None], probabilities, 0.0).sum(1) / lengths
    return (load * mean).sum()


def uniform_loss(
    probabilities: Float[Array, "B T E"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """KL divergence from the mean routing distribution of this microbatch to the uniform one."""
    num_experts = probabilities.shape[-1]
    total = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    mean = jnp.where(valid[..., None], probabilities, 0.0).sum((0, 1)) / total
    return (mean * jnp.log(jnp.maximum(mean * num_experts, 1e-20))).sum()


def z_loss(logits: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Squared log-sum-exp of the router's logits, summed over valid tokens."""
    return jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0).sum()


def entropy(probabilities: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Entropy of each valid token's routing distribution over log E (so 0 to 1), summed."""
    num_experts = probabilities.shape[-1]
    per_token = -(probabilities * jnp.log(jnp.maximum(probabilities, 1e-20))).sum(-1)
    return jnp.where(valid, per_token, 0.0).sum() / max(math.log(num_experts), 1e-20)
