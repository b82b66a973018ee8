"""A classifier of several modalities to use: a run's, fed with raw data."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.checkpoint import manager
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.target import leave_absent_tpus
from deepseek_jax.data.audiovisual import AudioVisual
from deepseek_jax.data.vision import Normalization
from deepseek_jax.models.fusion import Answer, Fused, FusedNetwork, build_fused
from deepseek_jax.models.raw_inputs import inputs_of
from deepseek_jax.serving.language import precision_of_run


class Told(NamedTuple):
    """What a classifier says of a batch, float32."""

    probabilities: np.ndarray
    """[B, V], of all modalities together."""
    alone: dict[str, np.ndarray]
    """The same of each modality by itself; evenly spread where it is absent."""
    weights: dict[str, np.ndarray]
    """[B], what each modality weighed: 0 where it is absent, one in sum."""


@dataclasses.dataclass(frozen=True)
class ClassifierModel:
    """A classifier of several modalities with its weights."""

    model: FusedNetwork
    params: Any
    config: Fused
    data: AudioVisual
    """What it was trained on: its classes, and how its pixels were normalized."""
    length: int
    """Samples of its sounds."""

    def classify(self, inputs: Mapping[str, Any]) -> Told:
        """What a batch is, given by modality: pixels uint8 [B, H, W, 3], waves [B, T] of 16 kHz.

        A modality may be left out. Raises InputError for one that the model lacks, none at all, or
        numbers of rows that differ.
        """
        names = self.config.names
        if not inputs or set(inputs) - {*names}:
            given = ", ".join(map(repr, inputs)) or "nothing"
            raise InputError(f"the model takes {', '.join(names)}, one of them or all; not {given}")
        rows = {name: len(x) for name, x in inputs.items()}
        if len(set(rows.values())) > 1:
            raise InputError(f"modalities have different numbers of rows: {rows}")
        count = next(iter(rows.values()))
        shapes = self.data.shapes(count, self.length)["inputs"]
        empty = {name: np.zeros(*shapes[name]) for name in names}
        batch = {
            "inputs": {name: np.asarray(inputs.get(name, empty[name])) for name in names},
            "present": {name: np.full(count, name in inputs) for name in names},
        }
        for name, x in batch["inputs"].items():
            if x.shape != empty[name].shape:
                raise InputError(f"{name} has the shape {x.shape}; {empty[name].shape} is taken")
        found = _answer(self.model, self.data.normalization, self.params, batch)
        share = jax.nn.sigmoid if self.config.multi_label else jax.nn.softmax
        return Told(
            np.asarray(share(found.logits)),
            {name: np.asarray(share(found.alone[:, i])) for i, name in enumerate(names)},
            {name: np.asarray(found.weights[:, i]) for i, name in enumerate(names)},
        )


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
    data = from_dict(AudioVisual, last["data"], "data")
    return ClassifierModel(model, params, config, data, last["sequence_length"])
