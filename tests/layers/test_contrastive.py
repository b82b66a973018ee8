"""Sharded = single device: contrastive terms of a batch over a mesh against the dense form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core.axes import BATCH_AXES
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.contrastive import contrastive_terms
from deepseek_jax.ops import contrastive
from deepseek_jax.parallel.manual import per_device
from deepseek_jax.parallel.mesh import MeshShape, make_mesh

ROWS, WIDTH = 24, 5
RNG = np.random.default_rng(0)
FIRST, SECOND = (jnp.asarray(RNG.normal(size=(ROWS, WIDTH)), jnp.float32) for _ in range(2))
GROUPS, VALID = jnp.asarray(RNG.integers(0, 9, ROWS)), jnp.asarray(RNG.random(ROWS) < 0.8)
VALID = VALID.at[3:6].set(False)  # one of 8 devices has padding alone
LEARNED = {"softmax": (1.5,), "sigmoid": (1.5, -1.0)}
MESHES = {
    "8": {"data": 8},
    "4x2": {"data": 4, "fsdp": 2},
    "2x2x2": {"data": 2, "fsdp": 2, "expert": 2},
    "2x2 and tensor": {"slice": 2, "expert": 2, "tensor": 2, "data": 1},
    "no rows split": {"context": 8, "data": 1},
}


@functools.cache
def on_one_device(kind, masked):
    """Inputs, the dense loss three times, its gradients, and all terms of the chunked form."""
    who = (GROUPS, VALID) if masked else (jnp.arange(ROWS), jnp.ones(ROWS, bool))
    given = FIRST, SECOND, *map(jnp.float32, LEARNED[kind])

    def dense(first, second, scale, bias=0.0):
        bias = jnp.asarray(bias)
        return contrastive.dense_losses(first, second, scale, bias, *who, kind).sum() * 3

    def terms(first, second, scale, bias=None):
        return contrastive.contrastive_terms(first, second, scale, bias, *who, kind=kind)

    slopes = jax.jit(jax.value_and_grad(dense, range(len(given))))(*given)
    return given, *slopes, jax.jit(terms)(*given)


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [(mesh, kind) for mesh in ("8", "4x2", "2x2x2") for kind in LEARNED]
    + [("2x2 and tensor", "sigmoid"), ("no rows split", "softmax")],
)
def test_the_ring_is_the_dense_form_in_values_and_gradients(mesh, kind):
    masked = mesh != "4x2"  # there without groups and padding
    given, value, slopes, alone = on_one_device(kind, masked)

    def split(first, second, scale, bias=None):
        hints = (GROUPS, VALID) if masked else ()
        terms = contrastive_terms(first, second, scale, bias, *hints, kind=kind, chunk=2)
        return terms["loss"][0] * 3, terms

    mesh = make_mesh(MeshShape(**MESHES[mesh]))
    placed = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[BATCH_AXES][: x.ndim])))
        for x in given
    ]
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(split, range(len(given)), has_aux=True))
        (found, terms), grads = run(*placed)
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    for mine, other in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-5)
    for name, pair in alone.items():
        np.testing.assert_allclose(terms[name], pair, rtol=1e-4, atol=1e-5, err_msg=name)


def test_slopes_taken_on_each_device_add_up():
    kind = "sigmoid"
    given, _, slopes, _ = on_one_device(kind, True)
    axes = ("data", "expert")

    def of_one(first, second, groups, valid, *learned):
        def loss(first, second, scale, bias=None):
            terms = contrastive.contrastive_terms(
                first, second, scale, bias, groups, valid, kind=kind, axes=axes, chunk=2
            )
            return terms["loss"][0] * 3

        own = jax.grad(loss, range(len(given)))(first, second, *learned)
        return *own[:2], *(jax.lax.psum(x, axes) for x in own[2:])

    rows, whole = PartitionSpec(axes), [PartitionSpec()] * (len(given) - 2)
    with jax.set_mesh(make_mesh(MeshShape(data=4, expert=2))):
        run = jax.jit(per_device(of_one, (*[rows] * 4, *whole), (rows, rows, *whole)))
        grads = run(*given[:2], GROUPS, VALID, *given[2:])
    for mine, other in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-5)


def test_no_device_has_the_other_devices_rows_or_logits():
    rows, width, chunk = 512, 4, 16
    mesh = make_mesh(MeshShape(data=8))
    shape = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    lies = NamedSharding(mesh, PartitionSpec("data"))

    def loss(first, second):
        terms = contrastive_terms(first, second, jnp.float32(1), kind="softmax", chunk=chunk)
        return terms["loss"][0]

    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(lies, lies), out_shardings=lies)
        text = run.lower(shape, shape).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text
    assert f"f32[{rows // 8},{chunk}]" in text
    assert not any(f"f32[{rows // 8},{n}]" in text for n in (rows, rows // 8))


def test_rows_that_do_not_split_are_refused():
    with jax.set_mesh(make_mesh(MeshShape(data=8))), pytest.raises(InputError, match="12 rows"):
        contrastive_terms(FIRST[:12], SECOND[:12], jnp.float32(1), kind="softmax")
