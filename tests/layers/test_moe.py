"""Reference: the mixture layer against the NumPy one, over capacities, padding and batch shapes."""

import dataclasses
import functools
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.target import compiling_for
from deepseek_jax.layers.linear import Dtypes
from deepseek_jax.layers.moe import Capacity, Dropless, MixtureOfExperts, experts_home
from deepseek_jax.ops.exchange import Exchange
from deepseek_jax.parallel.mesh import MeshShape, make_mesh

D = 12
DTYPES = Dtypes(jnp.dtype("float32"), jnp.dtype("float32"))
CONFIG = cases.decoder("mla", "softmax_normalized", num_shared_experts=1).moe
SEGMENTS = np.ones((4, 33), np.int32)
SEGMENTS[1, 20:] = 0
SEGMENTS[3] = 0


@functools.cache
def inputs(router):
    """Hidden states and parameters without near ties."""
    config = dataclasses.replace(CONFIG, router=router)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(*SEGMENTS.shape, D)).astype(np.float32)
        module = MixtureOfExperts(config, D, DTYPES)
        shapes = jax.eval_shape(
            lambda x, module=module: module.init(jax.random.key(0), x, None), jnp.asarray(x)
        )["params"]
        boxed = jax.tree.map(lambda b: b.value, shapes, is_leaf=lambda b: hasattr(b, "spec"))
        params = cases.random_params(boxed, seed)
        _, routing = reference.mixture(x.astype(float), reference.float64(params), config, SEGMENTS)
        if routing.margin > 1e-5:
            return x, params
    raise AssertionError("every seed has a near tie")


@pytest.mark.parametrize("factor", [0.01, 0.3, 0.75, 1.0, 1.25, 8.0, None])
def test_what_is_kept_and_dropped_is_the_reference(factor):
    dispatch = Dropless() if factor is None else Capacity(factor=factor)
    config = dataclasses.replace(CONFIG, dispatch=dispatch)
    x, params = inputs(config.router)
    module = MixtureOfExperts(config, D, DTYPES)
    apply = jax.jit(lambda p, x, s: module.apply({"params": p}, x, s))
    y, routing = apply(jax.tree.map(jnp.asarray, params), x, SEGMENTS)
    expected, other = reference.mixture(
        x.astype(float), reference.float64(params), config, SEGMENTS
    )
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(y)[real], expected[real], atol=2e-5)
    np.testing.assert_array_equal(routing.counts, other.counts)
    assert (int(routing.dropped), int(routing.tokens)) == (other.dropped, other.tokens)
    assert int(routing.counts.sum() + routing.dropped) == 53 * 3 + 33 * 3
    assert (other.dropped > 0) == (factor in (0.01, 0.3, 0.75))
    for name in ("entropy", "sequence_loss", "uniform_loss", "z_loss"):
        np.testing.assert_allclose(getattr(routing, name), getattr(other, name), rtol=1e-4)


def test_tokens_of_a_later_position_drop_first_in_every_row():
    """Capacity 2 for four equal tokens in two rows: both rows keep position 0."""
    router = dataclasses.replace(cases.ROUTERS["softmax"], num_active_experts=1, scale=1.0)
    config = dataclasses.replace(
        CONFIG, router=router, dispatch=Capacity(factor=4.0), num_shared_experts=0
    )
    _, params = inputs(CONFIG.router)
    params = {name: params[name] for name in ("router", "experts")}
    x = jnp.ones((2, 2, D))
    module = MixtureOfExperts(config, D, DTYPES)
    y, routing = module.apply({"params": jax.tree.map(jnp.asarray, params)}, x, None)
    assert (np.abs(np.asarray(y)).max(-1) > 0).tolist() == [[True, False], [True, False]]
    assert (int(routing.dropped), int(routing.counts.sum())) == (2, 2)


@pytest.mark.parametrize(
    ("kind", "axes", "message"),
    [
        (
            "padded",
            {"expert": 8, "data": 1},
            r"num_experts \(12\) to split evenly over mesh expert",
        ),
        ("two_hop", {"slice": 2, "expert": 4, "data": 1}, "over mesh slice x expert"),
        ("ragged", {"expert": 4}, "set XLA_FLAGS=--xla_gpu"),
    ],
)
def test_exchanges_that_a_mesh_cannot_do_are_refused(kind, axes, message):
    config = dataclasses.replace(CONFIG, num_experts=12, exchange=Exchange(kind=kind))
    gpus = [types.SimpleNamespace(platform="gpu" if kind == "ragged" else "cpu")]
    with jax.set_mesh(make_mesh(MeshShape(**axes))), compiling_for(gpus):
        with pytest.raises(InputError, match=message):
            experts_home(config)
        assert experts_home(dataclasses.replace(config, exchange=Exchange())) == ()
