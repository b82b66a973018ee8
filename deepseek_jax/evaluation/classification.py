"""How often a classifier of several modalities is right: all together, and each alone."""

import functools
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.data.audiovisual import Batch, DigitDataset
from deepseek_jax.data.labelled import LabelledDataset
from deepseek_jax.data.vision import Normalization
from deepseek_jax.evaluation.scores import calibration_error, multilabel_scores
from deepseek_jax.models.fusion import Answer, FusedNetwork
from deepseek_jax.models.raw_inputs import inputs_of
from deepseek_jax.training.recipe import TrainConfig

AnyLabelled: TypeAlias = DigitDataset | LabelledDataset


def answers(
    model: FusedNetwork, params: Any, batches: Iterable[Batch], preset: Normalization
) -> dict[str, np.ndarray]:
    """Of all rows with a label: `labels`, `logits`, `alone` and `weights` as `Answer` has them."""
    found: list[dict[str, np.ndarray]] = []
    for batch in batches:
        answer = _answer(model, preset, params, {k: batch[k] for k in ("inputs", "present")})
        labels = np.asarray(batch["labels"])
        known = (labels >= 0).reshape(len(labels), -1).any(1)
        rows = {"labels": labels, "logits": answer.logits, "alone": answer.alone}
        rows["weights"] = answer.weights
        found.append({name: np.asarray(x)[known] for name, x in rows.items()})
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(model: FusedNetwork, preset: Normalization, params: Any, batch: Batch) -> Answer:
    found = model.apply(params, **inputs_of(model.config, batch, preset))
    alone = jax.sharding.get_abstract_mesh().empty  # else every process reads all of it
    if alone:
        return found
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), found)


def scores_of(
    found: dict[str, np.ndarray], names: tuple[str, ...], classes: tuple[str, ...]
) -> dict[str, float]:
    """The scores of `answers`: of the fusion, and, as `NAME_accuracy` and so on, of each modality.

    One class a row: `loss`, `accuracy` and `calibration_error`. Several labels: `accuracy` of all,
    and `auroc`, `sensitivity@0.9` and `calibration_error` as evaluation/scores has them, of each
    class too. `NAME_weight` is the mean of what the fusion gives a modality.
    """
    labels, scores = found["labels"], {}
    sides = {"": found["logits"]} | {n: found["alone"][:, i] for i, n in enumerate(names)}
    for name, logits in sides.items():
        of = _label_scores if labels.ndim == 2 else _class_scores
        kinds = of(logits.astype(np.float64), labels, classes, bool(name))
        scores |= {f"{name}_{kind}" if name else kind: value for kind, value in kinds.items()}
    means = found["weights"].mean(0)
    return scores | {f"{n}_weight": float(means[i]) for i, n in enumerate(names)}


def _class_scores(logits: np.ndarray, labels: np.ndarray, classes: Any, short: bool) -> dict:
    top = logits - logits.max(1, keepdims=True)
    log_p = top - np.log(np.exp(top).sum(1, keepdims=True))
    right = log_p.argmax(1) == labels
    scores = {
        "loss": float(-log_p[np.arange(len(labels)), labels].mean()),
        "accuracy": float(right.mean()),
        "calibration_error": calibration_error(np.exp(log_p.max(1)), right),
    }
    return {"accuracy": scores["accuracy"]} if short else scores


def _label_scores(logits: np.ndarray, labels: np.ndarray, classes: Any, short: bool) -> dict:
    known = labels >= 0
    given = 1 / (1 + np.exp(-logits)), np.maximum(labels, 0), known
    scores = {"accuracy": float(((logits > 0) == (labels > 0))[known].mean())}
    scores |= multilabel_scores(*given, classes=classes)
    return {k: scores[k] for k in ("accuracy", "auroc")} if short else scores


def classification(
    model: FusedNetwork, params: Any, dataset: AnyLabelled, batch_size: int
) -> dict[str, float]:
    """The `scores_of` everything that was held out."""
    batches = dataset.held_batches(batch_size)
    found = answers(model, params, batches, dataset.config.normalization)
    return scores_of(found, model.config.names, dataset.config.classes)


def alone_and_together(
    model: FusedNetwork, params: Any, dataset: AnyLabelled, config: TrainConfig
) -> str:
    """A table of the scores of what was held out: of the fusion, and of each modality's head."""
    scores = classification(model, params, dataset, config.batch_size)
    kinds = [kind for kind in ("accuracy", "auroc") if kind in scores]
    rows = [["", *kinds, "weight"], ["together", *(f"{scores[kind]:.4f}" for kind in kinds), ""]]
    for name in model.config.names:
        cells = [f"{scores[f'{name}_{kind}']:.4f}" for kind in (*kinds, "weight")]
        rows.append([f"{name} alone", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
