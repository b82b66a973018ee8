"""Reference: chunked cross-entropy against torch, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.ops.losses import cross_entropy, token_losses

N, D, V = 13, 8, 29
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(N, D)).astype(np.float32)
HEAD = RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, N).astype(np.int32)
WEIGHTS = RNG.choice([0.0, 0.5, 1.0, 2.0], N).astype(np.float32)
INPUTS = tuple(map(jnp.asarray, (HIDDEN, HEAD, TARGETS, WEIGHTS)))


def theirs(z_weight):
    hidden, head = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (HIDDEN, HEAD)
    )
    logits, weights = hidden @ head, torch.tensor(WEIGHTS)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(TARGETS, dtype=torch.long), reduction="none"
    )
    squares = logits.logsumexp(-1) ** 2
    loss = (weights * (losses + z_weight * squares)).sum()
    loss.backward()
    sums = loss.item(), (weights * losses).sum().item(), (weights * squares).sum().item()
    return sums, (hidden.grad.numpy(), head.grad.numpy()), losses.detach().numpy()


@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 1000])
def test_values_and_gradients_are_those_of_torch(chunk, z_weight):
    sums, slopes, _ = theirs(z_weight)
    ours = cross_entropy(*INPUTS, z_weight, chunk)
    np.testing.assert_allclose(ours, sums, rtol=1e-5)

    def thrice(hidden, head):
        return 3 * cross_entropy(hidden, head, *INPUTS[2:], z_weight, chunk)[0]

    value, gradients = jax.value_and_grad(thrice, argnums=(0, 1))(*INPUTS[:2])
    assert float(value) == pytest.approx(3 * sums[0], rel=1e-5)
    for mine, other in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(mine, 3 * other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_token_losses_are_those_of_torch(chunk):
    np.testing.assert_allclose(token_losses(*INPUTS[:3], chunk), theirs(0.0)[2], rtol=1e-5)


def test_the_parts_are_for_reading_only():
    def parts(hidden):
        _, nll, z = cross_entropy(hidden, *INPUTS[1:], 0.3, 4)
        return nll + z

    assert not np.asarray(jax.grad(parts)(INPUTS[0])).any()


def test_huge_logits_stay_finite():
    hidden = INPUTS[0] * 1e4
    value, gradient = jax.value_and_grad(lambda h: cross_entropy(h, *INPUTS[1:])[0])(hidden)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_weightless_tokens_give_nothing():
    value, gradient = jax.value_and_grad(
        lambda h: cross_entropy(h, *INPUTS[1:3], jnp.zeros(N), 0.3)[0]
    )(INPUTS[0])
    assert float(value) == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gives_float32_sums_and_its_own_gradients(dtype):
    hidden, head = (x.astype(dtype) for x in INPUTS[:2])

    def loss(hidden, head):
        return cross_entropy(hidden, head, *INPUTS[2:], 0.0, 5)[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    sums, slopes, _ = theirs(0.0)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(sums[0], rel=0.02)
    for mine, other in zip(gradients, slopes, strict=True):
        assert mine.dtype == dtype
        mine = np.asarray(mine, np.float64)
        cosine = (mine * other).sum() / np.sqrt((mine**2).sum() * (other**2).sum())
        assert cosine > 0.9995


def shapes_in(jaxpr):
    """The shapes of everything a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


def test_the_whole_logits_never_exist():
    def loss(chunk):
        return jax.grad(lambda h, w: cross_entropy(h, w, *INPUTS[2:], 0.1, chunk)[0], (0, 1))

    def largest(chunk):
        program = jax.make_jaxpr(loss(chunk))(*INPUTS[:2])
        return max(int(np.prod(shape)) for shape in shapes_in(program.jaxpr) if V in shape)

    assert largest(N) >= N * V  # the test can see them
    assert largest(4) <= D * V  # the head's own gradient
