"""Reference: norms against torch and transformers; the parameter maker's promises."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from deepseek_jax.core.axes import Spec
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection, RMSNorm, SwiGLU, weight

RNG = np.random.default_rng(0)
FLOAT32 = Dtypes(jnp.dtype("float32"), jnp.dtype("float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_is_that_of_transformers(dtype):
    """In bfloat16 bit for bit: the cast comes before the scale."""
    x = RNG.normal(0, 3, (5, 16)).astype(np.float32)
    scale = RNG.normal(1, 0.3, 16).astype(np.float32)
    theirs = DeepseekV3RMSNorm(16, eps=1e-5).to(getattr(torch, dtype))
    theirs.weight.data = torch.tensor(scale).to(getattr(torch, dtype))
    expected = theirs(torch.tensor(x).to(getattr(torch, dtype))).detach().float().numpy()
    norm = RMSNorm(FLOAT32, eps=1e-5)
    ours = norm.apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x, dtype))
    assert ours.dtype == jnp.dtype(dtype)
    exact = {"rtol": 0, "atol": 0} if dtype == "bfloat16" else {"rtol": 1e-6}
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, **exact)


def test_norms_of_huge_and_tiny_half_precision_values_are_finite():
    norm = RMSNorm(FLOAT32)
    x = jnp.asarray([[6e4] * 4, [1e-7] * 4, [0.0] * 4], jnp.float16)
    out = norm.apply({"params": {"scale": jnp.ones(4)}}, x)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[0], 1, atol=1e-3)


def test_layer_norm_is_that_of_torch():
    x = RNG.normal(0, 3, (5, 16)).astype(np.float32)
    scale, bias = (RNG.normal(1, 0.3, 16).astype(np.float32) for _ in range(2))
    expected = torch.nn.functional.layer_norm(
        *(torch.tensor(x), (16,), torch.tensor(scale), torch.tensor(bias)), eps=1e-6
    )
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    ours = LayerNorm(FLOAT32).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def declared(module, *inputs):
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs)
    return shapes["params"]


def test_a_projection_declares_what_it_sums_and_produces():
    module = Projection("btnh,nhd->btd", (4, 6, 16), ("heads", "head", "embed"), FLOAT32, bias=True)
    x = jnp.zeros((1, 2, 4, 6))
    leaves = declared(module, x)
    assert leaves["weight"].spec == Spec(
        axes=("heads", "head", "embed"), reduced=(0, 1), outputs=(2,)
    )
    assert leaves["bias"].spec == Spec(axes=("embed",))
    assert (leaves["weight"].init, leaves["bias"].init) == ("normal", "zeros")
    params = {"weight": jnp.ones((4, 6, 16)), "bias": jnp.arange(16.0)}
    y = module.apply({"params": params}, x + 1)
    np.testing.assert_allclose(y, np.broadcast_to(24 + np.arange(16.0), (1, 2, 16)))


def test_swiglu_is_torchs():
    x = RNG.normal(size=(2, 3, 8)).astype(np.float32)
    gate, up = (RNG.normal(size=(8, 5)).astype(np.float32) for _ in range(2))
    down = RNG.normal(size=(5, 8)).astype(np.float32)
    params = {"gate": gate, "up": up, "down": down}
    params = {name: {"weight": jnp.asarray(leaf)} for name, leaf in params.items()}
    ours = SwiGLU(8, 5, FLOAT32).apply({"params": params}, jnp.asarray(x))
    x, gate, up, down = map(torch.tensor, (x, gate, up, down))
    expected = (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


class Two(nn.Module):
    """One leaf of shape [2]."""

    dtypes: Dtypes = FLOAT32

    @nn.compact
    def __call__(self):
        return weight(self, "w", (2,), ("embed",))


def test_a_leaf_of_another_shape_or_none_is_refused():
    assert Two().apply({"params": {"w": jnp.ones(2)}}).shape == (2,)
    with pytest.raises(ValueError, match=r"w must have shape \(2,\); it is \(3,\)"):
        Two().apply({"params": {"w": jnp.ones(3)}})
    with pytest.raises(ValueError, match="it is None"):
        Two().apply({"params": {}})


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="unknown weight axes"):
        Spec(axes=("embed", "mpl"))
