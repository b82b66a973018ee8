"""Reference: every exchange against every expert on every token, forward and backward.

Loads are random, even, all on one expert, mostly padding and none: the ids are traced, so one
program an exchange serves them all. Little slack makes several rounds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.ops.exchange import Exchange, exchanged, ragged_all_to_all
from deepseek_jax.ops.experts import routed_experts
from deepseek_jax.parallel.manual import per_device
from deepseek_jax.parallel.mesh import MeshShape, make_mesh

N, A, E, D, F = 160, 3, 16, 6, 5  # tokens of all devices together
RNG = np.random.default_rng(0)
X, SLOPE = RNG.normal(size=(2, N, D)).astype(np.float32)
WEIGHTS = RNG.uniform(0.1, 1, (N, A)).astype(np.float32)
GATE, UP = (RNG.normal(size=(E, D, F)).astype(np.float32) for _ in range(2))
DOWN = RNG.normal(size=(E, F, D)).astype(np.float32)
INPUTS = tuple(map(jnp.asarray, (X, WEIGHTS, GATE, UP, DOWN)))

random = np.argsort(RNG.random((N, E)), axis=1)[:, :A]
padded = np.where(RNG.random((N, 1)) < 0.8, E, random)
one_device = np.where(np.arange(N)[:, None] < N // 8, [[6, 7, 1]], random)
# Devices of one parity have all they can, the others nothing: they must agree on rounds.
every_other = np.where(np.arange(N)[:, None] // (N // 8) % 2 == 0, [[6, 7, 1]], E)
LOADS = {
    "random": random,
    "even": np.arange(N * A).reshape(N, A) % E,
    "one": np.tile([6, 7, 1], (N, 1)),  # three experts take all, the others nothing
    "first rows": one_device,  # those of one device all go to another
    "every other": every_other,
    "padded": padded,
    "none": np.full((N, A), E),
}
CASES = {
    "ring": (Exchange(kind="ring"), {"expert": 4, "data": 2}),
    "padded": (Exchange(kind="padded"), {"expert": 8}),
    "padded rounds": (Exchange(kind="padded", slack=0.1), {"expert": 4, "fsdp": 2}),
    "padded chunks": (Exchange(kind="padded", chunks=3), {"expert": 2, "slice": 4}),
    "ragged": (Exchange(kind="ragged"), {"expert": 8}),
    "ragged rounds": (Exchange(kind="ragged", slack=0.2, chunks=2), {"expert": 4, "data": 2}),
    "two hops": (Exchange(kind="two_hop"), {"slice": 2, "expert": 4}),
    "two hops rounds": (Exchange(kind="two_hop", slack=0.2), {"slice": 4, "expert": 2}),
}


def apply(x, experts, weights, leaves, load):
    return routed_experts(x, experts, weights, *leaves, expected=load.choices)[0]


def with_slopes(function):
    def run(ids, *inputs):
        y, pull = jax.vjp(functools.partial(function, ids), *inputs)
        return y, pull(jnp.asarray(SLOPE))

    return jax.jit(run)


@functools.cache
def plain():
    def function(ids, x, weights, *leaves):
        return routed_experts(x, ids, weights, *leaves, implementation="reference")[0]

    return with_slopes(function)


@functools.cache
def compiled(name):
    config, axes = CASES[name]
    mesh = make_mesh(MeshShape(**({"data": 1} | axes)))
    everyone = tuple(axis for axis, size in mesh.shape.items() if size > 1)

    def of_one(ids, x, weights, *leaves):
        return exchanged(config, E, everyone, apply, x, ids, weights, leaves)

    rows = PartitionSpec(("slice", "data", "fsdp", "expert"))
    home = PartitionSpec(("slice", "expert") if config.kind == "two_hop" else "expert")

    def function(ids, *inputs):
        return per_device(of_one, (rows, rows, rows, home, home, home), rows)(ids, *inputs)

    run = with_slopes(function)

    def on_the_mesh(*inputs):
        with jax.set_mesh(mesh):
            return run(*inputs)

    return on_the_mesh


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", CASES)
def test_every_exchange_is_the_plain_sum(name, load):
    ids = jnp.asarray(LOADS[load], jnp.int32)
    y, slopes = compiled(name)(ids, *INPUTS)
    expected, expected_slopes = plain()(ids, *INPUTS)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    for part, mine, other in zip(
        ("x", "weights", "gate", "up", "down"), slopes, expected_slopes, strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-4, err_msg=part)


@pytest.mark.parametrize(
    ("name", "rows", "tokens"),
    [
        # Of 20 tokens a device, each with 3 of 16 experts, an even load reaches one of 8 devices
        # with 6.6; 1.25 times that is 9, in whole eights 16.
        ("padded", 8 * 16, 8 * 20 * (1 - (7 / 8) ** 3)),
        ("ragged", 8 * 16, 8 * 20 * (1 - (7 / 8) ** 3)),
        ("ring", 4 * 20, 4 * 20 * (1 - (3 / 4) ** 3)),
        ("two hops", 4 * 24, 4 * 35 * (1 - (3 / 4) ** (60 / 35))),  # 17.5 reach each of two slices
    ],
)
def test_buffers_are_slack_times_an_even_load(name, rows, tokens, monkeypatch):
    found = []

    def noting(x, experts, weights, leaves, load):
        found.append((x.shape[0], load))
        return x

    monkeypatch.setitem(globals(), "apply", noting)
    compiled.__wrapped__(name)(jnp.asarray(LOADS["even"], jnp.int32), *INPUTS)
    assert {shape for shape, _ in found} == {rows}
    assert all(load == (pytest.approx(tokens), 60) for _, load in found)


def test_the_emulation_keeps_the_contract_of_ragged_all_to_all():
    """jax.lax.ragged_all_to_all's own documentation: rows land at the sender's output offsets."""
    sizes = np.array([[1, 2, 0, 3], [0, 4, 1, 0], [2, 0, 0, 1], [5, 1, 2, 0]])  # [from, to]
    start, place = np.cumsum(sizes, 1) - sizes, np.cumsum(sizes, 0) - sizes
    operand = RNG.normal(size=(4, 8, D)).astype(np.float32)
    mesh = make_mesh(MeshShape(expert=4, data=1), jax.devices()[:4])

    def of_one(operand, start, sizes, place, received):
        output = jnp.full((9, D), 7.0)
        offsets = (x[0] for x in (start, sizes, place, received))
        return ragged_all_to_all(operand[0], output, *offsets, axis="expert")[None]

    with jax.set_mesh(mesh):
        one = PartitionSpec("expert")
        run = jax.jit(per_device(of_one, (one,) * 5, one))
        found = run(operand, *(x.astype(np.int32) for x in (start, sizes, place, sizes.T)))
    expected = np.full((4, 9, D), 7.0, np.float32)
    for a in range(4):
        for b in range(4):
            rows = operand[a, start[a, b] : start[a, b] + sizes[a, b]]
            expected[b, place[a, b] : place[a, b] + sizes[a, b]] = rows
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fields", [{"slack": 0.0}, {"chunks": 0}])
def test_impossible_exchanges_are_refused(fields):
    with pytest.raises(ValueError, match="must be above 0"):
        Exchange(kind="padded", **fields)
