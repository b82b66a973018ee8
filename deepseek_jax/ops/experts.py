"""Routed experts over sorted tokens: a plain reference and a fast form for each backend.

`routed_experts` is the one place that chooses. On GPU and TPU tokens are sorted by expert and go
through `lax.ragged_dot`. XLA on CPU lowers that to a dense masked product, so there each expert
gets a tile of fixed size, all tiles go through one batched matmul, and what does not fit runs in a
loop over as many small tiles as this batch needs: exact for every load, fast for an even one.
Gathers replace scatters in both directions.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.matmul import dot, rows, turned, weight_slope

Implementation = Literal["reference", "ragged", "tiles", "few"]
TILE_SLACK = 1.25  # a fixed tile's rows over an expert's even share
OVERFLOW_ROWS = 64  # rows of one overflow tile


class Plan(NamedTuple):
    """Assignments (token n's choice a is number n * A + a) sorted by expert."""

    order: Int[Array, " M"]  # sorted place -> assignment
    place: Int[Array, "N A"]  # assignment -> sorted place
    start: Int[Array, " E"]  # the first sorted place of each expert
    counts: Int[Array, " E"]


def make_plan(experts: Int[Array, "N A"], num_experts: int) -> Plan:
    """Sort assignments by expert, earlier tokens first; expert `num_experts` means none."""
    flat = experts.reshape(-1)
    total = flat.shape[0]
    if (num_experts + 1) * total < 2**31:  # one sort of plain integers is five times faster
        order = jnp.sort(flat * total + jnp.arange(total, dtype=jnp.int32)) % total
    else:
        order = jnp.argsort(flat, stable=True)
    place = jnp.zeros(total, jnp.int32).at[order].set(jnp.arange(total, dtype=jnp.int32))
    counts = (flat[:, None] == jnp.arange(num_experts)[None, :]).sum(0, dtype=jnp.int32)
    return Plan(order, place.reshape(experts.shape), jnp.cumsum(counts) - counts, counts)


def routed_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N A"],
    weights: Float[Array, "N A"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    capacity: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "N D"], Int[Array, " E"], Int[Array, ""]]:
    """Each token's weighted sum over its experts' SwiGLU; tokens dispatched to each; drops.

    An expert id of E sends that choice nowhere (padding) and counts nowhere. With `capacity`,
    each expert takes that many of its assignments, first come first served, and drops the rest.
    """
    num_experts = gate.shape[0]
    plan = make_plan(experts, num_experts)
    dispatched, dropped = plan.counts, jnp.zeros((), jnp.int32)
    if capacity is not None:
        dispatched = jnp.minimum(plan.counts, capacity)
        dropped = (plan.counts - dispatched).sum()
        first = jnp.pad(plan.start, (0, 1))  # expert E, which is none, drops by its id below
        late = plan.place - first[experts] >= capacity
        experts = jnp.where(late, num_experts, experts)
        if implementation is not None and implementation != "tiles":
            plan = make_plan(experts, num_experts)
    weights = jnp.where(experts < num_experts, weights, 0.0)
    chosen = implementation or _fastest(x, experts, num_experts)
    if chosen != "tiles":  # which narrows them itself, so that their slopes stay wide
        gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
    if chosen == "reference":
        y = _every_expert(x, experts, weights, gate, up, down)
    elif chosen == "few":
        y = _few(x, experts, weights, gate, up, down)
    elif chosen == "ragged":
        plan = plan if capacity is None else make_plan(experts, num_experts)
        y = _ragged(x, plan, weights, gate, up, down)
    else:
        size = capacity or _even_rows(experts.size, num_experts)
        size = min(size, x.shape[0])
        y = _tiles(size, capacity is None, x, weights, gate, up, down, plan, experts)
    return y, dispatched, dropped


def _fastest(x: Array, experts: Array, num_experts: int) -> Implementation:
    if experts.size < num_experts:
        return "few"  # decoding: read only the chosen experts' weights
    return "tiles" if jax.default_backend() == "cpu" else "ragged"


def _even_rows(assignments: int, num_experts: int) -> int:
    return max(8, -(-int(assignments / num_experts * TILE_SLACK) // 8) * 8)


def swiglu(gate: Float[Array, "*x F"], up: Float[Array, "*x F"]) -> Float[Array, "*x F"]:
    """silu(gate) * up, computed in float32."""
    return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)


def _every_expert(x, experts, weights, gate, up, down):
    """The reference: every expert on every token, weighted by what the router chose."""
    hot = experts[..., None] == jnp.arange(gate.shape[0])[None, None, :]
    mixing = jnp.where(hot, weights[..., None], 0.0).sum(1)
    h = swiglu(dot("nd,edf->enf", x, gate), dot("nd,edf->enf", x, up)).astype(x.dtype)
    return dot("end,ne->nd", dot("enf,efd->end", h, down), mixing).astype(x.dtype)


def _few(x, experts, weights, gate, up, down):
    """Fewer assignments than experts: gather the chosen weights instead of sorting the tokens."""
    ids = jnp.minimum(experts, gate.shape[0] - 1)
    h = swiglu(dot("nd,nadf->naf", x, gate[ids]), dot("nd,nadf->naf", x, up[ids]))
    h = (h * weights[..., None]).astype(x.dtype)
    return dot("naf,nafd->nd", h, down[ids]).astype(x.dtype)


def _ragged(x, plan, weights, gate, up, down):
    ragged = functools.partial(jax.lax.ragged_dot, preferred_element_type=jnp.float32)
    tokens = x[plan.order // weights.shape[1]]
    h = swiglu(ragged(tokens, gate, plan.counts), ragged(tokens, up, plan.counts))
    used = jnp.arange(plan.order.size) < plan.counts.sum()
    h = jnp.where(used[:, None], h * weights.reshape(-1)[plan.order][:, None], 0.0)
    y = ragged(h.astype(x.dtype), down, plan.counts)
    # Rows past the last group hold whatever the kernel left there.
    y = jnp.where(used[:, None], y, 0.0)
    return y[plan.place].sum(1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiles(size, overflow, x, weights, gate, up, down, plan, experts):
    return _tiles_forward(size, overflow, x, weights, gate, up, down, plan, experts)[0]


class _Slots(NamedTuple):
    token: Array  # [E, rows] whose row each slot of a tile holds
    weight: Array  # [E, rows] the router's weight there, 0 in empty slots
    slot: Array  # [N, A] assignment -> slot
    kept: Array  # [N, A] whether the assignment has one


def _slots(size, weights, plan, experts):
    num_experts, num_active = plan.counts.shape[0], weights.shape[1]
    inside = jnp.arange(size)[None, :]
    place = jnp.minimum(plan.start[:, None] + inside, plan.order.size - 1)
    assignment = plan.order[place]
    used = inside < plan.counts[:, None]
    weight = jnp.where(used, weights.reshape(-1)[assignment], 0.0)
    rank = plan.place - jnp.pad(plan.start, (0, 1))[experts]
    kept = (rank < size) & (experts < num_experts)
    slot = jnp.where(kept, experts * size + rank, 0)
    return _Slots(assignment // num_active, weight, slot, kept)


def _combine(values, slots):
    """Sum each token's slots: [E, rows, D] -> [N, D] float32."""
    flat = values.reshape(-1, values.shape[-1])
    total = jnp.zeros((slots.slot.shape[0], values.shape[-1]), jnp.float32)
    for slot, kept in zip(slots.slot.T, slots.kept.T, strict=True):  # one fused pass over all A
        total += jnp.where(kept[:, None], flat.at[slot].get(mode="promise_in_bounds"), 0.0)
    return total


def _overflow_tile(index, size, plan, num_active):
    """The index-th overflow tile: its expert, its assignments, and which of them are real."""
    tiles = -(-jnp.maximum(plan.counts - size, 0) // OVERFLOW_ROWS)
    ends = jnp.cumsum(tiles)
    expert = (index >= ends).sum()
    first = size + (index - (ends - tiles)[expert]) * OVERFLOW_ROWS
    inside = first + jnp.arange(OVERFLOW_ROWS)
    place = jnp.minimum(plan.start[expert] + inside, plan.order.size - 1)
    assignment = plan.order[place]
    return expert, assignment, assignment // num_active, inside < plan.counts[expert]


def _num_overflow_tiles(size, plan):
    return (-(-jnp.maximum(plan.counts - size, 0) // OVERFLOW_ROWS)).sum()


def _tiles_forward(size, overflow, x, weights, gate, up, down, plan, experts):
    like = jnp.zeros(0, gate.dtype)
    gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
    slots = _slots(size, weights, plan, experts)
    tile = rows(x, slots.token)
    g = dot("erd,edf->erf", tile, gate).astype(x.dtype)
    u = dot("erd,edf->erf", tile, up).astype(x.dtype)
    h = (swiglu(g, u) * slots.weight[..., None]).astype(x.dtype)
    y = _combine(dot("erf,efd->erd", h, down), slots)
    if overflow:

        def one(index, y):
            expert, assignment, token, real = _overflow_tile(index, size, plan, weights.shape[1])
            part = rows(x, token)
            g, u, d = (rows(w, expert) for w in (gate, up, down))
            h = swiglu(dot("rd,df->rf", part, g), dot("rd,df->rf", part, u))
            h = h * jnp.where(real, weights.reshape(-1)[assignment], 0.0)[:, None]
            return y.at[token].add(dot("rf,fd->rd", h.astype(x.dtype), d))

        y = jax.lax.fori_loop(0, _num_overflow_tiles(size, plan), one, y)
    return y.astype(x.dtype), (x, weights, gate, up, down, plan, experts, g, u, like)


def _swiglu_slopes(g, u, h_slope, weight, dtype):
    """Slopes of gate, up and weight from that of h = silu(g) * u * weight, and h itself."""
    g, u = g.astype(jnp.float32), u.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(g)
    silu = g * sigmoid
    weight_slope = (h_slope * silu * u).sum(-1)
    h_slope = h_slope * weight[..., None]
    g_slope = h_slope * u * (sigmoid + silu * (1 - sigmoid))
    h = silu * u * weight[..., None]
    slopes = g_slope.astype(dtype), (h_slope * silu).astype(dtype), weight_slope, h.astype(dtype)
    # XLA:CPU would fuse this arithmetic into the transposition that a weight's slope needs, and
    # then runs it one strided element at a time (ten times slower than apart).
    return jax.lax.optimization_barrier(slopes)


def _tiles_backward(size, overflow, residuals, y_slope):
    x, weights, gate, up, down, plan, experts, g, u, like = residuals
    slots = _slots(size, weights, plan, experts)
    dtype, num_active = x.dtype, weights.shape[1]
    tile, tile_slope = rows(x, slots.token), rows(y_slope, slots.token)
    h_slope = dot("erd,efd->erf", tile_slope, down)
    g_slope, u_slope, slot_weight_slope, h = _swiglu_slopes(g, u, h_slope, slots.weight, dtype)
    tile = turned(tile)
    slopes = (
        _combine(dot("erf,edf->erd", g_slope, gate) + dot("erf,edf->erd", u_slope, up), slots),
        jnp.where(slots.kept, slot_weight_slope.reshape(-1)[slots.slot], 0.0),
        dot("edr,erf->edf", tile, g_slope),
        dot("edr,erf->edf", tile, u_slope),
        dot("efr,erd->efd", turned(h), tile_slope),
    )
    if overflow:

        def one(index, slopes):
            x_slope, weight_slope, gate_slope, up_slope, down_slope = slopes
            expert, assignment, token, real = _overflow_tile(index, size, plan, num_active)
            part, part_slope = rows(x, token), rows(y_slope, token)
            weight = jnp.where(real, weights.reshape(-1)[assignment], 0.0)
            own_gate, own_up, own_down = (rows(w, expert) for w in (gate, up, down))
            g, u = dot("rd,df->rf", part, own_gate), dot("rd,df->rf", part, own_up)
            h_slope = dot("rd,fd->rf", part_slope, own_down)
            g_slope, u_slope, w_slope, h = _swiglu_slopes(g, u, h_slope, weight, dtype)
            to_x = dot("rf,df->rd", g_slope, own_gate) + dot("rf,df->rd", u_slope, own_up)
            row, column = assignment // num_active, assignment % num_active
            return (
                x_slope.at[token].add(to_x),
                weight_slope.at[row, column].add(jnp.where(real, w_slope, 0.0)),
                gate_slope.at[expert].add(dot("rd,rf->df", part, g_slope)),
                up_slope.at[expert].add(dot("rd,rf->df", part, u_slope)),
                down_slope.at[expert].add(dot("rf,rd->fd", h, part_slope)),
            )

        slopes = jax.lax.fori_loop(0, _num_overflow_tiles(size, plan), one, slopes)
    x_slope, weight_slope, *expert_slopes = slopes
    return (
        x_slope.astype(dtype),
        weight_slope.astype(weights.dtype),
        *(slope.astype(like.dtype) for slope in expert_slopes),
        None,
        None,
    )


_tiles.defvjp(_tiles_forward, _tiles_backward)


@jax.custom_vjp
def feed_forward(
    x: Float[Array, "N D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
) -> Float[Array, "N D"]:
    """down(silu(gate(x)) * up(x)): one expert that every token visits."""
    return _feed_forward(x, gate, up, down)[0]


def _feed_forward(x, gate, up, down):
    like = jnp.zeros(0, gate.dtype)
    gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
    g, u = (dot("nd,df->nf", x, w).astype(x.dtype) for w in (gate, up))
    y = dot("nf,fd->nd", swiglu(g, u).astype(x.dtype), down).astype(x.dtype)
    return y, (x, gate, up, down, g, u, like)


def _feed_forward_backward(residuals, y_slope):
    x, gate, up, down, g, u, like = residuals
    h_slope = dot("nd,fd->nf", y_slope, down)
    every = jnp.ones(x.shape[:1], jnp.float32)
    g_slope, u_slope, _, h = _swiglu_slopes(g, u, h_slope, every, x.dtype)
    x_slope = dot("nf,df->nd", g_slope, gate) + dot("nf,df->nd", u_slope, up)
    pairs = ((x, g_slope), (x, u_slope), (h, y_slope))
    return x_slope.astype(x.dtype), *(weight_slope(*pair).astype(like.dtype) for pair in pairs)


feed_forward.defvjp(_feed_forward, _feed_forward_backward)
