"""VL2's grids, views and token order from the formula; NaFlex's patches against transformers."""

import math

import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps
from transformers.image_processing_utils import select_best_resolution

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import tiles
from deepseek_jax.data.tiles import best_grid, budget_size, patched, tiled, token_counts

PUBLISHED = [  # (width, height) in tiles, in the order of VL2's config
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1),
    (2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
]  # fmt: skip


def _image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_candidates_are_the_published_ones():
    assert tiles.candidate_grids() == PUBLISHED


def test_the_best_grid():
    """Against transformers' function of the same rule, and against whole numbers."""
    rng = np.random.default_rng(0)
    sizes = [tuple(size) for size in rng.integers(1, 4000, (2000, 2)).tolist()]
    sizes += [(384, 384), (768, 384), (1, 1), (2000, 10), (385, 384), (1152, 1152), (8000, 8000)]
    for width, height in sizes:
        candidates = [[high * 384, wide * 384] for wide, high in PUBLISHED]
        high, wide = select_best_resolution((height, width), candidates)
        assert best_grid(width, height) == (wide // 384, high // 384)
        scores = []
        for number, (columns, rows) in enumerate(PUBLISHED):
            if columns * height <= rows * width:  # the width fills the grid
                shown = columns * 384 * (height * columns * 384 // width)
            else:
                shown = rows * 384 * (width * rows * 384 // height)
            shown = min(shown, width * height)
            scores.append((-shown, columns * rows * 384**2 - shown, number))
        best = -min(scores)[0]  # float rounding may lose a row or a column of pixels
        column, row = best_grid(width, height)
        mine = -scores[PUBLISHED.index((column, row))][0]
        assert mine >= best - max(width, height, 3456)


@pytest.mark.parametrize(
    ("shape", "num_images", "grid"),
    [
        ((384, 384), 1, (1, 1)),
        ((50, 100), 2, (1, 1)),
        ((500, 1000), 1, (3, 2)),
        ((1000, 500), 2, (2, 3)),
        ((1000, 500), 3, (1, 1)),
        ((1, 1), 1, (1, 1)),
        ((12, 2000), 1, (6, 1)),
    ],
)
def test_views(shape, num_images, grid):
    image = _image(*shape)
    views, found = tiled(image, num_images=num_images)
    assert found == grid and views.shape == (1 + grid[0] * grid[1], 384, 384, 3)
    picture, gray = Image.fromarray(image), (127, 127, 127)
    whole = np.asarray(ImageOps.pad(picture, (384, 384), color=gray))
    np.testing.assert_array_equal(views[0], whole)
    canvas = ImageOps.pad(picture, (grid[0] * 384, grid[1] * 384), color=gray)
    expected = [
        canvas.crop((left, top, left + 384, top + 384))
        for top in range(0, grid[1] * 384, 384)
        for left in range(0, grid[0] * 384, 384)
    ]
    for view, part in zip(views[1:], expected, strict=True):
        np.testing.assert_array_equal(view, np.asarray(part))


@pytest.mark.parametrize(("tile", "patch"), [(384, 14), (384, 16), (392, 14), (70, 14)])
@pytest.mark.parametrize("grid", PUBLISHED)
def test_tokens(tile, patch, grid):
    side = tiles.tile_side(tile, patch)
    assert side == math.ceil((tile // patch) / 2)
    counts = token_counts(grid, side)
    layout = tiles.token_layout(grid, side)
    assert layout.shape == (counts.total,) and layout.dtype == np.int32
    if (tile, patch) == (384, 14):
        assert counts.total == 210 + 1 + (grid[1] * 14) * (grid[0] * 14 + 1)
    expected = []
    for row in range(side):
        expected += [row * side + column for column in range(side)] + [-1]
    expected.append(-2)
    for row in range(grid[1] * side):
        for column in range(grid[0] * side):
            view = 1 + row // side * grid[0] + column // side
            expected.append((view * side + row % side) * side + column % side)
        expected.append(-1)
    assert layout.tolist() == expected
    assert sorted(layout[layout >= 0]) == list(range((1 + grid[0] * grid[1]) * side**2))


@pytest.mark.parametrize(("patch", "budget"), [(16, 256), (14, 100), (16, 1), (8, 7)])
def test_patches_are_those_of_transformers(patch, budget):
    shapes = [(64, 64), (30, 100), (200, 17), (1, 1), (333, 222), (16, 16)]
    images = [_image(*shape, seed) for seed, shape in enumerate(shapes)]
    processor = transformers.Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=budget)
    theirs = processor([Image.fromarray(image) for image in images], return_tensors="np")
    ours = patched(images, patch=patch, max_patches=budget)
    np.testing.assert_array_equal(ours.shapes, theirs["spatial_shapes"])
    np.testing.assert_array_equal(ours.mask, theirs["pixel_attention_mask"])
    # Two roundings of numbers up to 1 on either side, over a deviation of 0.5.
    np.testing.assert_allclose(ours.pixels, theirs["pixel_values"], rtol=0, atol=4 * 2**-24 / 0.5)
    assert (ours.mask.sum(1) == ours.shapes.prod(1)).all()


def test_sizes_within_a_budget():
    published = transformers.models.siglip2.image_processing_pil_siglip2
    rng = np.random.default_rng(0)
    for height, width, patch, budget in rng.integers(1, [900, 900, 30, 900], (500, 4)).tolist():
        theirs = published.get_image_size_for_max_num_patches(height, width, patch, budget)
        assert budget_size(height, width, patch, budget) == theirs
    with pytest.raises(InputError, match="a budget of 0 patches"):
        budget_size(3, 3, 16, 0)


@pytest.mark.parametrize("bad", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8)])
def test_what_is_no_color_image_is_refused(bad):
    for see in (tiled, lambda image: patched([image])):
        with pytest.raises(InputError, match=r"an image of uint8 \(9, 9.*\): give uint8"):
            see(bad)
