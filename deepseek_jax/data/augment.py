"""Random views of images: crops, mirroring and colors, each a pure function of (seed, row).

Pixels are NumPy uint8 [H, W, 3]. What is drawn for row i depends on the seed and i alone, not on
the rows before it or on who decodes it: a run resumes to the bit on any number of workers.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.vision import Method, checked, resized

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # how bright the eye sees each channel (BT.601)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far a view may stray from its image; the defaults change nothing but crop and mirror."""

    min_area: float = 0.5
    """The smallest share of the image that a crop keeps; 1 for none."""
    max_stretch: float = 4 / 3
    """How much wider or higher than square a crop may be before it is resized."""
    flip: float = 0.5
    """How often the image is mirrored; 0 where left and right have a meaning."""
    brightness: float = 0.0
    """Multiplies the pixels by 1 - brightness .. 1 + brightness."""
    contrast: float = 0.0
    """Multiplies their distance from the image's mean gray, likewise."""
    saturation: float = 0.0
    """Multiplies their distance from their own gray, likewise."""

    def __post_init__(self):
        shares = (self.flip, self.brightness, self.contrast, self.saturation)
        if not (0 < self.min_area <= 1 <= self.max_stretch and all(0 <= x <= 1 for x in shares)):
            raise ValueError(
                "An augmentation's shares lie in 0..1, min_area above 0; stretch >= 1."
            )


def generator(seed: int, row: int, purpose: str) -> np.random.Generator:
    """Random numbers that belong to (seed, row) and are independent between purposes."""
    return np.random.default_rng([seed, row, *purpose.encode()])


def random_crop(pixels: np.ndarray, seed: int, row: int, config: Augmentation) -> np.ndarray:
    """A random part of the image.

    Its share of the area is uniform in min_area..1, its width by its height log-uniform in
    1 / max_stretch .. max_stretch, both as far as they fit (Inception's crop; Szegedy et al. 2015).
    """
    height, width = pixels.shape[:2]
    draw = generator(seed, row, "crop")
    area = height * width * draw.uniform(config.min_area, 1)
    reach = math.log(config.max_stretch)
    ratio = math.exp(draw.uniform(-reach, reach))
    high = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = draw.integers(height - high + 1), draw.integers(width - wide + 1)
    return pixels[top : top + high, left : left + wide]


def random_flip(pixels: np.ndarray, seed: int, row: int, config: Augmentation) -> np.ndarray:
    """The image, mirrored left to right with probability `flip`."""
    mirrored = generator(seed, row, "flip").random() < config.flip
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels


def color_jitter(pixels: np.ndarray, seed: int, row: int, config: Augmentation) -> np.ndarray:
    """The image with another brightness, contrast and saturation, in this order, uint8."""
    draw = generator(seed, row, "color")
    reach = np.array([config.brightness, config.contrast, config.saturation])
    if not reach.any():
        return pixels
    brighter, harder, richer = 1 + reach * draw.uniform(-1, 1, 3)
    values = (pixels * np.float32(brighter)).clip(0, 255)
    gray = (values @ LUMA).mean()
    values = ((values - gray) * np.float32(harder) + gray).clip(0, 255)
    own = (values @ LUMA)[..., None]
    values = ((values - own) * np.float32(richer) + own).clip(0, 255)
    return values.round().astype(np.uint8)


def varied(
    pictures: Sequence[np.ndarray], seed: int, row: int, config: Augmentation
) -> list[np.ndarray]:
    """A row's pictures, each cropped, mirrored and colored as that row is; of any sizes."""
    for change in (random_crop, random_flip, color_jitter):
        pictures = [change(pixels, seed, row, config) for pixels in pictures]
    return [*pictures]


def augmented(
    pixels: np.ndarray,
    seed: int,
    row: int,
    size: int,
    config: Augmentation,
    method: Method = "bicubic",
) -> np.ndarray:
    """Row `row`'s view of the image, uint8 [size, size, 3]: crop, mirror, colors."""
    view = resized(random_crop(checked(pixels), seed, row, config), size, size, method)
    return color_jitter(random_flip(view, seed, row, config), seed, row, config)
