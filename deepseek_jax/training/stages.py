"""A stage's train step: its objective, optimizer and schedule, on whatever mesh runs it.

And what a run's stages are to each other: which parameters learn in which, since when, and at which
step each begins, which a gate decides while the run goes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from deepseek_jax.core import target, tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audiovisual import AudioVisual, DigitDataset, open_digits
from deepseek_jax.data.labelled import Labelled, LabelledDataset, open_labelled
from deepseek_jax.data.loader import Data, Dataset, open_data
from deepseek_jax.data.pairs import PairDataset, Pairs, open_pairs
from deepseek_jax.data.seeing import Seeing, SeeingDataset, open_seeing
from deepseek_jax.data.tokenizer import BPE
from deepseek_jax.data.utterances import UtteranceDataset, Utterances, open_utterances
from deepseek_jax.models.build import Network
from deepseek_jax.training.classification import Classification, make_classification
from deepseek_jax.training.contrastive import Contrastive, make_contrastive
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.optimizer import make_optimizer, make_schedule
from deepseek_jax.training.pipeline import make_mesh_gradients
from deepseek_jax.training.recipe import BatchStep, Stage, TrainConfig
from deepseek_jax.training.slices import add_slices
from deepseek_jax.training.speech import Transcription, Wav2Vec, make_speech
from deepseek_jax.training.state import TrainState, abstract_state, on_device
from deepseek_jax.training.step import Objective, make_gradients, make_train_step

AnyDataset: TypeAlias = (
    Dataset | PairDataset | SeeingDataset | DigitDataset | LabelledDataset | UtteranceDataset
)


def spans(stages: tuple[Stage, ...], opened: Mapping[int, int]) -> list[tuple[int, int]]:
    """The steps (first, end) that each of a run's filled stages lies between.

    `opened` is {number of a stage: the step after which its gate opened}; other stages take all
    their steps.
    """
    found, first = [], 0
    for number, stage in enumerate(stages):
        found.append((first, opened.get(number, first + stage.steps)))
        first = found[-1][1]
    return found


def stage_at(stages: tuple[Stage, ...], opened: Mapping[int, int], step: int) -> int:
    """The number of the stage that made the state after `step` steps (of 0: the first)."""
    ends = [end for _, end in spans(stages, opened)]
    return next((number for number, end in enumerate(ends) if step <= end), len(ends) - 1)


def shut(stages: tuple[Stage, ...], opened: Mapping[int, int], step: int) -> Stage | None:
    """The stage behind whose gate a run must stop, after `step` steps; None: it may go on."""
    for number, (stage, (_, end)) in enumerate(zip(stages, spans(stages, opened), strict=True)):
        if step == end and stage.gate and stage.gate.required and number not in opened:
            return stage
    return None


def asked_gate(
    stages: tuple[Stage, ...],
    opened: Mapping[int, int],
    number: int,
    step: int,
    found: Mapping[str, float],
) -> tuple[bool, str]:
    """Whether an evaluation after `step` steps opens a stage's gate, and what to say of it.

    The same for all processes. InputError where the evaluation has no such metric.
    """
    stage, end = stages[number], spans(stages, opened)[number][1]
    gate, where = stage.gate, f"stage {stage.name!r}"
    if gate.metric not in found:
        known = ", ".join(sorted(found))
        raise InputError(f"stages[{number}].gate.metric is {gate.metric!r}; there are {known}")
    value = found[gate.metric]
    if bool(multihost_utils.broadcast_one_to_all(np.int32(gate.holds(value)))):
        return True, f"{where} ends after step {step}: {gate} holds, at {value:g}"
    if step < end or gate.required:
        return False, ""
    return False, (
        f"warning: {where} is at its end after step {step} and its gate has not opened: {gate} "
        f"does not hold, at {value:g}"
    )


def learning(config: TrainConfig, model: Network) -> list[dict[str, int]]:
    """Of each stage: {path of a parameter that learns: the stage since which, without a pause}.

    InputError where a stage's `trainable` or objective does not suit the model.
    """
    found: list[dict[str, int]] = []
    for number, stage in enumerate(config.filled_stages()):
        trains, before = stage_objective(stage, model, number).trains, found[-1] if found else {}
        found.append(
            {path: before.get(path, number) for path in tree.flatten(model.shapes) if trains(path)}
        )
        if not found[-1]:
            raise InputError(
                f"stages[{number}]: its trainable leaves nothing to what its objective trains"
            )
    return found


def stage_data(config: TrainConfig, stage: Stage) -> AnyDataset:
    """The data of a run's filled stage, opened.

    A run has one BPE, trained on its first stage's texts: what the model knows of tokens stays true
    in later stages. InputError where they cannot be read, or the model has no room for tokens.
    """
    given: dict[str, Any] = {"sequence_length": stage.sequence_length, "seed": config.seed}
    start = config.filled_stages()[0]
    chosen, before = (getattr(one.data, "tokenizer", None) for one in (stage, start))
    if isinstance(chosen, BPE) and chosen == before and stage.data != start.data:
        given["tokenizer"] = stage_data(config, start).tokenizer
    model: Any = config.model
    if isinstance(stage.data, AudioVisual):
        return open_digits(stage.data, **given)
    dataset: Dataset | PairDataset | SeeingDataset | LabelledDataset | UtteranceDataset
    if isinstance(stage.data, Data):
        dataset = open_data(stage.data, num_targets=1 + model.num_mtp_layers, **given)
    elif isinstance(stage.data, Pairs):
        dataset = open_pairs(stage.data, **given)
    elif isinstance(stage.data, Utterances):
        dataset = open_utterances(stage.data, **given)
    elif isinstance(stage.data, Labelled):
        dataset = open_labelled(stage.data, **given)
        model = next((one.encoder for one in model.modalities if one.name == "text"), None)
        if model is None:
            return dataset
    else:
        given |= {"hearing": model.hearing, "audio_id": model.audio and model.audio.audio_id}
        sight = stage.sized(model).sight
        dataset = open_seeing(stage.data, sight=sight, image_id=model.image_id, **given)
    found, room = dataset.tokenizer.vocab_size, model.vocab_size
    if found > room:
        why = f"the tokenizer has {found} tokens, but model.vocab_size is {room}"
        raise InputError(f"{why}: raise it or choose a smaller tokenizer")
    if isinstance(stage.data, Pairs):
        text, end = model.text, dataset.tokenizer.eos_id
        if (taken := {"first_end": text.end_id, "end": found - 1}.get(text.pooling, end)) != end:
            raise InputError(
                f"model.text.pooling {text.pooling!r} looks for token {taken}, but the tokenizer "
                f"ends texts with {end}: use first_end, with model.text.end_id {end}"
            )
    return dataset


def sized(model: Network, stage: Stage) -> Network:
    """The model with images as large as a filled stage's; its parameters are the same."""
    config = stage.sized(model.config)
    if config == model.config:
        return model
    return dataclasses.replace(model, config=config, module=model.module.clone(config=config))


def stage_optimizer(
    config: TrainConfig, model: Network, number: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run's stage."""
    chosen = config.filled_stages()[number].optimizer
    return make_optimizer(chosen, model.specs, learning(config, model)[number])


def stage_state(config: TrainConfig, model: Network, mesh: Mesh, number: int = 0) -> TrainState:
    """The `abstract_state` of a run's stage: what does not learn in it has no optimizer memory."""
    memory = config.filled_stages()[number].optimizer.memory
    optimizer = stage_optimizer(config, model, number)
    return abstract_state(model, optimizer, mesh, memory, config.mesh.by_slice)


def stage_step(
    config: TrainConfig, model: Network, stage: Stage, size: BatchStep, first: int, number: int = 0
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """(state, batch) -> (state, metrics): a step of a filled stage that began at step `first`.

    `number` is the stage's place among the run's.
    """
    chosen = stage.optimizer
    objective = stage_objective(stage, model, number)
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
        stage_optimizer(config, model, number),
        lambda step: chosen.learning_rate * schedule(step - first),
        clip_norm=chosen.clip_norm,
        loss_scale_growth=config.precision.loss_scale_growth if scaled else None,
        add_slices=functools.partial(add_slices, model=model) if by_slice else None,
    )

    def run_step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if isinstance(stage.objective, Wav2Vec):  # its temperature falls
            steps = jnp.broadcast_to(state.step - first, batch["rows"].shape)
            batch = batch | {"steps": steps}
        return train_step(on_device(state), batch, key)

    return run_step


def stage_objective(stage: Stage, model: Network, number: int = 0) -> Objective:
    """What a filled stage minimizes, by the parameters that it trains."""
    model = sized(model, stage)
    if isinstance(stage.objective, Contrastive):
        found = make_contrastive(stage.objective, model, stage.data.image.normalization)
    elif isinstance(stage.objective, Classification):
        found = make_classification(stage.objective, model, stage.data.normalization)
    elif isinstance(stage.objective, Transcription | Wav2Vec):
        found = make_speech(stage.objective, model)
    else:
        preset = stage.data.normalization if isinstance(stage.data, Seeing) else "half"
        found = make_language(stage.objective, model, preset)
    if not stage.trainable:
        return found
    where = f"stages[{number}].trainable"
    chosen = tree.matching(stage.trainable, tree.flatten(model.shapes), where)
    rates = {
        block: rate
        for block, rate in found.bias_rates.items()
        if f"{block}/moe/router/bias" in chosen
    }
    return found._replace(
        bias_rates=rates, trains=lambda path: path in chosen and found.trains(path)
    )


def overwriting(step: Callable, state: TrainState, model: Network) -> Any:
    """The step as a program that overwrites the state it is given, which lies like `state`."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    moe = getattr(model.config, "moe", None)
    travel = moe and moe.exchange.all_to_all
    options = target.travel_options() if travel else {}
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )
