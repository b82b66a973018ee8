"""What queries found, and what was written of images, as pictures."""

import io

import numpy as np

from deepseek_jax.core.extras import require
from deepseek_jax.core.storage import Path


def draw(rows: list[tuple[str, list[tuple[np.ndarray, bool]]]], folder: Path) -> None:
    """A row a query: its words, and the pictures that it found; the right one has a frame."""
    size, gap, wide = 64, 6, 260
    count = max(len(found) for _, found in rows)
    height = len(rows) * (size + gap) + gap
    figure = require("matplotlib.figure").Figure(
        ((wide + count * (size + gap)) / 100, height / 100), dpi=200
    )
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


def draw_grid(cells: list[tuple[np.ndarray, str, str]], folder: Path) -> None:
    """Images, what was written of each below it and, gray, what it is called."""
    columns, size, below, gap = 6, 64, 30, 40
    rows = -(-len(cells) // columns)
    width, height = columns * (size + gap) + gap, rows * (size + below) + 8
    figure = require("matplotlib.figure").Figure((width / 100, height / 100), dpi=200)
    for number, (pixels, written, called) in enumerate(cells):
        row, column = divmod(number, columns)
        left, top = gap + column * (size + gap), row * (size + below) + 6
        axes = figure.add_axes(
            (left / width, 1 - (top + size) / height, size / width, size / height)
        )
        axes.imshow(pixels)
        axes.set_axis_off()
        for words, color, down in ((written, "#1d2733", 8), (called, "#8b949e", 17)):
            words = words if len(words) < 30 else words[:28] + "..."
            figure.text(
                (left + size / 2) / width, 1 - (top + size + down) / height,
                words.replace("$", r"\$"), fontsize=4.5, color=color, ha="center", va="center",
            )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(drawn := io.BytesIO(), format="png")
    (folder / "written_of_held_out_images.png").write_bytes(drawn.getvalue())
