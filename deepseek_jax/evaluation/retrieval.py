"""Retrieval among everything that was held out: how often the right one is among the first."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.packing import stacked
from deepseek_jax.data.pairs import Batch, PairDataset
from deepseek_jax.data.vision import normalized
from deepseek_jax.evaluation.scores import retrieval_scores
from deepseek_jax.models.raw_inputs import texts_of
from deepseek_jax.models.two_tower import Towers


def embedded(
    model: Towers, params: Any, dataset: PairDataset, batch_size: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """The held-out images, and by field the captions: each `vectors` [N, E] and `numbers`."""
    preset = dataset.held.config.image.normalization

    def of_images(batch: Batch) -> jax.Array:
        return _of_images(model, preset, params, batch["images"])

    def of_texts(batch: Batch) -> jax.Array:
        return _of_texts(model, params, batch["tokens"])

    images = _vectors(of_images, dataset.held_images(), batch_size)
    texts = dataset.held_texts().items()
    return images, {field: _vectors(of_texts, iter(rows), batch_size) for field, rows in texts}


def _vectors(
    embed: Callable[[Batch], jax.Array], rows: Iterator[Batch], size: int
) -> dict[str, np.ndarray]:
    """All rows' vectors and numbers; the last batch is filled up to `size` with its last."""
    vectors, numbers = [], []
    while some := [*itertools.islice(rows, size)]:
        batch = stacked(some + some[-1:] * (size - len(some)))
        vectors.append(np.asarray(embed(batch))[: len(some)])
        numbers += [row["numbers"] for row in some]
    if not numbers:
        raise InputError("nothing that was held out can be used")
    return {"vectors": np.concatenate(vectors), "numbers": np.array(numbers)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_images(model: Towers, preset: str, params: Any, images: jax.Array) -> jax.Array:
    return _everywhere(model.embed_image(params, normalized(images, preset)))


@functools.partial(jax.jit, static_argnums=0)
def _of_texts(model: Towers, params: Any, tokens: jax.Array) -> jax.Array:
    return _everywhere(model.embed_text(params, **texts_of(tokens)))


def _everywhere(x: jax.Array) -> jax.Array:
    """x whole on every device, so that every process can read it."""
    alone = jax.sharding.get_abstract_mesh().empty
    return x if alone else jax.lax.with_sharding_constraint(x, PartitionSpec())


def retrieval(
    model: Towers, params: Any, dataset: PairDataset, batch_size: int
) -> dict[str, float]:
    """Recall among all held-out pairs, both ways and by field, and what chance gives.

    `text_to_image/recall@10` and so on (see evaluation/scores) over all captions; the same for each
    field, if there are several, with its name before; `recall_at_10` is the mean of both ways,
    `chance_at_10` likewise. Only an image's own captions are right, not those of its variants.
    """
    images, texts = embedded(model, params, dataset, batch_size)
    parts = [*texts.values()]
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    sides = {f"{field}/": rows for field, rows in texts.items() if len(parts) > 1} | {"": every}
    scores: dict[str, float] = {}
    for prefix, rows in sides.items():
        some = np.isin(images["numbers"], rows["numbers"])  # a field may lack some
        given = images["vectors"][some], rows["vectors"], images["numbers"][some], rows["numbers"]
        scores |= {f"{prefix}{name}": x for name, x in retrieval_scores(*given).items()}
    ways = "image_to_text", "text_to_image"
    for name, key in (("recall_at_10", "recall@10"), ("chance_at_10", "chance@10")):
        scores[name] = float(np.mean([scores[f"{way}/{key}"] for way in ways]))
    return scores
