"""Augmentation: a pure function of (seed, row), within bounds, with Pillow's enhancements."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import augment
from deepseek_jax.data.augment import Augmentation, augmented, color_jitter

EVERYTHING = Augmentation(min_area=0.2, brightness=0.4, contrast=0.4, saturation=0.4)


def _image(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def test_a_view_depends_on_seed_and_row_alone():
    views = {row: augmented(_image(), 7, row, 16, EVERYTHING) for row in range(50)}
    for row in reversed(range(50)):
        np.testing.assert_array_equal(views[row], augmented(_image(), 7, row, 16, EVERYTHING))
    distinct = {view.tobytes() for view in views.values()}
    assert len(distinct) == 50
    assert augmented(_image(), 8, 3, 16, EVERYTHING).tobytes() not in distinct
    assert views[0].shape == (16, 16, 3) and views[0].dtype == np.uint8


def test_crops_keep_to_their_bounds():
    config, image = Augmentation(min_area=0.25, max_stretch=1.5), _image(200, 200)
    high, wide, _ = np.array(
        [augment.random_crop(image, 0, row, config).shape for row in range(400)]
    ).T
    shares = high * wide / 200**2
    assert 0.24 < shares.min() < 0.3 and 0.9 < shares.max() <= 1
    assert 0.66 <= (wide / high).min() < 0.72 and 1.4 < (wide / high).max() <= 1.51
    assert abs(np.log(wide / high).mean()) < 0.05
    whole = augment.random_crop(_image(), 0, 0, Augmentation(min_area=1, max_stretch=1))
    assert whole.shape[0] == 40  # a square of the whole area does not fit: the height is kept


def test_flips():
    image = _image()
    flipped = [
        augment.random_flip(image, 0, row, Augmentation(flip=0.3))[0, 0].tolist()
        == image[0, -1].tolist()
        for row in range(500)
    ]
    assert 0.24 < np.mean(flipped) < 0.36
    mirrored = augment.random_flip(image, 0, 0, Augmentation(flip=1))
    np.testing.assert_array_equal(mirrored, image[:, ::-1])


@pytest.mark.parametrize(
    ("field", "place", "enhance"),
    [
        ("brightness", 0, ImageEnhance.Brightness),
        ("contrast", 1, ImageEnhance.Contrast),
        ("saturation", 2, ImageEnhance.Color),
    ],
)
def test_colors_are_pillows(field, place, enhance):
    for row in range(5):
        factor = 1 + 0.5 * augment.generator(3, row, "color").uniform(-1, 1, 3)[place]
        theirs = np.asarray(enhance(Image.fromarray(_image())).enhance(factor)).astype(int)
        ours = color_jitter(_image(), 3, row, Augmentation(**{field: 0.5})).astype(int)
        assert np.abs(ours - theirs).max() <= 1  # Pillow cuts where we round


def test_one_pixel_and_bad_input():
    assert augmented(_image(1, 1), 0, 0, 8, EVERYTHING).shape == (8, 8, 3)
    for bad in (np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))):
        with pytest.raises(InputError, match=r"an image of .* \(4, 4.*\): give uint8"):
            augmented(bad, 0, 0, 8, EVERYTHING)
    with pytest.raises(ValueError, match="min_area above 0"):
        Augmentation(min_area=0)
