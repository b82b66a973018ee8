"""What a run is: model, data, optimizer, objective, and its stages. Configs describe; this checks.

The top-level fields are the defaults of the stages, of which there is one by default.
"""

import dataclasses
from typing import TypeAlias

from deepseek_jax.checkpoint.manager import Checkpoint
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.language import Language
from deepseek_jax.training.optimizer import AdamW, Muon

Optimizer: TypeAlias = AdamW | Muon


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchStep:
    """From this step of its stage on, batches have this size."""

    step: int
    batch_size: int
    accumulation_steps: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run; None takes the run's own value.

    Its schedule runs over its own steps. Its data begin where the stage before stopped, unless
    `data` or `sequence_length` changed. The optimizer's memory goes on, unless its kind changed.
    """

    name: str = "train"
    steps: int | None = None
    batch_size: int | None = None
    accumulation_steps: int | None = None
    sequence_length: int | None = None
    data: Data | None = None
    optimizer: Optimizer | None = None
    objective: Language | None = None
    batch_ramp: tuple[BatchStep, ...] = ()
    """Other batch sizes from given steps of the stage on, ascending (V3: 3,072 to 15,360)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage with nothing left open."""

    name: str
    first_step: int
    """Steps of the run before it."""
    steps: int
    sequence_length: int
    data: Data
    optimizer: Optimizer
    objective: Language
    batches: tuple[BatchStep, ...]
    """Batch sizes, the first from step 0 of the stage."""

    def batch_at(self, step: int) -> BatchStep:
        """What applies to the run's step `step`, counted from 0."""
        return [b for b in self.batches if self.first_step + b.step <= step][-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    model: Decoder
    data: Data
    steps: int
    batch_size: int
    """Sequences a step, over all devices and accumulation steps."""
    sequence_length: int
    optimizer: Optimizer = AdamW()
    objective: Language = Language()
    accumulation_steps: int = 1
    """Parts that a step's batch is processed in; the update is the same, the memory less."""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    """Steps between evaluations on the held-out data; 0: only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end or when stopped."""
    run_dir: str = ""
    """Where everything is written; empty: runs/<name of the config file>."""
    init_from: str | None = None
    """A run or checkpoint whose parameters this one starts from, with fresh optimizer memory."""
    mesh: MeshShape = MeshShape()
    precision: Precision = Precision()
    checkpoint: Checkpoint = Checkpoint()
    stages: tuple[Stage, ...] = (Stage(),)

    def __post_init__(self):
        if not self.stages:
            raise ValueError("stages is empty; a run has at least one, stages=(Stage(),).")
        if self.log_every < 1 or self.eval_every < 0 or self.save_every < 0:
            raise ValueError(
                f"log_every ({self.log_every}) must be at least 1, eval_every ({self.eval_every}) "
                f"and save_every ({self.save_every}) at least 0 (0 switches them off)."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and 2^32 - 1.")
        for index, plan in enumerate(self.plans()):
            _check_plan(plan, f"stages[{index}]: " if len(self.stages) > 1 else "")

    def plans(self) -> tuple[Plan, ...]:
        """The stages in turn, every open field filled from the top level."""
        plans, first = [], 0
        for stage in self.stages:
            start = BatchStep(
                step=0,
                batch_size=_or(stage.batch_size, self.batch_size),
                accumulation_steps=_or(stage.accumulation_steps, self.accumulation_steps),
            )
            plan = Plan(
                name=stage.name,
                first_step=first,
                steps=_or(stage.steps, self.steps),
                sequence_length=_or(stage.sequence_length, self.sequence_length),
                data=_or(stage.data, self.data),
                optimizer=_or(stage.optimizer, self.optimizer),
                objective=_or(stage.objective, self.objective),
                batches=(start, *stage.batch_ramp),
            )
            plans.append(plan)
            first += plan.steps
        return tuple(plans)

    def total_steps(self) -> int:
        """The steps of all stages."""
        return sum(plan.steps for plan in self.plans())


def _or(value, default):
    return default if value is None else value


def _check_plan(plan: Plan, where: str) -> None:
    """Raise ValueError, a full sentence with the numbers, if the stage cannot be run."""
    if plan.steps < 1:
        raise ValueError(f"{where}steps is {plan.steps}; there must be at least 1.")
    if plan.sequence_length < 2:
        raise ValueError(
            f"{where}sequence_length is {plan.sequence_length}; it must be at least 2: a token and "
            "its successor."
        )
    for size in plan.batches:
        if size.batch_size < 1 or size.accumulation_steps < 1:
            raise ValueError(
                f"{where}batch_size ({size.batch_size}) and accumulation_steps "
                f"({size.accumulation_steps}) must be at least 1."
            )
        if size.batch_size % size.accumulation_steps:
            raise ValueError(
                f"{where}batch_size ({size.batch_size}) must be a multiple of accumulation_steps "
                f"({size.accumulation_steps})."
            )
    starts = [size.step for size in plan.batches]
    if starts != sorted(set(starts)):
        raise ValueError(
            f"{where}batch_ramp starts at steps {starts[1:]}; they must ascend from above 0."
        )
