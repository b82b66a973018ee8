"""Dynamic resolution: DeepSeek-VL2's tiles, and SigLIP2-NaFlex's patches under a token budget.

Pixels are NumPy uint8 [H, W, 3]. VL2 (arXiv 2412.10302, section 2) shows an image to its encoder
twice: whole, and cut into tiles of the best of a few grids. NaFlex (arXiv 2502.14786, section 2.3)
keeps the proportions and takes as many patches as a budget allows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.vision import (
    FITS,
    ImageTransform,
    Method,
    Normalization,
    checked,
    letterbox,
    mean_color,
    normalized,
    resized,
)

TILE = 384  # the side of a view
NEWLINE, SEPARATOR, TEXT = -1, -2, -3  # where a token's embedding comes from, if from no view
MAX_TILES = 9
MAX_TILED_IMAGES = 2  # with more images in a prompt none is tiled
Grid: TypeAlias = tuple[int, int]
Shape: TypeAlias = tuple[tuple[int, ...], np.dtype]


def candidate_grids(max_tiles: int = MAX_TILES) -> list[tuple[int, int]]:
    """All (tiles_w, tiles_h) with tiles_w * tiles_h <= max_tiles, in the published order.

    By number of tiles, the longest first, and of those that lie the same way up, the upright one:
    the first of equally good ones is taken.
    """
    sides = range(1, max_tiles + 1)
    grids = [(wide, high) for wide in sides for high in sides if wide * high <= max_tiles]
    return sorted(grids, key=lambda grid: (grid[0] * grid[1], min(grid), grid[0]))


def best_grid(
    width: int, height: int, tile: int = TILE, max_tiles: int = MAX_TILES
) -> tuple[int, int]:
    """The (tiles_w, tiles_h) that shows most of an image's pixels, then wastes the fewest.

    Shown are min(w h, floor(w s) floor(h s)) pixels with s = min(grid width / w, grid height / h);
    wasted is the rest of the grid (VL2's select_best_resolution).
    """
    best, score = (1, 1), (-1, 0)
    for grid in candidate_grids(max_tiles):
        grid_width, grid_height = grid[0] * tile, grid[1] * tile
        scale = min(grid_width / width, grid_height / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        found = (shown, shown - grid_width * grid_height)
        if found > score:
            best, score = grid, found
    return best


class Tiles(NamedTuple):
    """An image as an encoder sees it."""

    views: np.ndarray
    """uint8 [1 + tiles_w * tiles_h, tile, tile, 3]: the whole image, then its tiles row by row."""
    grid: tuple[int, int]
    """(tiles_w, tiles_h)."""


def tiled(
    pixels: np.ndarray,
    *,
    num_images: int = 1,
    tile: int = TILE,
    max_tiles: int = MAX_TILES,
    normalization: Normalization = "half",
) -> Tiles:
    """An image of a prompt with `num_images` of them as VL2's views.

    Each view keeps the proportions, on the normalization's mean color. Where nothing is tiled, the
    one tile shows the whole image again, as in the published model.
    """
    height, width, _ = checked(pixels).shape
    grid = (1, 1)
    if num_images <= MAX_TILED_IMAGES:
        grid = best_grid(width, height, tile, max_tiles)
    color = mean_color(normalization)
    whole = letterbox(pixels, tile, tile, color)
    canvas = letterbox(pixels, grid[1] * tile, grid[0] * tile, color)
    parts = canvas.reshape(grid[1], tile, grid[0], tile, 3).swapaxes(1, 2)
    return Tiles(np.concatenate([whole[None], parts.reshape(-1, tile, tile, 3)]), grid)


class TokenCounts(NamedTuple):
    """How many tokens a tiled image takes in a prompt, in their order."""

    whole: int
    """side rows of side tokens, each row with a newline."""
    separator: int
    """1."""
    tiles: int
    """The tiles' tokens as one picture: tiles_h * side rows of tiles_w * side, with newlines."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def tile_side(tile: int = TILE, patch: int = 14, downsample: int = 2) -> int:
    """Tokens along a view's side: ceil((tile // patch) / downsample); 14 in VL2."""
    return math.ceil((tile // patch) / downsample)


def token_counts(grid: tuple[int, int], side: int) -> TokenCounts:
    """Tokens of a (tiles_w, tiles_h) image, `side` along each view: s(s+1), 1, (h s)(w s + 1)."""
    wide, high = grid
    return TokenCounts(side * (side + 1), 1, high * side * (wide * side + 1))


def token_layout(grid: tuple[int, int], side: int) -> np.ndarray:
    """Where each of a tiled image's tokens comes from, int32 [token_counts(grid, side).total].

    From 0 on, a token of the views laid one after another ([(1 + tiles_w tiles_h) side side]: view,
    row, column); -1 is a newline, -2 the separator. Rows run over the tiles of a row of the grid.
    """
    wide, high = grid
    numbers = np.arange((1 + wide * high) * side * side, dtype=np.int32)
    views = numbers.reshape(-1, side, side)
    local = views[1:].reshape(high, wide, side, side).swapaxes(1, 2)
    whole, parts = _lines(views[0]), _lines(local.reshape(high * side, wide * side))
    return np.concatenate([whole, np.array([-2], np.int32), parts])


def _lines(rows: np.ndarray) -> np.ndarray:
    """Rows with a newline after each, one after another."""
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=-1).ravel()


class Sight(NamedTuple):
    """How a model takes images in, and what they take of a row."""

    size: int
    """Pixels along a view's side."""
    tokens: int
    """Of one view, newlines left out."""
    side: int | None = None
    """Tokens along a view's side where an image is its whole and tiles; None: it is one view."""
    small: int | None = None
    """Pixels along the side of the same picture again, smaller (`canvas`); None: not so."""

    def layout(self, grid: Grid = (1, 1)) -> np.ndarray:
        """Where each token of one image comes from, its views numbered from 0: `token_layout`.

        A film's frame is an image; of tiles it has (0, 0).
        """
        if self.side is not None:
            return token_layout(grid, self.side)
        return np.arange(self.tokens, dtype=np.int32)

    def num_views(self, grid: Grid = (1, 1)) -> int:
        """Views of one image."""
        return 1 + math.prod(grid) if self.side is not None else 1

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of one view's arrays."""
        height = self.size + (self.small or 0)
        return {"images": ((height, self.size, 3), np.dtype(np.uint8))}


class Budget(NamedTuple):
    """How a model takes in images of any shape, one view each: as patches under a budget."""

    patch: int
    """Pixels along a patch's side."""
    max_patches: int
    tokens: int
    """That a view has room for."""
    each: bool
    """Whether every patch is a token; else an image has all tokens."""

    @property
    def size(self) -> int:
        """Pixels along the side of the largest square."""
        return self.patch * math.isqrt(self.max_patches)

    def layout(self, grid: Grid = (1, 1)) -> np.ndarray:
        """As `Sight.layout`, of an image of `grid` (wide, high) patches."""
        return np.arange(math.prod(grid) if self.each else self.tokens, dtype=np.int32)

    def num_views(self, grid: Grid = (1, 1)) -> int:
        """Views of one image: 1."""
        del grid
        return 1

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of one view's arrays: `shapes` are its rows and columns of patches."""
        patches = (self.max_patches, self.patch**2 * 3)
        return {
            "images": (patches, np.dtype(np.float32)),
            "shapes": ((2,), np.dtype(np.int32)),
        }


def laid_out(sight: Sight | Budget, grids: Sequence[Grid], first: int = 0) -> np.ndarray:
    """Where the tokens of images one after another come from, their views numbered from `first`."""
    found, views = [np.empty(0, np.int32)], first
    for grid in grids:
        one = sight.layout(grid)
        found.append(np.where(one >= 0, one + views * sight.tokens, one))
        views += sight.num_views(grid)
    return np.concatenate(found)


def budget_size(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """The largest (height, width) in patches' multiples whose patches are within the budget.

    Each side is ceil(side * scale / patch) patches, at least one; the scale is found by the
    published bisection of 1e-6..100 to 1e-5, so that no size differs from the published ones.
    InputError where even one patch a side is too many.
    """
    if max_patches < 1:
        raise InputError(f"a budget of {max_patches} patches holds no image; take at least 1")
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = _sides(height, width, middle, patch)
        low, high = (middle, high) if rows * columns <= max_patches else (low, middle)
    rows, columns = _sides(height, width, low, patch)
    if rows * columns > max_patches:
        raise InputError(f"an image of {height} x {width} pixels: over {max_patches} patches")
    return rows * patch, columns * patch


def _sides(height: int, width: int, scale: float, patch: int) -> tuple[int, int]:
    return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))


class Patches(NamedTuple):
    """A batch under a token budget, as Siglip2 takes it."""

    pixels: np.ndarray
    """float32 [B, max_patches, patch * patch * 3]; a patch runs over row, column, channel."""
    mask: np.ndarray
    """int32 [B, max_patches]: 1 where there is a patch."""
    shapes: np.ndarray
    """int32 [B, 2]: rows and columns of patches."""


def patched(
    images: Sequence[np.ndarray],
    *,
    patch: int = 16,
    max_patches: int = 256,
    method: Method = "bilinear",
    normalization: Normalization = "half",
) -> Patches:
    """Images uint8 [H, W, 3] of any sizes, each resized to the budget, as patches row by row."""
    pixels = np.zeros((len(images), max_patches, patch * patch * 3), np.float32)
    mask = np.zeros((len(images), max_patches), np.int32)
    shapes = np.zeros((len(images), 2), np.int32)
    for number, image in enumerate(map(checked, images)):
        height, width = budget_size(image.shape[0], image.shape[1], patch, max_patches)
        fitted = normalized(resized(image, height, width, method), normalization)
        rows, columns = height // patch, width // patch
        cut = fitted.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
        pixels[number, : rows * columns] = cut.reshape(rows * columns, -1)
        mask[number, : rows * columns] = 1
        shapes[number] = rows, columns
    return Patches(pixels, mask, shapes)


def views_of(
    pictures: Sequence[np.ndarray],
    sight: Sight | Budget,
    way: Normalization,
    *,
    max_tiles: int = MAX_TILES,
    num_images: int | None = None,
    frames: bool = False,
    method: Method | None = None,
) -> tuple[np.ndarray, list[Grid]]:
    """Pictures uint8 [H, W, 3] as views [N, ...], one's after another's, and each one's grid.

    Views are uint8 squares, or patches, float32 and normalized. `num_images` are in the prompt, if
    there are more than these; a film's `frames` are not cut into tiles. `method` is how pictures,
    or the small ones of canvases, are resized; None: as published, cubically, small ones linearly.
    """
    if isinstance(sight, Budget):
        patch, most = sight.patch, sight.max_patches
        made = patched(pictures, patch=patch, max_patches=most, normalization=way)
        return made.pixels, [(wide, high) for high, wide in made.shapes.tolist()]
    size, grids = sight.size, [(1, 1)] * len(pictures)
    if sight.side is None:
        first = "bicubic" if sight.small else method or "bicubic"
        fit = ImageTransform(size=size, fit="pad", normalization=way, method=first)
        views = [FITS["pad"](checked(picture), fit)[None] for picture in pictures]
        if (small := sight.small) is not None:
            again = method or "bilinear"
            views = [canvas(x, resized(x[0], small, small, again)[None]) for x in views]
    elif frames:
        color, grids = mean_color(way), [(0, 0)] * len(pictures)
        views = [letterbox(checked(picture), size, size, color)[None] for picture in pictures]
    else:
        count = len(pictures) if num_images is None else num_images
        cut = [
            tiled(x, num_images=count, tile=size, max_tiles=max_tiles, normalization=way)
            for x in pictures
        ]
        views, grids = [one.views for one in cut], [one.grid for one in cut]
    return np.concatenate([np.empty((0, *sight.shapes["images"][0]), np.uint8), *views]), grids


def canvas(large: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Squares [N, H, H, C] and smaller ones [N, S, S, C] as one array [N, H + S, H, C].

    The small one lies below, at the left; beside it are zeros.
    """
    beside = ((0, 0), (0, 0), (0, large.shape[2] - small.shape[2]), (0, 0))
    return np.concatenate([large, np.pad(small, beside)], axis=1)
