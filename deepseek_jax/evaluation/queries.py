"""What held-out captions find, as text and as a picture: the end of a run of two towers."""

from typing import Any

import jax
import numpy as np

from deepseek_jax.core.storage import located
from deepseek_jax.data.pairs import PairDataset
from deepseek_jax.evaluation.captions import captions
from deepseek_jax.evaluation.retrieval import embedded
from deepseek_jax.models.two_tower import Towers
from deepseek_jax.monitoring.queries import draw

SHOWN, FOUND = 5, 8  # queries a field, images each


def queries(model: Towers, params: Any, dataset: PairDataset, config: Any) -> str:
    """What some held-out captions of each field find first, and what a captioner writes, as text
    and, in the run's folder pictures/, as pictures."""
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(params)):
        return "no queries: the weights are spread over processes"
    images, texts = embedded(model, params, dataset, min(64, config.batch_size))
    rows, lines = [], ["held-out captions and the images that they find:"]
    for field, side in texts.items():
        chosen = np.linspace(0, len(side["numbers"]) - 1, SHOWN).astype(int)
        for place in dict.fromkeys(chosen.tolist()):
            number = int(side["numbers"][place])
            order = np.argsort(-(images["vectors"] @ side["vectors"][place]))[:FOUND]
            best = [int(n) for n in images["numbers"][order]]
            pictures = [dataset.picture(n) for n in best]
            _, named = dataset.picture(number)
            words, (first, *_) = named[field][0], named.values()
            names = [next(iter(said.values()))[0] for _, said in pictures[:3]]
            lines.append(f"  {words} -> {', '.join(names)}")
            # Few machines have a font with every language.
            label = words if words.isascii() else f"{first[0]} ({field})"
            framed = [(image, n == number) for n, (image, _) in zip(best, pictures, strict=True)]
            rows.append((label, framed))
    draw(rows, located(config.run_dir) / "pictures")
    if model.config.captioner is not None:
        lines.append(captions(model, params, dataset, config))
    return "\n".join(lines)
