"""Reference: every way to run routed experts against the plain one, forward and backward.

Loads are even, random, all on one expert, mostly padding: the ids are traced, so one program a way
serves them all, and a fixed tile must overflow correctly.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from deepseek_jax.core.target import compiling_for
from deepseek_jax.ops.dispatch import make_plan
from deepseek_jax.ops.experts import _choice, feed_forward, routed_experts

N, A, E, D, F = 300, 2, 8, 6, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype(np.float32)
WEIGHTS = RNG.uniform(0.1, 1, (N, A)).astype(np.float32)
GATE, UP = (RNG.normal(size=(E, D, F)).astype(np.float32) for _ in range(2))
DOWN = RNG.normal(size=(E, F, D)).astype(np.float32)
SLOPE = RNG.normal(size=(N, D)).astype(np.float32)
INPUTS = tuple(map(jnp.asarray, (X, WEIGHTS, GATE, UP, DOWN)))
WAYS = ["tiles", "ragged", "hopper", "few", "turns", None]
ON_HOPPER = jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


class Kernels:
    """What the GPU's kernels do, garbage past the last group included."""

    @staticmethod
    def ragged_dot(x, w, *, group_sizes, transpose_rhs, **tiling):
        w = jnp.swapaxes(w, 1, 2) if transpose_rhs else w
        y = jax.lax.ragged_dot(x, w, group_sizes)
        past = jnp.arange(len(x)) >= group_sizes.sum()
        return jnp.where(past[:, None], jnp.nan, y)

    @staticmethod
    def transposed_ragged_dot(x, slope, *, group_sizes, **tiling):
        numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(x, slope, group_sizes, numbers)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr("deepseek_jax.ops.experts.require", lambda name: Kernels)


def random_load():
    return np.argsort(RNG.random((N, E)), axis=1)[:, :A]


def with_padding():
    ids = random_load()
    ids[RNG.random(N) < 0.8] = E
    return ids


LOADS = {
    "random": random_load(),
    "even": np.arange(N * A).reshape(N, A) % E,
    "one": np.tile([6, 1], (N, 1)),  # two experts take all, the others nothing
    "skewed": np.stack([np.zeros(N, int), 1 + np.arange(N) % 7], 1),
    "padded": with_padding(),
    "none": np.full((N, A), E),
    "last": np.where(np.arange(N)[:, None] < N - 1, E, [[7, 0]]),
}
LOADS = {name: ids.astype(np.int32) for name, ids in LOADS.items()}


def kept(ids, capacity):
    """Which choices find room, walking over tokens."""
    load, room = np.zeros(E + 1, int), np.zeros(ids.shape, bool)
    for n in range(N):
        for a in range(A):
            room[n, a] = ids[n, a] < E and (capacity is None or load[ids[n, a]] < capacity)
            load[ids[n, a]] += room[n, a]
    return room


def naive(ids, capacity):
    room, y = kept(ids, capacity), np.zeros((N, D))
    for e in range(E):
        part = {"gate": GATE, "up": UP, "down": DOWN}
        part = {name: {"weight": leaf[e].astype(np.float64)} for name, leaf in part.items()}
        mine = (WEIGHTS * room * (ids == e)).sum(1, keepdims=True)
        y += mine * reference.feed_forward(X.astype(np.float64), part)
    counts = np.bincount(ids[room], minlength=E)[:E]
    return y, counts, (ids < E).sum() - counts.sum()


@functools.cache
def compiled(way, capacity):
    """(ids, x, weights, gate, up, down) -> the result, counts, drops and gradients."""

    def run(ids, *inputs):
        def y(x, weights, *leaves):
            out, counts, dropped = routed_experts(
                x, ids, weights, *leaves, capacity=capacity, implementation=way
            )
            return out, (counts, dropped)

        out, pull, (counts, dropped) = jax.vjp(y, *inputs, has_aux=True)
        return out, counts, dropped, pull(jnp.asarray(SLOPE, out.dtype))

    return jax.jit(run)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("capacity", [None, 30, 1, 1000])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_plain_one(way, capacity, load):
    ids = LOADS[load]
    y, counts, dropped, slopes = compiled(way, capacity)(jnp.asarray(ids), *INPUTS)
    expected, expected_counts, expected_dropped = naive(ids, capacity)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_array_equal(counts, expected_counts)
    assert int(dropped) == expected_dropped
    plain = compiled("reference", capacity)(jnp.asarray(ids), *INPUTS)
    np.testing.assert_allclose(plain[0], expected, atol=2e-5)
    for name, mine, other in zip(
        ("x", "weights", "gate", "up", "down"), slopes, plain[3], strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("way", ["tiles", "ragged", "hopper"])
@pytest.mark.parametrize("load", ["random", "one"])
def test_bfloat16_is_close(way, load):
    inputs = tuple(x.astype(jnp.bfloat16) for x in INPUTS)
    ids = jnp.asarray(LOADS[load])
    y, _, _, slopes = compiled(way, None)(ids, *inputs)
    plain_y, _, _, plain_slopes = compiled("reference", None)(ids, *INPUTS)
    for mine, other in zip((y, *slopes), (plain_y, *plain_slopes), strict=True):
        assert mine.dtype == jnp.bfloat16
        mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        assert (mine * other).sum() / np.sqrt((mine**2).sum() * (other**2).sum()) > 0.999


@pytest.mark.parametrize(
    ("backend", "count", "capability", "sizes", "dtype", "tokens", "choice"),
    [
        ("cpu", 1, "", (128, 128), "bfloat16", 4, "tiles"),
        ("cpu", 1, "", (128, 128), "bfloat16", 3, "turns"),
        ("tpu", 4, "", (128, 128), "bfloat16", 4, "ragged"),
        ("tpu", 1, "", (128, 128), "bfloat16", 3, "few"),
        ("gpu", 1, "9.0", (128, 256), "bfloat16", 64, "hopper"),
        ("gpu", 1, "9.0", (128, 256), "bfloat16", 63, "tiles"),
        ("gpu", 1, "9.0", (128, 96), "bfloat16", 64, "tiles"),
        ("gpu", 1, "9.0", (128, 256), "float32", 64, "tiles"),
        ("gpu", 8, "9.0", (128, 256), "bfloat16", 64, "tiles"),
        ("gpu", 1, "10.0", (128, 256), "bfloat16", 64, "tiles"),
    ],
)
def test_each_machine_has_its_own_way(backend, count, capability, sizes, dtype, tokens, choice):
    device = types.SimpleNamespace(platform=backend, compute_capability=capability)
    x, gate = jnp.zeros((tokens, sizes[0]), dtype), jnp.zeros((E, *sizes))
    with compiling_for([device] * count):
        assert _choice(x, jnp.zeros((tokens, A), int), gate) == choice


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("capacity", [None, 30])
def test_hopper_kernels_are_the_plain_way(load, capacity):
    rng, sizes = np.random.default_rng(1), {"D": 256, "F": 384}
    shapes = [(N, "D"), (N, A), (E, "D", "F"), (E, "D", "F"), (E, "F", "D"), (N, "D")]
    drawn = [rng.normal(size=[sizes.get(n, n) for n in shape]) for shape in shapes]
    *inputs, slope = (jnp.asarray(x / np.sqrt(x.shape[-1]), jnp.bfloat16) for x in drawn)

    def run(way, *inputs):
        def apply(*inputs):
            ids = jnp.asarray(LOADS[load])
            return routed_experts(
                inputs[0], ids, *inputs[1:], capacity=capacity, implementation=way
            )[0]

        y, pull = jax.vjp(apply, *inputs)
        return y, *pull(slope.astype(y.dtype))

    mine = jax.jit(functools.partial(run, "hopper"))(*inputs)
    plain = run("reference", *(x.astype(jnp.float32) for x in inputs))
    for one, other in zip(mine, plain, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, atol=2e-2 * max(np.abs(other).max(), 1e-9))


def test_a_plan_sorts_by_expert_and_keeps_the_tokens_order():
    ids = LOADS["padded"]
    plan = make_plan(jnp.asarray(ids), E)
    order = np.argsort(ids.reshape(-1), kind="stable")
    np.testing.assert_array_equal(plan.order, order)
    np.testing.assert_array_equal(np.asarray(plan.place).reshape(-1)[order], np.arange(N * A))
    counts = np.bincount(ids.reshape(-1), minlength=E + 1)[:E]
    np.testing.assert_array_equal(plan.counts, counts)
    np.testing.assert_array_equal(plan.start, np.cumsum(counts) - counts)


def test_feed_forward_is_one_expert_that_all_tokens_visit():
    leaves = tuple(leaf[3] for leaf in INPUTS[2:])

    def loss(*inputs):
        return (feed_forward(*inputs) * jnp.asarray(SLOPE)).sum()

    def plain(x, gate, up, down):
        return (((jax.nn.silu(x @ gate) * (x @ up)) @ down) * jnp.asarray(SLOPE)).sum()

    every = (0, 1, 2, 3)
    ours = jax.value_and_grad(loss, every)(INPUTS[0], *leaves)
    expected = jax.value_and_grad(plain, every)(INPUTS[0], *leaves)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected
    )


@pytest.mark.parametrize(("way", "tokens"), [("turns", 4), ("tiles", 20)])
def test_half_precision_copies_no_weights_of_all_experts(way, tokens):
    """What a loop would take of each expert, XLA on CPU otherwise makes of all before the loop."""
    size, width, active = 64, 128, 6
    shapes = [(tokens, width), (tokens, active), *[(size, width, width)] * 3]
    x, weights, *leaves = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    experts = jax.ShapeDtypeStruct(weights.shape, jnp.int32)
    apply = jax.jit(functools.partial(routed_experts, implementation=way))
    compiled = apply.lower(x, experts, weights, *leaves).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * size * width * width
