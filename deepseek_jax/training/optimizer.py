"""AdamW (arXiv 1711.05101) and Muon (Moonlight, arXiv 2502.16982), one pass over each weight.

What a weight gets is decided from its Spec, never from its rank, because layers and experts are
stacked:

- Muon takes what a matmul reduces and outputs, as batches of matrices; embeddings and the head
  ("vocab"), norms and biases stay with AdamW. An update has the size of an AdamW update (its root
  mean square is 0.2), so learning rates carry over.
- Weight decay takes every matrix, embeddings and head included, and no norm or bias.
- The router bias is not trained here (see training/step): no decay, no optimizer memory.

Left out of optax on purpose: its AdamW has no dtype for the second moment, and its Muon keeps the
bias's memory and a different Adam. The result is an optax transformation all the same.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import tree
from deepseek_jax.core.axes import Spec
from deepseek_jax.core.precision import Dtype
from deepseek_jax.training.schedule import Cosine, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Descent:
    """What both optimizers are told."""

    learning_rate: float = 1e-3
    """The peak."""
    warmup_steps: int = 0
    """Steps of linear warmup to the peak."""
    schedule: Schedule = Cosine()
    """The learning rate's shape over a stage's steps."""
    weight_decay: float = 0.1
    """Of matrices, multiplied by the learning rate; norms and biases do not decay."""
    clip_norm: float | None = 1.0
    """The longest that a step's whole gradient may be; None clips nothing."""
    b1: float = 0.9
    """AdamW's first moment."""
    b2: float = 0.95
    """AdamW's second moment."""
    eps: float = 1e-8
    momentum_dtype: Dtype = "float32"
    """Stored first moments and Muon's momentum."""
    variance_dtype: Dtype = "float32"
    """Stored second moments."""
    max_skipped: int = 20
    """Consecutive steps skipped for non-finite gradients after which the run stops."""

    def __post_init__(self):
        if self.learning_rate < 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"optimizer.learning_rate ({self.learning_rate}), warmup_steps "
                f"({self.warmup_steps}) and weight_decay ({self.weight_decay}) must be at least 0."
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise ValueError(
                f"optimizer.b1 ({self.b1}) and b2 ({self.b2}) must lie in [0, 1), eps "
                f"({self.eps}) above 0."
            )
        if (self.clip_norm is not None and self.clip_norm <= 0) or self.max_skipped < 1:
            raise ValueError(
                f"optimizer.clip_norm ({self.clip_norm}) must be above 0 or None, max_skipped "
                f"({self.max_skipped}) at least 1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(_Descent):
    """AdamW for every trained weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(_Descent):
    """Muon for matrices, experts included; AdamW (b1, b2, eps) for the rest."""

    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.momentum < 1 or self.newton_schulz_steps < 1:
            raise ValueError(
                f"optimizer.momentum ({self.momentum}) must lie in [0, 1), newton_schulz_steps "
                f"({self.newton_schulz_steps}) be at least 1."
            )


def is_router_bias(path: str) -> bool:
    """Whether a parameter is a router's bias, which only the train step writes."""
    return path.endswith("router/bias")


def make_optimizer(config: AdamW | Muon, specs: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a model whose parameters have these specs (a tree of core.axes.Spec).

    `update(gradients, state, params, learning_rate=...)` returns (updates, state), gradients
    already clipped. State: {"count", "mu", "nu"}; mu and nu are trees like params with None where
    a weight has no such memory.
    """
    kinds = tree.map_with_path(lambda path, spec: _kind(config, path, spec), specs)

    def moments(params: Any, dtype: Dtype, owners: tuple[str, ...]) -> Any:
        return jax.tree.map(
            lambda p, kind: jnp.zeros(p.shape, dtype) if kind in owners else None, params, kinds
        )

    def init(params: Any) -> dict[str, Any]:
        return {
            "count": jnp.zeros((), jnp.int32),
            "mu": moments(params, config.momentum_dtype, ("adam", "muon")),
            "nu": moments(params, config.variance_dtype, ("adam",)),
        }

    def update(grads: Any, state: dict, params: Any, *, learning_rate: Any) -> tuple[Any, dict]:
        count = state["count"] + 1

        def of_leaf(param, grad, mu, nu, kind, spec):
            if kind == "none":
                return jnp.zeros_like(param), None, None
            grad, wide_mu = grad.astype(jnp.float32), mu.astype(jnp.float32)
            if kind == "muon":
                direction, new_mu = _muon(config, grad, wide_mu, spec)
                new_nu = None
            else:
                direction, new_mu, new_nu = _adam(config, grad, wide_mu, nu, count)
                new_nu = new_nu.astype(nu.dtype)
            if spec.reduced or "vocab" in spec.axes:
                direction = direction + config.weight_decay * param.astype(jnp.float32)
            return -learning_rate * direction, new_mu.astype(mu.dtype), new_nu

        updates, mu, nu = _unzip(params, of_leaf, grads, state["mu"], state["nu"], kinds, specs)
        return updates, {"count": count, "mu": mu, "nu": nu}

    return optax.GradientTransformationExtraArgs(init, update)


def _kind(config: AdamW | Muon, path: str, spec: Spec) -> str:
    if is_router_bias(path):
        return "none"
    matrix = spec.reduced and spec.outputs and "vocab" not in spec.axes
    return "muon" if isinstance(config, Muon) and matrix else "adam"


def _unzip(params: Any, of_leaf: Any, *trees: Any) -> tuple[Any, Any, Any]:
    """`of_leaf` over params and trees of the same shape, as three trees."""
    structure = jax.tree.structure(params)
    columns = [structure.flatten_up_to(t) for t in (params, *trees)]
    results = [of_leaf(*row) for row in zip(*columns, strict=True)]
    first, second, third = zip(*results, strict=True)
    return tuple(structure.unflatten(part) for part in (first, second, third))


def _adam(config, grad, mu, nu, count):
    mu = config.b1 * mu + (1 - config.b1) * grad
    nu = config.b2 * nu.astype(jnp.float32) + (1 - config.b2) * grad * grad
    time = count.astype(jnp.float32)
    mean = mu / (1 - config.b1**time)
    spread = jnp.sqrt(nu / (1 - config.b2**time))
    return mean / (spread + config.eps), mu, nu


def _muon(config, grad, mu, spec):
    # An average instead of the paper's sum: the orthogonal factor does not see the difference,
    # and a change from AdamW to Muon between stages keeps its scale.
    mu = config.momentum * mu + (1 - config.momentum) * grad
    ahead = config.momentum * mu + (1 - config.momentum) * grad if config.nesterov else mu
    batch = tuple(i for i in range(grad.ndim) if i not in spec.reduced + spec.outputs)
    order = (*batch, *spec.reduced, *spec.outputs)
    rows, columns = (
        math.prod(grad.shape[i] for i in dims) for dims in (spec.reduced, spec.outputs)
    )
    turned = ahead.transpose(order)
    matrices = turned.reshape(-1, rows, columns)
    if rows > columns:  # the Gram matrix of the smaller side: the iteration commutes with this
        matrices = matrices.swapaxes(1, 2)
    matrices = orthogonal_factor(matrices, config.newton_schulz_steps)
    if rows > columns:
        matrices = matrices.swapaxes(1, 2)
    back = sorted(range(grad.ndim), key=order.__getitem__)
    direction = matrices.reshape(turned.shape).transpose(back)
    return 0.2 * math.sqrt(max(rows, columns)) * direction, mu


def orthogonal_factor(matrices: jax.Array, num_steps: int) -> jax.Array:
    """[N, rows, columns] with their singular values brought near 1 (Newton-Schulz, quintic).

    Jordan's coefficients: after 5 steps singular values lie between about 0.7 and 1.2. Fastest
    when rows <= columns.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    norms = jnp.sqrt(jnp.sum(matrices * matrices, (1, 2), keepdims=True))
    matrices = matrices / (norms + 1e-30)  # far below any gradient: zero stays zero
    for _ in range(num_steps):
        gram = jnp.einsum("nij,nkj->nik", matrices, matrices)
        polynomial = b * gram + c * jnp.einsum("nij,njk->nik", gram, gram)
        matrices = a * matrices + jnp.einsum("nij,njk->nik", polynomial, matrices)
    return matrices
