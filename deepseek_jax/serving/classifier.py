"""A classifier of several modalities to use: a run's, fed with raw data."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.checkpoint import manager
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.target import leave_absent_tpus
from deepseek_jax.data.audiovisual import AudioVisual
from deepseek_jax.data.labelled import FILES, Labelled
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.data.vision import Normalization
from deepseek_jax.models.fusion import Answer, Fused, FusedNetwork, build_fused
from deepseek_jax.models.raw_inputs import inputs_of
from deepseek_jax.serving.language import precision_of_run
from deepseek_jax.serving.media import opened


class Told(NamedTuple):
    """What a classifier says of a batch, float32."""

    probabilities: np.ndarray
    """[B, V], of all modalities together."""
    alone: dict[str, np.ndarray]
    """The same of each modality by itself; evenly spread where it is absent."""
    weights: dict[str, np.ndarray]
    """[B], what each modality weighed: 0 where it is absent, one in sum."""
    labels: list[tuple[str, ...]]
    """Each row's likeliest class; of several labels those that are likelier than not."""


@dataclasses.dataclass(frozen=True)
class ClassifierModel:
    """A classifier of several modalities with its weights."""

    model: FusedNetwork
    params: Any
    config: Fused
    data: AudioVisual | Labelled
    """What it was trained on: its classes, and how its pixels were made."""
    length: int
    """Samples of its sounds."""
    tokenizer: Tokenizer | None = None
    """Of its texts."""

    def classify(self, inputs: Mapping[str, Any]) -> Told:
        """What a batch is, given by modality: `image`, `sound`, `video`, `text`.

        A list, an item a row: files' paths, pixels uint8 [H, W, 3], waves [T] of 16 kHz or (wave,
        rate), frames [T, H, W, 3], texts; None: this row lacks it. Or one array, as the model
        takes it: pixels uint8 [B, H, W, 3], waves [B, T]. A modality may be left out. Raises
        InputError for one that the model lacks, none at all, numbers of rows that differ, and what
        cannot be read.
        """
        names = self.config.names
        if not inputs or set(inputs) - {*names}:
            given = ", ".join(map(repr, inputs)) or "nothing"
            raise InputError(f"the model takes {', '.join(names)}, one of them or all; not {given}")
        listed = {
            name: [x] if isinstance(x, str | pathlib.Path) else x for name, x in inputs.items()
        }
        rows = {name: len(x) for name, x in listed.items()}
        if len(set(rows.values())) > 1 or 0 in rows.values():
            raise InputError(f"modalities have different numbers of rows, or none: {rows}")
        count = next(iter(rows.values()))
        shapes = self.data.shapes(count, self.length)["inputs"]
        made = {name: np.zeros(*shapes[name]) for name in names}
        present = {name: np.full(count, name in listed) for name in names}
        for name, x in listed.items():
            wanted = made[name].shape
            if isinstance(x, list | tuple):
                present[name] = np.array([item is not None for item in x])
                made[name] = self._rows(name, x, made[name][:1])
            else:
                made[name] = np.asarray(x)
            if made[name].shape != wanted:
                raise InputError(f"{name} has the shape {made[name].shape}; {wanted} is taken")
        if not (some := np.any([*present.values()], 0)).all():
            raise InputError(f"row {int(some.argmin())} has none of {', '.join(names)}")
        batch = {"inputs": made, "present": present}
        found = _answer(self.model, self.data.normalization, self.params, batch)
        share = jax.nn.sigmoid if self.config.multi_label else jax.nn.softmax
        probabilities = np.asarray(share(found.logits))
        return Told(
            probabilities,
            {name: np.asarray(share(found.alone[:, i])) for i, name in enumerate(names)},
            {name: np.asarray(found.weights[:, i]) for i, name in enumerate(names)},
            [self._labels(row) for row in probabilities],
        )

    def _rows(self, name: str, given: Sequence[Any], empty: np.ndarray) -> np.ndarray:
        """A list's items as rows, zeros where there is none; of a video the frames that fit."""
        rows = []
        for item in given:
            if item is None:
                rows.append(empty[0])
                continue
            medium = item if name == "text" else opened(FILES[name], item, empty.shape[1])
            rows.append(self.data.still(name, medium, self.length, self.tokenizer))
        if len({row.shape for row in rows}) > 1:
            raise InputError(f"{name} has rows of the shapes {[row.shape for row in rows]}")
        return np.stack(rows).astype(empty.dtype)

    def _labels(self, row: np.ndarray) -> tuple[str, ...]:
        classes = self.data.classes
        if not self.config.multi_label:
            return (classes[int(row.argmax())],)
        return tuple(name for name, share in zip(classes, row, strict=True) if share > 0.5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(model: FusedNetwork, preset: Normalization, params: Any, batch: Any) -> Answer:
    return model.apply(params, **inputs_of(model.config, batch, preset))


def load_classifier(path: str | pathlib.Path) -> ClassifierModel:
    """The classifier of a run or of a checkpoint of ours.

    On a CPU it computes in float32. Raises InputError when there is none, or it is not what its
    config says.
    """
    leave_absent_tpus()
    directory = manager.resolve(path)
    recorded = manager.read_config(directory)
    config = from_dict(Fused, recorded["model"], "model")
    model = build_fused(config, precision_of_run(recorded))
    params = manager.load_params(directory, model.shapes, model.layers)
    last = manager.last_stage(recorded)
    data = from_dict(AudioVisual | Labelled, last["data"], "data")
    reads = isinstance(data, Labelled) and data.text is not None
    tokenizer = load_tokenizer(directory) if reads else None
    return ClassifierModel(model, params, config, data, last["sequence_length"], tokenizer)
