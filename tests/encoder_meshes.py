"""Encoders on a mesh, and in bfloat16, against themselves on one device in float32."""

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Encoded
from deepseek_jax.models.encoder import EncoderConfig, build_encoder
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings

AXES = {"data": 2, "fsdp": 2, "tensor": 2}


def _ran(encoder: Any, params: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """What comes out (hidden states, a pooled vector), and the slopes of their sum with signs."""

    def total(params: Any) -> tuple[Any, Any]:
        found = _outputs(encoder.apply(params, **inputs))
        signs = (
            jnp.cos(jnp.arange(x[0].size, dtype=x.dtype)).reshape(1, *x.shape[1:]) for x in found
        )
        return sum((x * sign).sum() for x, sign in zip(found, signs, strict=True)), found

    (_, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return jax.device_get(found), tree.flatten(jax.device_get(grads))


def _outputs(found: Encoded) -> list[Any]:
    return [x.astype(jnp.float32) for x in (found.hidden, found.pooled) if x is not None]


def same_on_a_mesh(config: EncoderConfig, inputs: dict[str, np.ndarray]) -> None:
    """Outputs and every weight's slope, on 8 devices and on one, to 1e-5; bfloat16's outputs."""
    encoder = build_encoder(config, Precision(compute="float32"))
    whole = jax.tree.map(jnp.asarray, inputs)
    params = cases.random_params(encoder.shapes, 3)
    alone, slopes = _ran(encoder, params, whole)
    mesh = make_mesh(MeshShape(**AXES), jax.devices())
    with jax.set_mesh(mesh):
        lies = tree_shardings(mesh, encoder.specs, encoder.shapes)
        placed = jax.device_put(params, lies)
        whole_ones = [x.sharding.is_fully_replicated for x in jax.tree.leaves(placed)]
        assert sum(whole_ones) < len(whole_ones) / 4, "hardly any weight is split"
        found, others = _ran(encoder, placed, place_batch(mesh, inputs))
    for other, one in zip(found, alone, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max(), rtol=0)
    # What is 0 in exact arithmetic (a key's bias) is rounding of sums as large as the largest.
    noise = 1e-6 * max(np.abs(slope).max() for slope in slopes.values())
    for path, slope in slopes.items():
        atol = max(1e-5 * np.abs(slope).max(), noise)
        np.testing.assert_allclose(others[path], slope, atol=atol, rtol=0, err_msg=path)

    narrow = build_encoder(config, Precision(compute="bfloat16"))
    rounded = jax.jit(narrow.apply)(params, **whole)
    assert rounded.hidden.dtype == jnp.bfloat16
    for one, other in zip(alone, _outputs(rounded), strict=True):
        a, b = (np.asarray(x, np.float64).ravel() for x in (one, other))
        assert a @ b / np.sqrt((a @ a) * (b @ b)) >= 0.999
