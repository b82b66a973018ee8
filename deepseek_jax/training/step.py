"""The pure training step: gradients of sums, one division, one update. No meshes, files or logs.

Every term of the loss is a (sum, weight) pair. The weights of the whole batch depend on the data
alone, so they are known before the first microbatch, and gradients accumulated over microbatches
equal the big batch's for every term that is a sum over tokens or sequences. Terms that are not
(KL to uniform; what a capacity drops) are per microbatch: their weight is 1 each, which averages.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import tree
from deepseek_jax.monitoring.routing import router_metrics
from deepseek_jax.training.invariants import observed, squares
from deepseek_jax.training.optimizer import applied, is_router_bias
from deepseek_jax.training.state import TrainState


class Objective(NamedTuple):
    """What is minimized."""

    loss_fn: Callable[[Any, Any, jax.Array], tuple[dict[str, tuple], dict[str, Any]]]
    """(params, batch, key) -> (sums, aux): sums is {term: (sum, weight)}, float32 scalars; aux is
    {path of a block: its layers.moe.Routing}."""
    weights_fn: Callable[[Any], dict[str, jax.Array]]
    """batch -> {term: weight}: loss_fn's weights, from the batch alone."""
    coefficients: dict[str, float]
    """{term: its factor in the loss}; other terms are only reported."""
    bias_rates: dict[str, float]
    """{path of a block: step of its router bias}; other biases stay."""
    trains: Callable[[str], bool] = lambda path: True
    """Whether the parameter at a path learns; of the others no gradient is taken, and they stay."""


# (params, batch, key, loss scale) -> (gradients of scale * loss, {term: its mean}, aux); gradients
# are a tree like params with None where a parameter does not learn.
Gradients = Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, dict[str, jax.Array], Any]]


def microbatches(batch: Any, steps: int) -> Any:
    """[B, ...] as [steps, B / steps, ...], each split over the devices as the batch was."""
    return jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), batch)


def total_weights(objective: Objective, parts: Any) -> dict[str, jax.Array]:
    """Every term's weight over all microbatches; 1 for a term without any token: its sum is 0."""
    weights = jax.tree.map(lambda w: w.sum(0), jax.vmap(objective.weights_fn)(parts))
    return jax.tree.map(lambda w: jnp.where(w == 0, 1.0, w), weights)


def make_gradients(objective: Objective, accumulation_steps: int = 1) -> Gradients:
    """The gradient function that differentiates one microbatch after another."""

    def scaled_loss(learning, fixed, batch, key, weights, scale):
        sums, aux = objective.loss_fn(tree.joined(learning, fixed), batch, key)
        sums = {term: total for term, (total, _) in sums.items()}
        loss = sum(c * sums[term] / weights[term] for term, c in objective.coefficients.items())
        return loss * scale, (sums, aux)

    differentiate = jax.grad(scaled_loss, has_aux=True)

    def gradients(params, batch, key, scale):
        parts = microbatches(batch, accumulation_steps)
        weights = total_weights(objective, parts)
        learning, fixed = tree.split(params, objective.trains)

        def of_part(part):
            grads, rest = differentiate(learning, fixed, part, key, weights, scale)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), rest

        if accumulation_steps == 1:
            grads, (sums, aux) = differentiate(learning, fixed, batch, key, weights, scale)
        else:
            grads, (sums, aux) = tree.added_up(of_part, parts)
        return grads, {term: total / weights[term] for term, total in sums.items()}, aux

    return gradients


def make_train_step(
    gradients: Gradients,
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    clip_norm: float | None = None,
    loss_scale_growth: int | None = None,
    add_slices: Callable[..., tuple[Any, dict[str, jax.Array]]] | None = None,
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """The function (state, batch, key) -> (state, metrics).

    metrics are float32 scalars: every term's mean, total_loss, learning_rate, grad_norm (of what
    learns, before clipping), skipped (consecutive skips so far), the routers', left_out_norm (of
    what slices have not yet sent each other) and, with dynamic loss scaling, loss_scale; beside
    them "expert_load", {path of a block: the whole batch's counts [R, E]}, and "checked", which
    training/invariants judges. A step whose loss or gradient is not finite changes nothing but the
    counters (and halves the loss scale).

    `learning_rate` is a function of state.step, the steps done before this one. After
    `loss_scale_growth` finite steps the loss scale doubles; None: no scaling. `add_slices` is
    (gradients by slice, state.left_out, loss scale) -> (gradients, new left_out): training/slices;
    None where gradients come added up.
    """

    def train_step(state, batch, key):
        scale = state.loss_scale if loss_scale_growth else jnp.float32(1)
        grads, means, routing = gradients(state.params, batch, key, scale)
        left_out = state.left_out
        if add_slices and left_out:
            grads, left_out = add_slices(grads, left_out, scale)
        total_loss = sum(c * means[term] for term, c in objective.coefficients.items())
        lengths = squares(grads)
        norm = jnp.sqrt(sum(lengths.values())) / scale
        finite = jnp.isfinite(norm) & jnp.isfinite(total_loss)
        factor = 1 / scale
        if clip_norm is not None:
            factor = factor * jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * factor, grads)
        rate = learning_rate(state.step)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, learning_rate=rate
        )
        params = applied(state.params, updates)
        params = _balance_routers(params, routing, objective.bias_rates)
        new = params, opt_state, left_out
        old = state.params, state.opt_state, state.left_out
        new = jax.tree.map(lambda a, b: a if a is b else jnp.where(finite, a, b), new, old)
        params, opt_state, left_out = new
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics = {**means, **router_metrics(routing), "total_loss": total_loss, "skipped": skipped}
        metrics |= {"learning_rate": rate, "grad_norm": norm}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        metrics["expert_load"] = {path: block.counts for path, block in routing.items()}
        trained = {term: means[term] for term, c in objective.coefficients.items() if c}
        # A loss scale is found by gradients that overflow.
        lengths = {} if loss_scale_growth else lengths
        metrics["checked"] = observed(lengths, trained, objective.weights_fn(batch), routing)
        if left_out:
            metrics["left_out_norm"] = jnp.sqrt(sum(squares(left_out).values()))
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=skipped,
            left_out=left_out,
        )
        if loss_scale_growth:
            metrics["loss_scale"] = scale
            good_steps = jnp.where(finite, state.good_steps + 1, 0)
            grow = good_steps >= loss_scale_growth
            up = jnp.where(grow, jnp.minimum(scale * 2, 2.0**24), scale)
            scale = jnp.where(finite, up, jnp.maximum(scale / 2, 1.0))
            state = state.replace(loss_scale=scale, good_steps=jnp.where(grow, 0, good_steps))
        return state, metrics

    return train_step


def _balance_routers(params: Any, routing: dict[str, Any], rates: dict[str, float]) -> Any:
    """Params whose router biases moved one step toward even load (V3, section 2.1.2)."""

    def moved(path, leaf):
        block = path.removesuffix("/moe/router/bias")
        if not is_router_bias(path) or block not in rates:
            return leaf
        counts = routing[block].counts
        total, num_experts = counts.sum(-1, keepdims=True, dtype=counts.dtype), counts.shape[-1]
        # sign(mean - count), exactly: integers against the mean's floor and ceiling.
        below = counts < -(-total // num_experts)
        above = counts > total // num_experts
        return leaf + rates[block] * (below.astype(leaf.dtype) - above.astype(leaf.dtype))

    return tree.map_with_path(moved, params)
