"""Routed experts over sorted tokens: a plain reference and a fast form for each backend.

`routed_experts` is the one place that chooses. On TPU tokens are sorted by expert and go through
`lax.ragged_dot`, on a Hopper GPU through JAX's own kernels for the same. XLA lowers that product to
a dense masked one on CPU and on GPU (60 times slower than the kernels), so elsewhere each expert
gets a tile of fixed size, all tiles go through one batched matmul, and what does not fit runs in a
loop over as many small tiles as this batch needs: exact for every load, fast for an even one.
Gathers replace scatters in both directions.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.core import target
from deepseek_jax.core.extras import require
from deepseek_jax.ops.dispatch import collected, in_rounds, make_plan, rank, spread
from deepseek_jax.ops.matmul import dot, exact, rows, thickened, turned

Implementation = Literal["reference", "ragged", "hopper", "tiles", "few", "turns"]
TILE_SLACK = 1.125  # a fixed tile's rows over an expert's even share
OVERFLOW_ROWS = 64  # rows of one overflow tile
KERNEL_TILE = 128  # rows and columns of a Hopper kernel's block


def routed_experts(
    x: Float[Array, "N D"],
    experts: Int[Array, "N A"],
    weights: Float[Array, "N A"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    capacity: int | None = None,
    expected: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "N D"], Int[Array, " E"], Int[Array, ""]]:
    """Each token's weighted sum over its experts' SwiGLU; tokens dispatched to each; drops.

    An expert id of E sends that choice nowhere (padding) and counts nowhere. With `capacity`,
    each expert takes that many of its assignments, first come first served, and drops the rest.
    Where most choices are likely to go nowhere, `expected` says how many are not: buffers are made
    for these, and the rest takes longer.
    """
    num_experts = gate.shape[0]
    plan = make_plan(experts, num_experts)
    dispatched = plan.counts if capacity is None else jnp.minimum(plan.counts, capacity)
    dropped = (plan.counts - dispatched).sum()
    if capacity is not None:
        late = rank(plan, experts) >= capacity
        experts = jnp.where(late, num_experts, experts)
    weights = jnp.where(experts < num_experts, weights, 0.0)
    implementation = implementation or _choice(x, experts, gate)
    expected = min(expected or experts.size, experts.size)
    if implementation == "tiles":  # it narrows weights itself, so that their slopes stay wide
        even = int(expected / num_experts * TILE_SLACK)
        size = min(capacity or max(8, -(-even // 8) * 8), x.shape[0])
        y = _tiles(size, capacity is None, x, weights, gate, up, down, plan, experts)
    elif implementation in ("ragged", "hopper"):  # and so do these
        y = _sorted(implementation, expected, x, weights, gate, up, down, plan)
    else:
        form = FORMS[implementation]
        y = form(x, experts, weights, *(w.astype(x.dtype) for w in (gate, up, down)))
    return y, dispatched, dropped


def _choice(x, experts, gate) -> Implementation:
    backend, (num_experts, *sizes) = target.platform(), gate.shape
    if experts.size < num_experts:  # decoding: read only the chosen experts' weights
        return "turns" if backend == "cpu" else "few"
    if backend == "tpu":
        return "ragged"
    fits = x.dtype.itemsize == 2 and all(size % KERNEL_TILE == 0 for size in sizes)
    fits &= backend == "gpu" and experts.size >= KERNEL_TILE and not target.partitioned()
    if fits and target.devices()[0].compute_capability.startswith("9."):
        return "hopper"
    return "tiles"


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


def _turns(x, experts, weights, gate, up, down):
    """The same, an assignment at a time: XLA on CPU would copy what it gathers, at a tenth of the
    speed at which it multiplies by a matrix where that lies."""

    def add(y, assignment):
        token, expert, weight = assignment
        one = jax.lax.dynamic_slice_in_dim(x, token, 1)[None]
        expert = jnp.minimum(expert, gate.shape[0] - 1)
        own = [rows(w, expert) for w in (gate, up, down)]

        def run(one):
            h = swiglu(*(dot("btd,df->btf", one, w) for w in own[:2])) * weight
            return dot("btf,fd->btd", h.astype(x.dtype), own[2])

        return y.at[token].add(thickened(run, one)[0, 0]), None

    token = jnp.repeat(jnp.arange(x.shape[0]), experts.shape[1])
    y = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.scan(add, y, (token, experts.reshape(-1), weights.reshape(-1)))[0].astype(
        x.dtype
    )


FORMS = {"reference": _every_expert, "few": _few, "turns": _turns}


def _sorted(product, expected, x, weights, gate, up, down, plan):
    size, indices = _whole_tiles(expected), (plan.order, plan.place, plan.start, plan.counts)
    values = x, weights, gate, up, down
    if size >= plan.order.size:
        return _sorted_round(product, plan.order.size, 0, indices, *values)
    rounds = jnp.maximum(1, -(-plan.counts.sum() // size))
    return in_rounds(functools.partial(_sorted_round, product, size), rounds, indices, *values)


def _whole_tiles(expected):
    """Rows of a round: a little over what is expected, in whole tiles of a kernel."""
    return -(-int(expected * TILE_SLACK) // KERNEL_TILE) * KERNEL_TILE


def _sorted_round(product, size, r, indices, x, weights, gate, up, down):
    """The part of assignments r * size to (r + 1) * size, in sorted order."""
    order, place, start, counts = indices
    first, num_active = r * size, place.shape[1]
    ends = jnp.clip(start + counts - first, 0, size)
    counts = ends - jnp.clip(start - first, 0, size)
    inside = jnp.arange(size)
    assignment = jnp.where(
        inside < ends.max(initial=0), order[jnp.minimum(first + inside, order.size - 1)], order.size
    )
    place = jnp.where((place >= first) & (place < first + size), place - first, size)
    tokens = spread(x, assignment // num_active, place)
    weight = spread(weights.reshape(-1, 1), assignment, place.reshape(-1, 1))
    h = swiglu(*(_grouped(product, tokens, w, counts) for w in (gate, up)))
    y = _grouped(product, (h * weight).astype(x.dtype), down, counts)
    return collected(y, assignment // num_active, place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(product, x, w, counts):
    """Sorted rows times their own expert's matrix, in x's dtype; zero past the last expert's."""
    return _grouped_forward(product, x, w, counts)[0]


def _grouped_forward(product, x, w, counts):
    narrow = w.astype(x.dtype)
    y = PRODUCTS[product](x, narrow, counts, False)
    return _real(y, counts), (x, narrow, counts, jnp.zeros(0, w.dtype))


def _grouped_backward(product, residuals, slope):
    x, w, counts, like = residuals
    x_slope = _real(PRODUCTS[product](slope, w, counts, True), counts)
    return x_slope, SLOPES[product](x, slope, counts).astype(like.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _real(y, counts):
    """Past the last group lies whatever the kernel found there, not a number perhaps."""
    return jnp.where((jnp.arange(y.shape[0]) < counts.sum())[:, None], y, 0).astype(y.dtype)


def _ragged(x, w, counts, turn):
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (2 if turn else 1,)), ((), ())), [0], [0])
    return _ragged_product(x, w, counts, numbers, x.dtype)


def _ragged_slope(x, slope, counts):
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return _ragged_product(x, slope, counts, numbers)


def _ragged_product(x, y, counts, numbers, dtype=jnp.float32):
    options = {"preferred_element_type": dtype, "precision": exact(x, y)}
    return jax.lax.ragged_dot_general(x, y, counts, numbers, **options)


def _tiling(columns: int) -> dict[str, int]:
    """What ran fastest on an H200; see benchmarks/README.md."""
    blocks = columns // KERNEL_TILE
    together = max(n for n in range(1, 17) if blocks % n == 0)  # columns of blocks walked together
    return {
        "block_m": KERNEL_TILE, "block_n": KERNEL_TILE, "block_k": 64,
        "max_concurrent_steps": 4, "grid_block_n": together,
    }  # fmt: skip


def _hopper(x, w, counts, turn):
    kernel = require("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu").ragged_dot
    columns = w.shape[1 if turn else 2]
    return kernel(x, w, group_sizes=counts, transpose_rhs=turn, **_tiling(columns))


def _hopper_slope(x, slope, counts):
    kernels = require("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu")
    tiling = _tiling(slope.shape[1])
    return kernels.transposed_ragged_dot(x, slope, group_sizes=counts, **tiling)


PRODUCTS = {"ragged": _ragged, "hopper": _hopper}
SLOPES = {"ragged": _ragged_slope, "hopper": _hopper_slope}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiles(size, overflow, x, weights, gate, up, down, plan, experts):
    return _tiles_forward(size, overflow, x, weights, gate, up, down, plan, experts)[0]


def _assigned(plan, weights, start, count, inside):
    """An expert's assignments number `inside`, their weights, and which are real (else weight 0).

    The expert's first sorted place and its count come as they broadcast against `inside`.
    """
    assignment = plan.order[jnp.minimum(start + inside, plan.order.size - 1)]
    real = inside < count
    return assignment, jnp.where(real, weights.reshape(-1)[assignment], 0.0), real


def _slots(size, weights, plan, experts):
    """Token and weight of each slot [E, size]; each assignment's slot, and if it has one [N, A]."""
    inside, start = jnp.arange(size)[None, :], plan.start[:, None]
    assignment, weight, _ = _assigned(plan, weights, start, plan.counts[:, None], inside)
    number = rank(plan, experts)
    kept = (number < size) & (experts < plan.counts.size)
    slot = jnp.where(kept, experts * size + number, 0)
    return assignment // weights.shape[1], weight, slot, kept


def _combine(values, slot, kept):
    """Sum each token's slots: [E, rows, D] -> [N, D] float32."""
    flat = values.reshape(-1, values.shape[-1])
    total = jnp.zeros((slot.shape[0], values.shape[-1]), jnp.float32)
    for one, real in zip(slot.T, kept.T, strict=True):  # one fused pass over all A
        total += jnp.where(real[:, None], flat.at[one].get(mode="promise_in_bounds"), 0.0)
    return total


def _overflow(size, plan, weights, visit, start):
    """Fold visit(carry, expert, assignment, weight, real) over what fits in no tile of `size`."""
    tiles = -(-jnp.maximum(plan.counts - size, 0) // OVERFLOW_ROWS)
    ends = jnp.cumsum(tiles)

    def one(index, carry):
        expert = (index >= ends).sum()
        inside = size + (index - (ends - tiles)[expert]) * OVERFLOW_ROWS + jnp.arange(OVERFLOW_ROWS)
        own = _assigned(plan, weights, plan.start[expert], plan.counts[expert], inside)
        return visit(carry, expert, *own)

    return jax.lax.fori_loop(0, tiles.sum(), one, start)


def _gate_up(x, gate, up):
    return dot("...rd,...df->...rf", x, gate), dot("...rd,...df->...rf", x, up)


def _swiglu_slopes(x, weight, gate, up, down, g, u, y_slope):
    """Float32 slopes of all that y = (silu(x @ gate) * (x @ up) * weight) @ down is made of."""
    g, u = g.astype(jnp.float32), u.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(g)
    silu = g * sigmoid
    h_slope = dot("...rd,...fd->...rf", y_slope, down)
    weight_slope = (h_slope * silu * u).sum(-1)
    h_slope = h_slope * weight[..., None]
    g_slope = (h_slope * u * (sigmoid + silu * (1 - sigmoid))).astype(x.dtype)
    u_slope = (h_slope * silu).astype(x.dtype)
    h = (silu * u * weight[..., None]).astype(x.dtype)
    x_slope = dot("...rf,...df->...rd", g_slope, gate) + dot("...rf,...df->...rd", u_slope, up)
    pairs = ((x, g_slope), (x, u_slope), (h, y_slope))
    return x_slope, weight_slope, *(dot("...dr,...rf->...df", turned(a), b) for a, b in pairs)


def _tiles_forward(size, overflow, x, weights, gate, up, down, plan, experts):
    like = jnp.zeros(0, gate.dtype)
    gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
    token, weight, slot, kept = _slots(size, weights, plan, experts)
    g, u = (part.astype(x.dtype) for part in _gate_up(rows(x, token), gate, up))
    h = (swiglu(g, u) * weight[..., None]).astype(x.dtype)
    y = _combine(dot("erf,efd->erd", h, down), slot, kept)

    def visit(y, expert, assignment, weight, _):
        token = assignment // weights.shape[1]
        h = swiglu(*_gate_up(rows(x, token), rows(gate, expert), rows(up, expert)))
        h = (h * weight[:, None]).astype(x.dtype)
        return y.at[token].add(dot("rf,fd->rd", h, rows(down, expert)))

    y = _overflow(size, plan, weights, visit, y) if overflow else y
    return y.astype(x.dtype), (x, weights, gate, up, down, plan, experts, g, u, like)


def _tiles_backward(size, overflow, residuals, y_slope):
    x, weights, *leaves, plan, experts, g, u, like = residuals
    token, weight, slot, kept = _slots(size, weights, plan, experts)
    x_slope, weight_slope, *slopes = _swiglu_slopes(
        rows(x, token), weight, *leaves, g, u, rows(y_slope, token)
    )
    weight_slope = jnp.where(kept, weight_slope.reshape(-1)[slot], 0.0)
    slopes = (_combine(x_slope, slot, kept), weight_slope.reshape(-1), *slopes)

    def visit(slopes, expert, assignment, weight, real):
        token = assignment // weights.shape[1]
        part, own = rows(x, token), [rows(w, expert) for w in leaves]
        g, u = _gate_up(part, *own[:2])
        x_slope, weight_slope, *changes = _swiglu_slopes(
            part, weight, *own, g, u, rows(y_slope, token)
        )
        places = (token, assignment, expert, expert, expert)
        changes = (x_slope, jnp.where(real, weight_slope, 0.0), *changes)
        return tuple(
            slope.at[place].add(change)
            for slope, place, change in zip(slopes, places, changes, strict=True)
        )

    if overflow:
        slopes = _overflow(size, plan, weights, visit, slopes)
    x_slope, weight_slope, *slopes = slopes
    weight_slope = weight_slope.reshape(weights.shape).astype(weights.dtype)
    slopes = (slope.astype(like.dtype) for slope in slopes)
    return x_slope.astype(x.dtype), weight_slope, *slopes, None, None


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
    g, u = (part.astype(x.dtype) for part in _gate_up(x, gate, up))
    y = dot("nf,fd->nd", swiglu(g, u).astype(x.dtype), down).astype(x.dtype)
    return y, (x, gate, up, down, g, u, like)


def _feed_forward_backward(residuals, y_slope):
    x, *leaves, g, u, like = residuals
    every = jnp.ones(x.shape[:1], jnp.float32)
    x_slope, _, *slopes = _swiglu_slopes(x, every, *leaves, g, u, y_slope)
    return x_slope.astype(x.dtype), *(slope.astype(like.dtype) for slope in slopes)


feed_forward.defvjp(_feed_forward, _feed_forward_backward)
