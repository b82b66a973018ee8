"""One train step on one packed row of any length, in a process of its own; prints JSON.

    PYTHONPATH=. python tests/long_row.py gqa 131072 8

Run as a script because its machine code must be optimized: the tests' own is not (conftest).
"""

import dataclasses
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false"  # core/target.order_collectives
)

import cases
import jax
import numpy as np
import optax

from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.mla import MLA
from deepseek_jax.models.build import Model, build
from deepseek_jax.ops import attention
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.optimizer import AdamW, make_optimizer
from deepseek_jax.training.pipeline import make_mesh_gradients
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import make_train_step

OBJECTIVE, RATE = Language(), 0.01
SIZES = {"num_layers": 1, "embed_dim": 32, "vocab_size": 64}


def tiny(kind: str) -> Model:
    """A layer with one head: grouped-query and dense, or latent with experts."""
    exact = Precision(compute="float32")
    if kind == "gqa":
        own = GQA(num_heads=1, num_kv_heads=1, head_dim=8)
        return build(dataclasses.replace(cases.decoder("gqa", None, **SIZES), attention=own), exact)
    config = cases.decoder("mla", "sigmoid", num_shared_experts=1, **SIZES)
    own = MLA(**cases.SMALL | {"num_heads": 1})
    return build(dataclasses.replace(config, attention=own), exact)


def packed(length: int) -> dict[str, np.ndarray]:
    """A row of two documents; the long one has most of it, so that far keys are seen."""
    short = length // 5
    return cases.make_batch(((length - short, short),), length, 1, 0, SIZES["vocab_size"])


def stepped(model: Model, batch: dict[str, np.ndarray], context: int) -> dict[str, float]:
    """Metrics of a train step with this context axis, and whether all parameters stay finite."""
    mesh = make_mesh(MeshShape(data=1, context=context), jax.devices()[:context])
    with jax.set_mesh(mesh):
        objective = make_language(OBJECTIVE, model)
        optimizer = make_optimizer(AdamW(learning_rate=RATE), model.specs)
        gradients = make_mesh_gradients(OBJECTIVE, model, objective, 1)
        step = jax.jit(make_train_step(gradients, objective, optimizer, lambda _: RATE))
        lies = tree_shardings(mesh, model.specs, model.shapes)
        params = jax.device_put(cases.random_params(model.shapes, 3), lies)
        state = initial_state(params, optimizer, 1.0)
        state, metrics = step(state, place_batch(mesh, batch), jax.random.key(0))
        moved = optax.global_norm(jax.tree.map(lambda a, b: a - b, params, state.params))
    scalars = {name: float(x) for name, x in metrics.items() if getattr(x, "ndim", 1) == 0}
    return scalars | {"moved": float(moved)}


def plain(model: Model, batch: dict[str, np.ndarray]) -> dict[str, float]:
    """The terms on one device: forward only, in blocks of queries that a small machine holds."""
    length, block = batch["tokens"].shape[1], 2048
    attention.spans = lambda *_: [(i, min(i + block, length), 0) for i in range(0, length, block)]
    objective = make_language(OBJECTIVE, model)
    sums, _ = jax.jit(objective.loss_fn)(
        cases.random_params(model.shapes, 3), batch, jax.random.key(0)
    )
    return {term: float(total / weight) for term, (total, weight) in sums.items()}


if __name__ == "__main__":
    model, batch = tiny(sys.argv[1]), packed(int(sys.argv[2]))
    found = {"mesh": stepped(model, batch, int(sys.argv[3])), "plain": plain(model, batch)}
    print(json.dumps(found))
