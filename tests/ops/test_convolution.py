"""Reference: convolutions over time against torch's, values and slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.ops.convolution import grouped, num_windows, windows


@pytest.mark.parametrize(("taps", "groups", "length"), [(16, 4, 21), (9, 2, 5), (3, 1, 8)])
def test_grouped_is_torchs(taps, groups, length):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, length, 8)).astype(np.float32)
    kernel = rng.normal(size=(taps, 8 // groups, 8)).astype(np.float32)
    slope = rng.normal(size=x.shape).astype(np.float32)
    other = [torch.from_numpy(a).requires_grad_() for a in (x, kernel)]
    weight = other[1].permute(2, 1, 0)
    theirs = torch.nn.functional.conv1d(
        other[0].transpose(1, 2), weight, padding=taps // 2, groups=groups
    )
    theirs = theirs.transpose(1, 2)[:, :length]
    (theirs * torch.from_numpy(slope)).sum().backward()

    def total(*given):
        mine = grouped(*given)
        return jnp.vdot(mine, slope), mine

    grads, mine = jax.grad(total, (0, 1), has_aux=True)(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=1e-5)
    for one, two in zip(grads, other, strict=True):
        np.testing.assert_allclose(one, two.grad.numpy(), atol=1e-4)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (4, 3), (2, 5), (11, 2)])
def test_windows_are_torchs_unfold(size, stride):
    x = np.random.default_rng(0).normal(size=(2, 10, 3)).astype(np.float32)
    mine = windows(jnp.asarray(x), size, stride)
    assert mine.shape == (2, num_windows(10, size, stride), size, 3)
    if size <= 10:
        theirs = torch.from_numpy(x).unfold(1, size, stride).transpose(2, 3)
        np.testing.assert_array_equal(mine, theirs.numpy())
