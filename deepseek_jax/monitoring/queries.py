"""What queries found, as one picture: a row a query, the right one framed."""

import io

import numpy as np
from matplotlib.figure import Figure

from deepseek_jax.core.storage import Path


def draw(rows: list[tuple[str, list[tuple[np.ndarray, bool]]]], folder: Path) -> None:
    """A row a query: its words, and the pictures that it found; the right one has a frame."""
    size, gap, wide = 64, 6, 260
    count = max(len(found) for _, found in rows)
    height = len(rows) * (size + gap) + gap
    figure = Figure(((wide + count * (size + gap)) / 100, height / 100), dpi=200)
    for index, (words, found) in enumerate(rows):
        top = 1 - (gap + index * (size + gap)) / height
        place = top - size / 2 / height
        figure.text(0.01, place, words[:48].replace("$", r"\$"), fontsize=7, va="center")
        for place, (pixels, right) in enumerate(found):
            width = wide + count * (size + gap)
            left = (wide + place * (size + gap)) / width
            axes = figure.add_axes((left, top - size / height, size / width, size / height))
            axes.imshow(pixels)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="#1a7f37" if right else "#d0d7de", linewidth=2 if right else 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(drawn := io.BytesIO(), format="png")
    (folder / "what_held_out_captions_find.png").write_bytes(drawn.getvalue())
