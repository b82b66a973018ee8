"""Routers as types and pure functions: choices, weights, and the losses that keep load even.

Sources: DeepSeekMoE (arXiv 2401.06066), V2 (2405.04434, section 2.1.2), V3 (2412.19437, equations
12 to 20), router z-loss (ST-MoE, 2202.08906). Everything is float32.
"""

import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Choice:
    num_active_experts: int
    normalize: bool = False
    """Whether the chosen weights are divided by their sum."""
    scale: float = 1.0
    num_groups: int = 1
    num_active_groups: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(_Choice):
    """Top-k of a softmax; with groups, of the best groups only (V2: a group scores its maximum)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid(_Choice):
    """Top-k of sigmoid + bias, weighted without the bias; a group scores its top two's sum (V3)."""

    normalize: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchical(_Choice):
    """Two levels: a softmax over groups, then one over the experts inside each chosen group.

    A weight is the product of its group's and its expert's probability. `num_active_experts`
    counts experts in all, the same number from each chosen group.
    """

    num_groups: int = dataclasses.field()  # without a default


Router: TypeAlias = Softmax | Sigmoid | Hierarchical


def _routes(
    router: Router, scores: Float[Array, "*T E"], experts: Int[Array, "*T A"], probabilities: Array
) -> Routes:
    """The chosen experts, weighted by their scores."""
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + TINY)
    return Routes(experts, weights * router.scale, probabilities)


def _top(router: Router, ranking: Float[Array, "*T E"], best: int) -> Int[Array, "*T A"]:
    """The top experts, of the best groups only; a group scores the sum of its `best` highest."""
    if router.num_groups > 1:
        grouped = ranking.reshape(*ranking.shape[:-1], router.num_groups, -1)
        group_scores = jax.lax.top_k(grouped, best)[0].sum(-1)
        chosen = jax.lax.top_k(group_scores, router.num_active_groups)[1]
        keep = jax.nn.one_hot(chosen, router.num_groups, dtype=bool).any(-2)
        ranking = jnp.where(keep[..., None], grouped, -jnp.inf).reshape(ranking.shape)
    return jax.lax.top_k(jax.lax.stop_gradient(ranking), router.num_active_experts)[1]


def softmax_routes(router: Softmax, logits: Float[Array, "*T E"]) -> Routes:
    """Softmax, then top-k, of the best groups only when there are several (V2: group maximum)."""
    scores = jax.nn.softmax(logits, axis=-1)
    return _routes(router, scores, _top(router, scores, best=1), scores)


def sigmoid_routes(
    router: Sigmoid, logits: Float[Array, "*T E"], bias: Float[Array, " E"]
) -> Routes:
    """V3: chosen by sigmoid + bias, weighted by the sigmoid alone; a group scores its top two."""
    scores = jax.nn.sigmoid(logits)
    ranking = scores + bias.reshape((1,) * (scores.ndim - 1) + bias.shape)
    probabilities = scores / (scores.sum(-1, keepdims=True) + TINY)
    return _routes(router, scores, _top(router, ranking, best=2), probabilities)


def hierarchical_routes(
    router: Hierarchical, logits: Float[Array, "*T E"], group_logits: Float[Array, "*T groups"]
) -> Routes:
    """Two softmaxes: over groups, then over the experts of each chosen group; weights multiply."""
    grouped = logits.reshape(*group_logits.shape, -1)
    of_group = jax.nn.softmax(group_logits, axis=-1)
    probabilities = of_group[..., None] * jax.nn.softmax(grouped, axis=-1)
    groups = jax.lax.top_k(jax.lax.stop_gradient(of_group), router.num_active_groups)[1][..., None]
    inside = jnp.take_along_axis(jax.lax.stop_gradient(probabilities), groups, axis=-2)
    local = jax.lax.top_k(inside, router.num_active_experts // router.num_active_groups)[1]
    experts = (groups * grouped.shape[-1] + local).reshape(*logits.shape[:-1], -1)
    probabilities = probabilities.reshape(logits.shape)
    return _routes(router, probabilities, experts.astype(jnp.int32), probabilities)


def expert_counts(
    experts: Int[Array, "B T A"], valid: Bool[Array, "B T"], num_experts: int
) -> Int[Array, "B E"]:
    """How many valid tokens of each row chose each expert."""
    chosen = experts[..., None] == jnp.arange(num_experts)[None, None, None, :]
    return (chosen & valid[:, :, None, None]).sum((1, 2), dtype=jnp.int32)


def within_capacity(
    experts: Int[Array, "B T A"],
    capacity: int,
    num_experts: int,
    rows: tuple[str, ...] = (),
    order: Int[Array, " T"] | None = None,
    time: str | None = None,
) -> Bool[Array, "B T A"]:
    """Which choices are among their expert's first `capacity`: position before row.

    Within a per-device function, `rows` are the mesh axes that the batch's rows lie on and `time`
    that of positions, which `order` gives where they do not ascend over its devices.
    """
    chosen = (experts[..., None] == jnp.arange(num_experts)[None, None, None, :]).any(2)
    here = chosen.sum(0, dtype=jnp.int32)  # [T, E]
    total = jax.lax.psum(here, rows) if rows else here
    before = _before(total, order, time)
    # Only where an expert fills up do rows matter: at the one position that exceeds it.
    fills = (before < capacity) & (before + total >= capacity)
    earlier = jnp.zeros(num_experts, jnp.int32)
    if rows:
        everywhere = jax.lax.all_gather(jnp.where(fills, here, 0).sum(0), rows)
        mine = jnp.arange(len(everywhere))[:, None] < jax.lax.axis_index(rows)
        earlier = jnp.where(mine, everywhere, 0).sum(0)
    above = jnp.cumsum(chosen, 0, dtype=jnp.int32) - chosen  # in earlier rows of this device
    place = before[None] + jnp.where(fills, earlier[None, :], 0)[None] + above
    found = jnp.take_along_axis(place, jnp.minimum(experts, num_experts - 1), -1)
    return (found < capacity) & (experts < num_experts)


def _before(total: Int[Array, "T E"], order: Any, time: str | None) -> Int[Array, "T E"]:
    """How many choices of an expert stand at earlier positions."""
    if time is None:
        return jnp.cumsum(total, 0) - total
    whole, length = jax.lax.all_gather(total, time, tiled=True), total.shape[0]
    if order is None:
        order = jax.lax.axis_index(time) * length + jnp.arange(length)
    sorted_ = jnp.zeros_like(whole).at[jax.lax.all_gather(order, time, tiled=True)].set(whole)
    return (jnp.cumsum(sorted_, 0) - sorted_)[order]


def sequence_loss(
    counts: Int[Array, "B E"],
    probabilities: Float[Array, "B T E"],
    valid: Bool[Array, "B T"],
    num_active: int,
    time: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """V3's sequence-wise balance loss (equations 17 to 20), summed over rows, without its alpha.

    Equation 18 counts each token's top experts by score alone; `counts` are of the experts really
    chosen, bias and group limit included: the same while the bias is 0 and there is one group.
    Within a per-device function rows lie over the axes `time`; each device returns its share.
    """
    num_experts = counts.shape[-1]
    sums = (
        valid.sum(-1, keepdims=True),
        counts,
        jnp.where(valid[..., None], probabilities, 0).sum(1),
    )
    length, counts, total = jax.lax.psum(sums, time) if time else sums
    lengths = jnp.maximum(length, 1).astype(jnp.float32)
    load = counts * (num_experts / num_active) / lengths
    return (load * total / lengths).sum() / _devices(time)


def _devices(axes: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def uniform_loss(
    probabilities: Float[Array, "B T E"], valid: Bool[Array, "B T"], axes: tuple[str, ...] = ()
) -> Float[Array, ""]:
    """KL divergence from the mean routing distribution of this microbatch to the uniform one.

    Within a per-device function tokens lie over `axes`; each device returns its share.
    """
    num_experts = probabilities.shape[-1]
    sums = valid.sum(), jnp.where(valid[..., None], probabilities, 0.0).sum((0, 1))
    count, total = jax.lax.psum(sums, axes) if axes else sums
    mean = total / jnp.maximum(count, 1).astype(jnp.float32)
    divergence = (mean * jnp.log(jnp.maximum(mean * num_experts, 1e-20))).sum()
    return divergence / _devices(axes)


def z_loss(logits: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Squared log-sum-exp of the router's logits, summed over valid tokens."""
    return jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0).sum()


def entropy(probabilities: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Entropy of each valid token's routing distribution over log E (so 0 to 1), summed."""
    num_experts = probabilities.shape[-1]
    per_token = -(probabilities * jnp.log(jnp.maximum(probabilities, 1e-20))).sum(-1)
    return jnp.where(valid, per_token, 0.0).sum() / max(math.log(num_experts), 1e-20)


def coactivation(experts: Int[Array, "*T A"], num_experts: int) -> Int[Array, "E E"]:
    """How many tokens chose both of two experts; on the diagonal, each one. Ids of E are none."""
    flat = experts.reshape(-1, experts.shape[-1])
    hot = (flat[..., None] == jnp.arange(num_experts)[None, None, :]).any(1).astype(jnp.int8)
    return jnp.einsum("te,tf->ef", hot, hot, preferred_element_type=jnp.int32)
