"""Retrieval among everything that was held out: how often the right one is among the first."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.core.storage import located
from deepseek_jax.data.pairs import Batch, PairDataset, stacked
from deepseek_jax.evaluation.scores import retrieval_scores
from deepseek_jax.models.two_tower import Towers
from deepseek_jax.monitoring.queries import draw
from deepseek_jax.training.contrastive import inputs_of

SHOWN, FOUND = 5, 8  # queries a field, images each


def embedded(
    model: Towers, params: Any, dataset: PairDataset, batch_size: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """The held-out images, and by field the captions: each `vectors` [N, E] and `numbers`."""
    preset = dataset.held.config.image.normalization
    empty = {"tokens": np.full(dataset.held.length, -1, np.int32)}

    def with_vectors(rows: Batch, method: str) -> dict[str, np.ndarray]:
        parts = []
        for batch, real in _batches(rows, batch_size):
            parts.append(np.asarray(_embed(model, method, preset, params, batch))[:real])
        return {"numbers": rows["numbers"], "vectors": np.concatenate(parts)}

    images = stacked([row | empty for row in dataset.held_images()])
    texts = dataset.held_texts()
    size = images["images"].shape[1:]
    found = {}
    for field, rows in texts.items():
        blank = np.broadcast_to(np.uint8(0), (len(rows["tokens"]), *size))
        found[field] = with_vectors(rows | {"images": blank}, "embed_text")
    return with_vectors(images, "embed_image"), found


def _batches(rows: Batch, size: int) -> Iterator[tuple[Batch, int]]:
    """Batches of one size, the last filled up with its last row, and how many rows are real."""
    count = len(rows["tokens"])
    for first in range(0, count, size):
        index = np.minimum(np.arange(first, first + size), count - 1)
        yield {name: rows[name][index] for name in ("images", "tokens")}, min(size, count - first)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed(model: Towers, method: str, preset: str, params: Any, batch: Batch) -> jax.Array:
    given = inputs_of(batch, preset)
    if method == "embed_image":
        return model.embed_image(params, given["images"])
    return model.embed_text(params, given["tokens"], given["mask"])


def retrieval(
    model: Towers, params: Any, dataset: PairDataset, batch_size: int
) -> dict[str, float]:
    """Recall among all held-out pairs, both ways and by field, and what chance gives.

    `text_to_image/recall@10` and so on (see evaluation/scores) over all captions; the same for each
    field with its name before; `recall_at_10` is the mean of both ways, `chance_at_10` likewise.
    Only an image's own captions are right, not those of its variants.
    """
    images, texts = embedded(model, params, dataset, batch_size)
    sides = {**texts}
    if len(texts) > 1:
        parts = [*texts.values()]
        sides[""] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    else:
        sides = {"": next(iter(texts.values()))}
    scores: dict[str, float] = {}
    for field, rows in sides.items():
        some = np.isin(images["numbers"], rows["numbers"])  # a field may lack some
        given = images["vectors"][some], rows["vectors"], images["numbers"][some], rows["numbers"]
        found = retrieval_scores(*given)
        scores |= {f"{field}/{name}" if field else name: x for name, x in found.items()}
    ways = "image_to_text", "text_to_image"
    for name, key in (("recall_at_10", "recall@10"), ("chance_at_10", "chance@10")):
        scores[name] = float(np.mean([scores[f"{way}/{key}"] for way in ways]))
    return scores


def queries(model: Towers, params: Any, dataset: PairDataset, config: Any) -> str:
    """What some held-out captions of each field find first, as text and, in the run's folder
    pictures/, as a picture."""
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(params)):
        return "no queries: the weights are spread over processes"
    images, texts = embedded(model, params, dataset, min(64, config.batch_size))
    numbers, read = images["numbers"], dataset.held.examples.captions
    rows, lines = [], ["held-out captions and the images that they find:"]
    for field, side in texts.items():
        chosen = np.linspace(0, len(side["numbers"]) - 1, SHOWN).astype(int)
        for place in dict.fromkeys(chosen.tolist()):
            number = int(side["numbers"][place])
            best = numbers[np.argsort(-(images["vectors"] @ side["vectors"][place]))[:FOUND]]
            words = read(number)[field][0]
            names = [next(iter(read(int(n)).values()))[0] for n in best]
            lines.append(f"  {words} -> {', '.join(names[:3])}")
            # Few machines have a font with every language.
            label = (
                words if words.isascii() else f"{next(iter(read(number).values()))[0]} ({field})"
            )
            rows.append((label, [(dataset.held.plain(int(n)), n == number) for n in best]))
    draw(rows, located(config.run_dir) / "pictures")
    return "\n".join(lines)
