"""How tokens reach experts on other devices: interchangeable ways, each exact for every load.

Per-device functions. All take `apply`, which computes this device's own experts for any tokens, and
return each of this device's tokens' sum over its experts, wherever these lie:

- ring: every device of the axis gets all tokens; their partial sums are scattered back. Nothing is
  sorted; best for few devices and many experts a token.
- padded: a token goes once to each device that has an expert of it, in an all-to-all whose parts
  have a fixed size (`slack` times what an even load needs) and are padded. Works everywhere.
- ragged: the same without padding on the wire (`jax.lax.ragged_all_to_all`; on CPU, where XLA has
  none, an emulation with its contract).
- two_hop: experts lie over slices too. A token first goes once to each slice that needs it, over
  the slow network, then on to devices there (DeepSeek-V3, arXiv 2412.19437, section 3.2.2).

What exceeds a fixed size goes in further rounds (ops/dispatch), on whose number all devices agree.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.core import target
from deepseek_jax.ops.dispatch import Plan, collected, in_rounds, make_plan, rank, spread

Kind = Literal["none", "ring", "padded", "ragged", "two_hop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How the expert axis of a mesh is used; the result is the same."""

    kind: Kind = "none"
    """none gathers the experts' weights: best while a layer's tokens outweigh its experts."""
    slack: float = 1.25
    """Buffers over what an even load needs; what exceeds them takes another round."""
    chunks: int = 1
    """Parts of a device's tokens; one's exchange overlaps the other's products."""

    @property
    def all_to_all(self) -> bool:
        """Whether tokens go to experts in all-to-alls of even parts."""
        return self.kind in ("padded", "two_hop")

    def __post_init__(self):
        if self.slack <= 0 or self.chunks < 1:
            raise ValueError(
                f"exchange.slack ({self.slack}) must be above 0, chunks ({self.chunks}) 1 or more."
            )


class Load(NamedTuple):
    """What an even load brings: tokens that chose something, and their choices in all."""

    tokens: float
    choices: float


# (tokens [M D], experts [M A] from 0, their number for none, weights [M A], leaves, load) -> [M D].
Apply = Callable[[Array, Array, Array, Any, Load], Array]


class Site(NamedTuple):
    """Where an exchange happens; hashable."""

    axis: str
    everyone: tuple[str, ...]
    """All axes in use, whose devices agree on the number of rounds."""
    num_experts: int
    """On this axis together; each device has its even, consecutive part."""
    slack: float

    @property
    def parts(self) -> int:
        """Devices along the axis."""
        return jax.lax.axis_size(self.axis)

    @property
    def own(self) -> int:
        """Experts of each."""
        return self.num_experts // self.parts


def exchanged(
    config: Exchange,
    num_experts: int,
    everyone: tuple[str, ...],
    apply: Apply,
    x: Float[Array, "N D"],
    experts: Int[Array, "N A"],
    weights: Float[Array, "N A"],
    leaves: Any,
) -> Float[Array, "N D"]:
    """Each token's weighted sum over its experts; `leaves` are those of this device's own.

    An expert id of `num_experts` means none. The kind must not be none.
    """
    way = functools.partial(WAYS[config.kind], config.slack, num_experts, everyone, apply)
    parts = []
    for rows in _split(x.shape[0], config.chunks):
        load = Load(float(rows.stop - rows.start), float(experts[rows].size))
        parts.append(way(load, x[rows], experts[rows], weights[rows], leaves))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _split(count: int, chunks: int) -> list[slice]:
    bounds = [count * i // chunks for i in range(chunks + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]


def _ring(slack, num_experts, everyone, apply, load, x, experts, weights, leaves):
    site = Site("expert", everyone, num_experts, slack)
    whole = functools.partial(jax.lax.all_gather, axis_name=site.axis, tiled=True)
    mine = whole(experts) - jax.lax.axis_index(site.axis) * site.own
    mine = jnp.where((mine >= 0) & (mine < site.own), mine, site.own)
    tokens = whole(x)
    load = Load(_reached(site, load) * site.parts, load.choices)
    y = apply(tokens, mine, whole(weights), leaves, load).astype(jnp.float32)
    return jax.lax.psum_scatter(y, site.axis, tiled=True).astype(x.dtype)


def _reached(site: Site, load: Load) -> float:
    """Tokens of one device that an even load sends to another."""
    return load.tokens * (1 - (1 - 1 / site.parts) ** (load.choices / load.tokens))


def _one_hop(swap, slack, num_experts, everyone, apply, load, x, experts, weights, leaves):
    site = Site("expert", everyone, num_experts, slack)
    return _sorted_by_device(swap, site, apply, load, x, experts, weights, leaves)


def _two_hop(slack, num_experts, everyone, apply, load, x, experts, weights, leaves):
    outer = Site("slice", everyone, num_experts, slack)
    inner = Site("expert", everyone, outer.own, slack)

    def within(tokens, experts, weights, leaves, load):
        return _sorted_by_device(PADDED, inner, apply, load, tokens, experts, weights, leaves)

    return _sorted_by_device(PADDED, outer, within, load, x, experts, weights, leaves)


def _sorted_by_device(swap, site, apply, load, x, experts, weights, leaves):
    """Tokens to the devices of their experts, as often as the fullest buffer needs."""
    owner = jnp.where(experts < site.num_experts, experts // site.own, site.parts)
    same, count = owner[:, :, None] == owner[:, None, :], owner.shape[1]
    again = (same & jnp.tri(count, k=-1, dtype=bool)[None]).any(-1)  # it goes there already
    device = jnp.where(again, site.parts, owner)
    plan = make_plan(device, site.parts)
    likely = _reached(site, load)
    size = min(x.shape[0], -(-math.ceil(site.slack * likely) // 8) * 8)
    load = Load(likely * site.parts, load.choices)
    function = functools.partial(swap.once, site, apply, load, size)
    indices, values = (plan, device, experts), (x, weights, leaves)
    if size == x.shape[0]:  # no token goes to a device twice
        return function(0, indices, *values)
    return in_rounds(function, swap.rounds(site, plan, size), indices, *values)


def _items(plan: Plan, place: Array, count: Array) -> Array:
    """The tokens at places of the sorted order, N where a place is at least `count`."""
    num_tokens, num_choices = plan.place.shape
    assignment = plan.order[jnp.minimum(place, plan.order.size - 1)]
    return jnp.where(place < count, assignment // num_choices, num_tokens)


def _choices(site, token, first, experts, weights):
    """Experts (from `first`, of one device) and weights of each token that is sent; none last.

    No token has more experts than a device has, so further columns stay at home.
    """
    ids = experts.at[token].get(mode="fill", fill_value=site.num_experts) - first
    ids = jnp.where((ids >= 0) & (ids < site.own), ids, site.own)
    weights = weights.at[token].get(mode="fill", fill_value=0)
    ids, weights = jax.lax.sort((ids, weights), dimension=-1, num_keys=1)
    width = min(site.own, ids.shape[-1])
    return ids[..., :width], weights[..., :width]


def _padded(site, apply, load, size, r, indices, x, weights, leaves):
    """Round r: the next `size` tokens for each device, in an all-to-all of equal parts."""
    plan, device, experts = indices
    inside = r * size + jnp.arange(size)[None, :]
    real = inside < plan.counts[:, None]
    token = _items(plan, plan.start[:, None] + inside, jnp.where(real, plan.order.size, 0))
    number = rank(plan, device) - r * size
    here = (device < site.parts) & (number >= 0) & (number < size)
    place = jnp.where(here, device * size + number, site.parts * size)
    first = site.own * jnp.arange(site.parts)[:, None, None]
    parts = spread(x, token.reshape(-1), place), *_choices(site, token, first, experts, weights)

    def swapped(part):
        part = part.reshape(site.parts, size, -1)
        part = jax.lax.all_to_all(part, site.axis, 0, 0, tiled=True)
        return part.reshape(site.parts * size, -1)

    y = apply(*map(swapped, parts), leaves, load)
    return collected(swapped(y), token.reshape(-1), place)


def _padded_rounds(site, plan, size):
    """As many as the fullest part of any device needs."""
    return jax.lax.pmax(jnp.maximum(1, -(-plan.counts.max() // size)), site.everyone)


def _ragged(site, apply, load, size, r, indices, x, weights, leaves):
    """Round r: what stands at r * room to (r + 1) * room of all tokens for each device."""
    plan, device, experts = indices
    room, rows = site.parts * size, x.shape[0] * min(site.parts, experts.shape[1])
    me, counts = jax.lax.axis_index(site.axis), jax.lax.all_gather(plan.counts, site.axis)
    arrival = jnp.cumsum(counts, 0) - counts  # [from, to]: where a device's part begins there
    low, high = (jnp.clip(edge * room - arrival, 0, counts) for edge in (r, r + 1))
    sizes, there = high - low, arrival + low - r * room
    here = jnp.cumsum(counts, 1) - counts + low  # and where it lies in its own sorted order
    token = _items(plan, jnp.arange(rows), plan.counts.sum())
    number = rank(plan, device)
    since, until = (jnp.pad(edge[me], (0, 1))[device] for edge in (low, high))
    mine = (device < site.parts) & (number >= since) & (number < until)
    place = jnp.where(mine, plan.place, rows)
    owner = jnp.searchsorted(jnp.cumsum(plan.counts), jnp.arange(rows), side="right")
    first = site.own * owner[:, None]
    ids, chosen = _choices(site, token, first, experts, weights)

    def sent(part, fill):
        output = jnp.full((room, part.shape[1]), fill, part.dtype)
        offsets = here[me], sizes[me], there[me], sizes[:, me]
        return ragged_all_to_all(part, output, *offsets, axis=site.axis)

    got = sent(spread(x, token, place), 0), sent(ids, site.own), sent(chosen, 0)
    y = apply(*got, leaves, load)
    offsets = there[:, me], sizes[:, me], here[:, me], sizes[me]
    back = ragged_all_to_all(y, jnp.zeros((rows, y.shape[1]), y.dtype), *offsets, axis=site.axis)
    return collected(back, token, place)


def _ragged_rounds(site, plan, size):
    """As many as the device that gets most needs."""
    most = jax.lax.psum(plan.counts, site.axis).max()
    return jax.lax.pmax(jnp.maximum(1, -(-most // (site.parts * size))), site.everyone)


class Swap(NamedTuple):
    """A way to send tokens that are sorted by device."""

    once: Callable[..., Array]
    """One round: all that it carries, there and back."""
    rounds: Callable[[Site, Plan, int], Array]
    """How many are needed."""


PADDED, RAGGED = Swap(_padded, _padded_rounds), Swap(_ragged, _ragged_rounds)
WAYS = {
    "ring": _ring,
    "padded": functools.partial(_one_hop, PADDED),
    "ragged": functools.partial(_one_hop, RAGGED),
    "two_hop": _two_hop,
}


def ragged_all_to_all(
    operand: Float[Array, "S D"] | Int[Array, "S D"],
    output: Float[Array, "R D"] | Int[Array, "R D"],
    input_offsets: Int[Array, " n"],
    send_sizes: Int[Array, " n"],
    output_offsets: Int[Array, " n"],
    recv_sizes: Int[Array, " n"],
    *,
    axis: str,
) -> Array:
    """`jax.lax.ragged_all_to_all`; XLA on CPU has none, and there all of it is gathered.

    `send_sizes[i]` rows from `input_offsets[i]` go to device i, into its output from this device's
    `output_offsets[i]` on; this device gets `recv_sizes[i]` from device i.
    """
    offsets = input_offsets, send_sizes, output_offsets, recv_sizes
    if target.platform() != "cpu":
        return jax.lax.ragged_all_to_all(operand, output, *offsets, axis_name=axis)
    me, count = jax.lax.axis_index(axis), operand.shape[0]
    operands = jax.lax.all_gather(operand, axis, tiled=True)
    start, size, place = (jax.lax.all_gather(x, axis)[:, me] for x in offsets[:3])
    row = jnp.arange(output.shape[0])[:, None] - place[None, :]  # [R, from]
    inside = (row >= 0) & (row < size[None, :])
    source = (row + start[None, :] + count * jnp.arange(len(start))[None, :]) * inside
    found = operands[source.sum(1)]  # at most one device wrote a row
    return jnp.where(inside.any(1)[:, None], found, output)
