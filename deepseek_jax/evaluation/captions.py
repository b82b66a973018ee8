"""Captions that two towers with a captioner write of held-out images, as text and as a picture."""

import functools
from typing import Any

import jax
import numpy as np

from deepseek_jax.core.storage import located
from deepseek_jax.data import pairs
from deepseek_jax.data.vision import normalized
from deepseek_jax.models.two_tower import Towers
from deepseek_jax.monitoring.queries import draw_grid

SHOWN, TEMPERATURE = 24, 0.5
NOT_IN_FONTS = "\u2e80"  # from here on, what matplotlib's own font lacks
EXAMPLES = 10_000  # whose captions tell a field's tokens


def field_tokens(dataset: pairs.PairDataset) -> dict[str, np.ndarray]:
    """By field (a language): which tokens its training captions use, bool [V]."""
    found: dict[str, np.ndarray] = {}
    for said in pairs.captions(dataset.train.examples, dataset.train.numbers[:EXAMPLES]):
        for field, texts in said.items():
            known = found.setdefault(field, np.zeros(dataset.tokenizer.vocab_size, bool))
            for caption in texts:
                known[dataset.tokenizer.encode(caption)] = True
    for known in found.values():
        known[dataset.tokenizer.eos_id] = True
    return found


def captions(model: Towers, params: Any, dataset: pairs.PairDataset, config: Any) -> str:
    """What is written of some held-out images in each field, beside what they are called.

    As text and, of fields that any font has, in the run's folder pictures/. An image's captions
    are drawn with `config.seed`, among the tokens that the field's training captions use.
    """
    # The evaluation before this one has found what is damaged.
    held = [int(n) for n in dataset.held.numbers if int(n) not in dataset.held.skips.reasons]
    chosen = [held[n] for n in np.unique(np.linspace(0, len(held) - 1, SHOWN).astype(int))]
    images, said = zip(*map(dataset.picture, chosen), strict=True)
    tokenizer, pixels = dataset.tokenizer, np.stack(images)
    ends, lines = (tokenizer.bos_id, tokenizer.eos_id), ["captions written of held-out images:"]
    written: dict[str, list[str]] = {}
    for field, allowed in field_tokens(dataset).items():
        preset, key = dataset.held.config.image.normalization, jax.random.key(config.seed)
        rows = np.asarray(
            _written(model, preset, *ends, dataset.held.length, params, pixels, key, allowed)
        )
        written[field] = [_text(tokenizer, row) for row in rows]
    for place, names in enumerate(said):
        for field, texts in written.items():
            if field in names:
                lines.append(f"  {names[field][0]} -> {texts[place]}")
    for field, texts in written.items():
        named = [names.get(field, ("",))[0] for names in said]
        if all(max(name, default="") < NOT_IN_FONTS for name in named):
            draw_grid(
                [*zip(images, texts, named, strict=True)], located(config.run_dir) / "pictures"
            )
            break
    return "\n".join(lines)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _written(model, preset, begin, end, length, params, images, key, allowed):
    options = {"begin": begin, "end": end, "length": length, "temperature": TEMPERATURE}
    return model.captions(params, normalized(images, preset), key, allowed=allowed, **options)


def _text(tokenizer: Any, row: np.ndarray) -> str:
    ids = row[1:].tolist()
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)
