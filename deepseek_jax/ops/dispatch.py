"""Where tokens go: sorted by destination, there and back with gathers alone, in bounded rounds.

A destination is an expert (ops/experts) or the device that holds it (ops/exchange). Buffers have
fixed sizes for an even load; what does not fit takes further rounds, so that every load is exact.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGEST = 2**31  # below it a destination and an assignment make one int32


class Plan(NamedTuple):
    """Assignments (token n's choice a is number n * A + a) sorted by destination."""

    order: Int[Array, " M"]  # sorted place -> assignment
    place: Int[Array, "N A"]  # assignment -> sorted place
    start: Int[Array, " E"]  # the first sorted place of each destination
    counts: Int[Array, " E"]


def make_plan(choices: Int[Array, "N A"], count: int) -> Plan:
    """Sort assignments by destination, earlier tokens first; destination `count` means none."""
    flat = choices.reshape(-1)
    total = flat.shape[0]
    if (count + 1) * total < LARGEST:  # one sort of plain integers is five times faster
        order = jnp.sort(flat * total + jnp.arange(total, dtype=jnp.int32)) % total
    else:
        order = jnp.argsort(flat, stable=True)
    place = jnp.zeros(total, jnp.int32).at[order].set(jnp.arange(total, dtype=jnp.int32))
    counts = (flat[:, None] == jnp.arange(count)[None, :]).sum(0, dtype=jnp.int32)
    return Plan(order, place.reshape(choices.shape), jnp.cumsum(counts) - counts, counts)


def rank(plan: Plan, choices: Int[Array, "N A"]) -> Int[Array, "N A"]:
    """Which of its destination's assignments each one is; meaningless where there is none."""
    return plan.place - jnp.pad(plan.start, (0, 1))[choices]


@jax.custom_vjp
def spread(
    x: Float[Array, "N D"], token: Int[Array, " M"], place: Int[Array, "N A"]
) -> Float[Array, "M D"]:
    """x[token], zeros for token N. `place` inverts it: where each token stands, M for nowhere."""
    return x.at[token].get(mode="fill", fill_value=0)


@jax.custom_vjp
def collected(
    y: Float[Array, "M D"], token: Int[Array, " M"], place: Int[Array, "N A"]
) -> Float[Array, "N D"]:
    """Each token's sum over the places where it stands."""
    total = jnp.zeros((place.shape[0], y.shape[1]), jnp.float32)
    for one in place.T:  # one after another: rows of all choices together would be A times as many
        total += y.at[one].get(mode="fill", fill_value=0)
    return total.astype(y.dtype)


spread.defvjp(
    lambda x, *places: (spread(x, *places), places),
    lambda places, slope: (collected(slope, *places), None, None),
)
collected.defvjp(
    lambda y, *places: (collected(y, *places), places),
    lambda places, slope: (spread(slope, *places), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(function: Callable[..., Array], rounds: Array, indices: Any, *values: Any) -> Array:
    """The sum of function(r, indices, *values) over r from 0 below `rounds`, which is traced.

    Round 0 runs in any case and stands apart: it is scheduled, and kept for the backward pass, like
    code without rounds. The others' backward passes make them anew. Only `values` have slopes.
    """
    return _in_rounds(function, rounds, indices, *values)[0]


def _in_rounds(function, rounds, indices, *values):
    def add(r, total):
        return jax.tree.map(jnp.add, total, function(r, indices, *values))

    first, back = jax.vjp(functools.partial(function, 0, indices), *values)
    return jax.lax.fori_loop(1, rounds, add, first), (back, rounds, indices, values)


def _in_rounds_backward(function, residuals, slope):
    back, rounds, indices, values = residuals

    def add(r, slopes):
        _, back = jax.vjp(functools.partial(function, r, indices), *values)
        return jax.tree.map(jnp.add, slopes, back(slope))

    return None, None, *jax.lax.fori_loop(1, rounds, add, back(slope))


in_rounds.defvjp(_in_rounds, _in_rounds_backward)
