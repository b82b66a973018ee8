"""What a run is: model, data, optimizer, objective, and its stages. Configs describe; this checks.

The top-level fields are the defaults of the stages, of which there is one by default.
"""

import dataclasses
import math
from typing import Any, Literal, TypeAlias

from deepseek_jax.checkpoint.manager import Checkpoint
from deepseek_jax.core import config as core_config
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.core.storage import Path, located
from deepseek_jax.data.audiovisual import AudioVisual
from deepseek_jax.data.labelled import Labelled
from deepseek_jax.data.loader import Data
from deepseek_jax.data.pairs import Pairs
from deepseek_jax.data.seeing import Seeing
from deepseek_jax.data.utterances import Utterances
from deepseek_jax.models.audio import Wav2Vec2
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.fusion import Fused
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.networks import ModelConfig
from deepseek_jax.models.raw_inputs import misfit
from deepseek_jax.models.two_tower import TwoTower
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.classification import Classification
from deepseek_jax.training.contrastive import Contrastive
from deepseek_jax.training.faults import Faults
from deepseek_jax.training.language import Language
from deepseek_jax.training.optimizer import AdamW, Muon
from deepseek_jax.training.speech import Transcription, Wav2Vec, check_speech

Optimizer: TypeAlias = AdamW | Muon
Objective: TypeAlias = Language | Contrastive | Classification | Transcription | Wav2Vec
AnyData: TypeAlias = Data | Pairs | Seeing | AudioVisual | Labelled | Utterances
SUITS = {  # by the kind of a model: its data, the objectives that train it
    Decoder: ((Data,), Language),
    TwoTower: ((Pairs,), Contrastive),
    VisionLanguage: ((Seeing,), Language),
    Fused: ((AudioVisual, Labelled), Classification),
    Wav2Vec2: ((Utterances,), Transcription, Wav2Vec),
}
# Of the model, what a resumed run may change: how it runs, not what it computes.
HOW = ("remat", "unroll", "scan", "moe/exchange/")
FREE = tuple(f"model/{part}{name}" for part in ("", "language/") for name in HOW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchStep:
    """From this step of its stage on, batches have this size."""

    step: int
    batch_size: int
    accumulation_steps: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """A condition on the held-out evaluation: when it holds, the next stage begins."""

    metric: str
    """As eval.jsonl calls it."""
    below: float | None = None
    """It holds where the metric is below this, or `above`: one of the two."""
    above: float | None = None
    every: int = 100
    """Steps of the stage between evaluations that ask; its last step asks, too."""
    required: bool = False
    """Where it does not hold by the stage's last step, the run stops; else it warns and goes on."""

    def __post_init__(self):
        if (self.below is None) == (self.above is None) or self.every < 1:
            raise ValueError(
                f"a stage's gate must have one of below ({self.below}) and above ({self.above}), "
                f"and every ({self.every}) must be at least 1."
            )

    def holds(self, value: float) -> bool:
        """Whether the gate opens; never for a metric that is not finite."""
        if not math.isfinite(value):
            return False
        return value < self.below if self.above is None else value > self.above

    def __str__(self):
        side, limit = ("below", self.below) if self.above is None else ("above", self.above)
        return f"{self.metric} {side} {limit:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitPart:
    """Where a part of a decoder that sees comes from."""

    part: Literal["vision", "vision_low", "vision_high", "audio", "language"]
    source: str
    """A run, checkpoint or Hugging Face folder: for vision of a ViT or NaFlex, of two towers (the
    images') or of a decoder that sees; for a Hybrid's encoders of a ViT (low) or a SAM (high); for
    audio, which is the ear's encoder, of a Whisper or of a decoder that hears; for language of a
    decoder, which may see."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run; None takes the run's own value.

    Its schedule runs over its own steps. Its data begin where the stage before stopped, unless
    `data` or `sequence_length` changed. The optimizer's memory goes on, of parameters that learn in
    both stages; of others it begins anew. Its images may have another size than the model's, whose
    positions are resized for them; evaluated and loaded, a run sees images as its last stage did.
    """

    name: str = "train"
    steps: int | None = None
    tokens: int | None = None
    """Instead of steps: as many as show the model this many tokens, rows x sequence_length a
    step."""
    batch_size: int | None = None
    accumulation_steps: int | None = None
    sequence_length: int | None = None
    data: AnyData | None = None
    optimizer: Optimizer | None = None
    objective: Objective | None = None
    batch_ramp: tuple[BatchStep, ...] = ()
    """Other batch sizes from given steps of the stage on, ascending (V3: 3,072 to 15,360)."""
    trainable: tuple[str, ...] = ()
    """Patterns of paths of the parameters that learn, such as text/*, where * stands for anything
    (paths: --dry-run); !text/* leaves out; empty: all. Others stay to the bit, without gradients or
    memory."""
    gate: Gate | None = None
    """Ends the stage before its steps are done."""

    @property
    def views(self) -> int:
        """Images that a filled stage's rows bring to a decoder that sees."""
        return self.data.views if isinstance(self.data, Seeing) else 0

    def sized(self, model: ModelConfig) -> ModelConfig:
        """The model's config with images as large as a filled stage's, its weights the same.

        ValueError where they cannot be.
        """
        if isinstance(model, TwoTower) and isinstance(self.data, Pairs):
            return model.at_size(self.data.image.size)
        if isinstance(model, VisionLanguage) and isinstance(self.data, Seeing):
            return model.at_size(self.data.size)
        return model

    @property
    def windows(self) -> int:
        """Windows of sound that they bring to one that hears."""
        return self.data.windows if isinstance(self.data, Seeing) else 0

    def sizes(self) -> tuple[BatchStep, ...]:
        """A filled stage's batch sizes, the first from step 0 on."""
        rows, parts = self.batch_size, self.accumulation_steps
        return (BatchStep(step=0, batch_size=rows, accumulation_steps=parts), *self.batch_ramp)

    def steps_of_tokens(self) -> int:
        """The steps in which a filled stage's batches have its tokens."""
        left, sizes = self.tokens, self.sizes()
        for size, after in zip(sizes, (*sizes[1:], None), strict=True):
            step = max(size.batch_size * self.sequence_length, 1)
            steps = -(-left // step)
            if after is None or size.step + steps <= after.step:
                break
            left -= (after.step - size.step) * step
        return size.step + steps

    def batch_at(self, step: int) -> BatchStep:
        """The batch of a filled stage's step, counted from 0."""
        return [size for size in self.sizes() if size.step <= step][-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig
    data: AnyData
    steps: int
    batch_size: int
    """Sequences (pairs, conversations) a step, over all devices and accumulation steps."""
    sequence_length: int
    """Tokens of a row: of a caption or question, where the model reads these; samples, where it
    hears."""
    optimizer: Optimizer = AdamW()
    objective: Objective = Language()
    accumulation_steps: int = 1
    """Parts that a step's batch is processed in; the update is the same, the memory less."""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    """Steps between evaluations on the held-out data; 0: only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end or when stopped."""
    check_every: int = 100
    """Steps between checks of what must hold (training/invariants), the first step and every save
    included; a run that fails one stops. 0: none."""
    run_dir: str = ""
    """Where everything is written, a folder or gs://bucket/name; empty: runs/<name of the config
    file>."""
    init_from: str | None = None
    """A run, checkpoint or Hugging Face folder (or gs://) whose parameters this run starts from."""
    init_parts: tuple[InitPart, ...] = ()
    """Of a decoder that sees: parts that start from others' parameters, each from its own source;
    the rest starts anew. Not used with init_from."""
    mesh: MeshShape = MeshShape()
    precision: Precision = Precision()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    stages: tuple[Stage, ...] = (Stage(),)

    def __post_init__(self):
        if self.log_every < 1 or min(self.eval_every, self.save_every, self.check_every) < 0:
            raise ValueError(
                f"log_every ({self.log_every}) must be at least 1, eval_every ({self.eval_every}), "
                f"save_every ({self.save_every}) and check_every ({self.check_every}) at least 0 "
                "(0 switches them off)."
            )
        paths = {"run_dir": self.run_dir, "init_from": self.init_from}
        paths |= {f"init_parts[{i}].source": one.source for i, one in enumerate(self.init_parts)}
        for name, path in paths.items():
            try:
                located(path or "")
            except InputError as error:
                raise ValueError(f"{name}: {error}.") from None
        named = [one.part for one in self.init_parts]
        sees = isinstance(self.model, VisionLanguage)
        if named and (not sees or len(named) > len(set(named))):
            raise ValueError(f"init_parts {named} are of a decoder that sees, each part once.")
        twofold = sees and isinstance(self.model.vision, Hybrid)
        if not twofold and {"vision_low", "vision_high"} & {*named}:
            raise ValueError(f"init_parts {named}: model.vision must be a Hybrid for its encoders.")
        if "audio" in named and self.model.audio is None:
            raise ValueError("init_parts has audio, and this model has no ear: set model.audio.")
        if not (self.stages and 0 <= self.seed < 2**32):
            raise ValueError(f"seed ({self.seed}) must lie in [0, 2^32), stages not be empty.")
        for index, stage in enumerate(self.stages):
            if stage.tokens is not None and (stage.steps is not None or stage.tokens < 1):
                raise ValueError(
                    f"stages[{index}] has tokens ({stage.tokens}), which must be at least 1, and "
                    f"then no steps ({stage.steps})."
                )
        filled = self.filled_stages()
        for index, stage in enumerate(filled):
            _check_stage(stage, self.model, f"stages[{index}]: " if len(filled) > 1 else "")
        kind = type(self.model)
        if kind is not Decoder and (self.mesh.stage > 1 or self.mesh.by_slice):
            raise ValueError(
                f"a model of kind {kind.__name__} has no pipeline and no int4 gradients: leave "
                "mesh.stage at 1 and mesh.slice_gradients at float32."
            )
        if isinstance(self.model, Fused) and self.mesh.context > 1:
            raise ValueError("a Fused model's rows are not split: leave mesh.context at 1.")
        chosen = [stage.optimizer for stage in filled]
        memories = {(type(o), o.momentum_dtype, o.variance_dtype, o.memory) for o in chosen}
        if len(memories) > 1:
            raise ValueError(
                "the stages' optimizers must be of one kind with one choice of dtypes and memory, "
                "or they cannot take up each other's; another run can start from this one's."
            )

    def filled_stages(self) -> tuple[Stage, ...]:
        """The stages with the run's own values in place of None."""

        def filled(stage: Stage) -> Stage:
            ours = vars(self)
            own = {n: ours[n] for n, x in vars(stage).items() if x is None and n in ours}
            full = dataclasses.replace(stage, **own)
            if full.tokens is None:
                return full
            return dataclasses.replace(full, steps=full.steps_of_tokens())

        return tuple(map(filled, self.stages))


def _check_stage(stage: Stage, model: ModelConfig, where: str) -> None:
    """Raise ValueError, a full sentence with the numbers, if a filled stage cannot be run."""
    data, *objectives = SUITS[type(model)]
    for name, value, kinds in (
        ("data", stage.data, data),
        ("objective", stage.objective, tuple(objectives)),
    ):
        if not isinstance(value, kinds):
            found, needed = type(value).__name__, " or ".join(kind.__name__ for kind in kinds)
            who = type(model).__name__
            raise ValueError(f"{where}{name} is {found}; a model of kind {who} needs {needed}.")
    try:
        stage.sized(model)
    except ValueError as error:
        raise ValueError(f"{where}data: {error}.") from None
    if isinstance(model, VisionLanguage):
        if stage.data.windows and model.audio is None:
            raise ValueError(
                f"{where}data.windows is {stage.data.windows}, and this model has no ear: set "
                "model.audio, or leave sounds out."
            )
        if stage.data.views < (taken := model.sight.num_views()):
            raise ValueError(f"{where}data.views is {stage.data.views}; one image takes {taken}.")
        if isinstance(model.vision, ViT) and len(set(model.vision.image_size)) > 1:
            raise ValueError(f"{where}model.vision.image_size {model.vision.image_size}: squares.")
        if stage.objective.indexer_warmup:
            raise ValueError(f"{where}objective.indexer_warmup: a decoder that sees has none.")
    if isinstance(model, Fused):
        told, wanted = (sorted(names) for names in (model.names, stage.data.modalities))
        if told != wanted:
            raise ValueError(f"{where}data has {wanted}, and model.modalities are {told}.")
        labels, classes = stage.data.multi_label, len(stage.data.classes)
        if (model.num_classes, model.multi_label) != (classes, labels):
            raise ValueError(
                f"{where}data has {classes} classes, multi_label {labels}; model.num_classes is "
                f"{model.num_classes}, model.multi_label {model.multi_label}."
            )
        shapes = stage.data.shapes(1, stage.sequence_length)["inputs"]
        if why := misfit(model, shapes):
            raise ValueError(f"{where}{why}.")
        tokens = shapes["text"][0][1] if "text" in shapes else stage.sequence_length
        if "sound" not in shapes and tokens != stage.sequence_length:
            raise ValueError(
                f"{where}data.text.length is {tokens}, and sequence_length, which is that of a "
                f"text where nothing is heard, {stage.sequence_length}."
            )
    if isinstance(model, TwoTower) and stage.sequence_length > model.text.max_length:
        raise ValueError(
            f"{where}sequence_length ({stage.sequence_length}) is more than "
            f"model.text.max_length ({model.text.max_length})."
        )
    for part in ("image", "vision"):  # data/ has red, green and blue
        if (channels := getattr(getattr(model, part, None), "num_channels", 3)) != 3:
            raise ValueError(f"{where}model.{part}.num_channels is {channels}; data has 3.")
    if isinstance(model, Wav2Vec2):
        check_speech(model, stage.data, stage.objective, stage.sequence_length, where)
    if stage.steps < 1:
        raise ValueError(f"{where}steps is {stage.steps}; there must be at least 1.")
    if stage.sequence_length < 2:
        length = stage.sequence_length
        raise ValueError(f"{where}sequence_length is {length}; it must be at least 2.")
    starts = [size.step for size in stage.sizes()]
    if starts != sorted(set(starts)):
        raise ValueError(f"{where}batch_ramp's steps {starts[1:]} must ascend from above 0.")
    for size in stage.sizes():
        rows, parts = size.batch_size, size.accumulation_steps
        if rows < 1 or parts < 1 or rows % parts:
            raise ValueError(
                f"{where}batch_size ({rows}) and accumulation_steps ({parts}) must be at least 1, "
                "and the first a multiple of the second."
            )


def differences(old: Any, new: Any, free: tuple[str, ...]) -> list[str]:
    """What two configs, as data, say differently, but for paths that begin as `free` says."""
    was, now = (tree.flatten(config, is_leaf=lambda value: value is None) for config in (old, new))
    return [
        f"{path.replace('/', '.')} was {was.get(path)}, is {now.get(path)}"
        for path in sorted(was.keys() | now.keys())
        if was.get(path) != now.get(path) and not path.startswith(free)
    ]


def check_model(recorded: Path, config: TrainConfig) -> None:
    """InputError when the run directory belongs to another model; says what differs."""
    old = {"model": core_config.read_json(recorded)["model"]}
    different = differences(old, {"model": core_config.to_dict(config.model)}, FREE)
    if different:
        raise InputError(
            f"{recorded.parent} holds a run of another model: {'; '.join(different[:5])}; choose "
            "another --run-dir, or start from its parameters with --init-from"
        )
