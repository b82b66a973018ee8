"""A stage's train step: its objective, optimizer and schedule, on whatever mesh runs it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.core import target
from deepseek_jax.models.build import Network
from deepseek_jax.training.contrastive import Contrastive, make_contrastive
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.optimizer import make_optimizer, make_schedule
from deepseek_jax.training.pipeline import make_mesh_gradients
from deepseek_jax.training.recipe import BatchStep, Stage, TrainConfig
from deepseek_jax.training.slices import add_slices
from deepseek_jax.training.state import TrainState, on_device
from deepseek_jax.training.step import Objective, make_gradients, make_train_step


def stage_step(
    config: TrainConfig, model: Network, stage: Stage, size: BatchStep, first: int
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """(state, batch) -> (state, metrics): a step of a filled stage that began at step `first`."""
    chosen = stage.optimizer
    objective = stage_objective(stage, model)
    schedule = make_schedule(chosen.schedule, chosen.warmup_steps, stage.steps)
    scaled = model.dtypes.compute == jnp.float16
    by_slice = config.mesh.by_slice
    parts = size.accumulation_steps, config.mesh.stage_chunks
    if isinstance(stage.objective, Language):
        gradients = make_mesh_gradients(stage.objective, model, objective, *parts, by_slice)
    else:
        gradients = make_gradients(objective, size.accumulation_steps)
    train_step = make_train_step(
        gradients,
        objective,
        make_optimizer(chosen, model.specs),
        lambda step: chosen.learning_rate * schedule(step - first),
        clip_norm=chosen.clip_norm,
        loss_scale_growth=config.precision.loss_scale_growth if scaled else None,
        add_slices=functools.partial(add_slices, model=model) if by_slice else None,
    )

    def run_step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        return train_step(on_device(state), batch, key)

    return run_step


def stage_objective(stage: Stage, model: Network) -> Objective:
    """What a filled stage minimizes."""
    if isinstance(stage.objective, Contrastive):
        return make_contrastive(stage.objective, model, stage.data.image.normalization)
    return make_language(stage.objective, model)


def overwriting(step: Callable, state: TrainState, model: Network) -> Any:
    """The step as a program that overwrites the state it is given, which lies like `state`."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    moe = getattr(model.config, "moe", None)
    travel = moe and moe.exchange.all_to_all
    options = target.ASYNCHRONOUS if travel and target.platform() == "tpu" else {}
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )
