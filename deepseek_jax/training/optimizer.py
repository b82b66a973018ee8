"""AdamW (arXiv 1711.05101), Muon (Moonlight, arXiv 2502.16982) and learning-rate schedules.

What a weight gets is decided from its Spec, never from its rank, because layers and experts are
stacked:

- Muon takes what a matmul reduces and outputs, as batches of matrices; embeddings and the head
  ("vocab"), norms and biases stay with AdamW. Its updates have AdamW's size (a root mean square of
  0.2), so learning rates carry over. Its momentum is Nesterov's.
- Weight decay takes every matrix, embeddings and head included, and no norm or bias.
- The router bias is not trained here (see training/step): no decay, no optimizer memory. Nor has a
  parameter any that does not learn in this stage of the run.
- Moments that begin in a later stage begin at zero there, with a count of updates of their own.

optax's own have no dtype for second moments; this is an optax transformation all the same.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import tree
from deepseek_jax.core.axes import Spec
from deepseek_jax.core.precision import Dtype

LIMITS = {  # of both optimizers' fields: from, below
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("b1", "b2", "momentum"), (0, 1)),
    **dict.fromkeys(("eps", "clip_norm"), (1e-30, math.inf)),
    **dict.fromkeys(("max_skipped", "newton_schulz_steps"), (1, math.inf)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine (arXiv 1608.03983) from the peak down to a fraction of it."""

    final_fraction: float = 0.1
    """What is left of the peak at the last step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD:
    """Warmup-stable-decay (arXiv 2404.06395): the peak, and in the last steps straight down."""

    decay_fraction: float = 0.2
    """The part of all steps that decays."""
    final_fraction: float = 0.0

    def __post_init__(self):
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"schedule.decay_fraction ({self.decay_fraction}) must lie in (0, 1].")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stairs:
    """The peak, multiplied by `factor` after each given part of all steps (DeepSeek's VL2)."""

    after: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1**0.5

    def __post_init__(self):
        if not (all(0 < part < 1 for part in self.after) and 0 < self.factor < 1):
            raise ValueError(
                f"schedule.after {self.after} and factor ({self.factor}) must lie in (0, 1)."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak, to the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slower:
    """Parameters whose learning rate is another."""

    paths: str
    """A pattern of their paths, as a stage's `trainable` has them."""
    factor: float
    """Times the learning rate, weight decay included."""

    def __post_init__(self):
        if not 0 <= self.factor < math.inf:
            raise ValueError(f"optimizer.slower: factor ({self.factor}) must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW for every trained weight."""

    learning_rate: float = 1e-3
    """The peak."""
    warmup_steps: int = 0
    """Steps of linear warmup to the peak."""
    schedule: Cosine | WSD | Stairs | Constant = Cosine()
    """The learning rate's shape over a stage's steps."""
    slower: tuple[Slower, ...] = ()
    """What learns at another rate: VL2's encoder at a tenth; of several that match the last."""
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
    memory: Literal["device", "pinned_host"] = "device"
    """Where moments lie between updates; a host's memory is far larger, and far away."""
    max_skipped: int = 20
    """Consecutive steps skipped for non-finite gradients after which the run stops."""

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name, None)
            if value is not None and not low <= value < high:
                upper = "" if math.isinf(high) else f" and below {high}"
                raise ValueError(f"optimizer.{name} is {value}; it must be at least {low}{upper}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon for matrices, experts included; AdamW (b1, b2, eps) for the rest."""

    momentum: float = 0.95
    newton_schulz_steps: int = 5


def is_router_bias(path: str) -> bool:
    """Whether a parameter is a router's bias, which only the train step writes."""
    return path.endswith("router/bias")


def is_indexer(path: str) -> bool:
    """Whether a parameter is a lightning indexer's (layers/sparse_attention)."""
    return "/indexer/" in path


def make_optimizer(
    config: AdamW | Muon, specs: Any, since: Mapping[str, int] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a model whose parameters have these specs (a tree of core.axes.Spec).

    `since` is {path of a parameter that learns: the number of the stage since which it does}; None:
    all, since stage 0. `update(gradients, state, params, learning_rate=...)` returns (updates,
    state), gradients already clipped; see `applied`. State: {"count", "mu", "nu"}; mu and nu are
    trees like params with None where a weight has no such memory. Moments that began in stage 2
    have their own "count_2", by which they are corrected for having begun at zero.
    """
    if since is None:
        since = dict.fromkeys(tree.flatten(specs), 0)
    clocks = {path: f"count_{stage}" if stage else "count" for path, stage in since.items()}
    factors = dict[str, float]()
    for one in config.slower:
        found = tree.matching((one.paths,), tree.flatten(specs), "optimizer.slower")
        factors |= dict.fromkeys(found, one.factor)

    def kind(path: str, spec: Spec) -> str:
        if is_router_bias(path) or path not in since:
            return "none"
        matrix = spec.reduced and spec.outputs and "vocab" not in spec.axes
        return "muon" if isinstance(config, Muon) and matrix else "adam"

    kinds = tree.map_with_path(kind, specs)
    clock = tree.map_with_path(lambda path, _: clocks.get(path, ""), specs)
    rates = tree.map_with_path(lambda path, _: factors.get(path, 1.0), specs)

    def moments(params: Any, dtype: Dtype, owners: tuple[str, ...]) -> Any:
        return jax.tree.map(
            lambda p, kind: jnp.zeros(p.shape, dtype) if kind in owners else None, params, kinds
        )

    def init(params: Any) -> dict[str, Any]:
        return {name: jnp.zeros((), jnp.int32) for name in clocks.values()} | {
            "mu": moments(params, config.momentum_dtype, ("adam", "muon")),
            "nu": moments(params, config.variance_dtype, ("adam",)),
        }

    def update(grads: Any, state: dict, params: Any, *, learning_rate: Any) -> tuple[Any, dict]:
        counts = {name: state[name] + 1 for name in clocks.values()}

        def of_leaf(param, grad, mu, nu, kind, clock, factor, spec):
            if kind == "none":
                return None, None, None
            grad, new_mu, new_nu = grad.astype(jnp.float32), mu.astype(jnp.float32), None
            if kind == "muon":
                direction, new_mu = _muon(config, grad, new_mu, spec)
            else:
                direction, new_mu, new_nu = _adam(config, grad, new_mu, nu, counts[clock])
                new_nu = new_nu.astype(nu.dtype)
            if spec.reduced or "vocab" in spec.axes:
                direction = direction + config.weight_decay * param.astype(jnp.float32)
            return -learning_rate * factor * direction, new_mu.astype(mu.dtype), new_nu

        given = grads, state["mu"], state["nu"], kinds, clock, rates, specs
        results = jax.tree.map(of_leaf, params, *given)
        updates, mu, nu = (
            jax.tree.map(lambda _, found, i=i: found[i], params, results) for i in range(3)
        )
        return updates, counts | {"mu": mu, "nu": nu}

    return optax.GradientTransformationExtraArgs(init, update)


def applied(params: Any, updates: Any) -> Any:
    """Params after their updates; a leaf whose update is None is the same to the bit."""
    return jax.tree.map(
        lambda param, update: param if update is None else optax.apply_updates(param, update),
        params,
        updates,
    )


def _adam(config, grad, mu, nu, count):
    mu = config.b1 * mu + (1 - config.b1) * grad
    nu = config.b2 * nu.astype(jnp.float32) + (1 - config.b2) * grad * grad
    time = count.astype(jnp.float32)
    spread = jnp.sqrt(nu / (1 - config.b2**time)) + config.eps
    return mu / (1 - config.b1**time) / spread, mu, nu


def _muon(config, grad, mu, spec):
    # An average instead of the paper's sum: the orthogonal factor does not see the difference.
    mu = config.momentum * mu + (1 - config.momentum) * grad
    ahead = config.momentum * mu + (1 - config.momentum) * grad
    batch = [i for i in range(grad.ndim) if i not in spec.reduced + spec.outputs]
    order = (*batch, *spec.reduced, *spec.outputs)
    rows, columns = (math.prod(grad.shape[i] for i in d) for d in (spec.reduced, spec.outputs))
    turned = ahead.transpose(order)
    factor = orthogonal_factor(turned.reshape(-1, rows, columns), config.newton_schulz_steps)
    back = sorted(range(grad.ndim), key=order.__getitem__)
    return 0.2 * math.sqrt(max(rows, columns)) * factor.reshape(turned.shape).transpose(back), mu


def orthogonal_factor(matrices: jax.Array, num_steps: int) -> jax.Array:
    """[N, rows, columns] with singular values brought near 1 (0.7 to 1.2 after 5 steps).

    Newton-Schulz with Jordan's quintic coefficients, on the smaller side's Gram matrices.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    gram_of, times = ("nij,nkj->nik", "nij,njk->nik") if wide else ("nji,njk->nik", "njk,nij->nik")
    norms = jnp.sqrt(jnp.sum(matrices * matrices, (1, 2), keepdims=True))
    matrices = matrices / (norms + 1e-30)  # far below any gradient: zero stays zero
    for _ in range(num_steps):
        gram = jnp.einsum(gram_of, matrices, matrices)
        polynomial = b * gram + c * jnp.einsum("nij,njk->nik", gram, gram)
        matrices = a * matrices + jnp.einsum(times, polynomial, matrices)
    return matrices


def make_schedule(
    schedule: Cosine | WSD | Stairs | Constant, warmup_steps: int, num_steps: int
) -> Callable[[Any], Any]:
    """The factor of the peak learning rate as a function of the step, 0 to num_steps - 1.

    The warmup's first step has 1/warmup_steps and its last the peak; the schedule's last step has
    exactly its final fraction, which later steps keep. Steps may be arrays.
    """
    last = num_steps - 1

    def factor(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
        if isinstance(schedule, Constant):
            return warm
        if isinstance(schedule, Stairs):
            passed = sum((step >= part * num_steps).astype(jnp.float32) for part in schedule.after)
            return warm * schedule.factor**passed
        cosine = isinstance(schedule, Cosine)
        length = 0 if cosine else max(round(schedule.decay_fraction * num_steps), 1)
        start = max(warmup_steps - 1, 0) if cosine else last - length
        done = jnp.clip((step - start) / max(last - start, 1), 0.0, 1.0)
        left = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if cosine else 1.0 - done
        return warm * (schedule.final_fraction + (1.0 - schedule.final_fraction) * left)

    return factor
