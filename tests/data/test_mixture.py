"""Mixtures: shares follow the weights, counts stay exact, and rows depend on their number only."""

import numpy as np
import pytest

from deepseek_jax.data.packing import CHUNK, Mixed
from deepseek_jax.data.sources import Mixture, Part, StandardLibrary

LIBRARY = StandardLibrary()


def _mixed(*parts: Part, seed: int = 0) -> Mixed:
    return Mixed([None] * len(parts), parts, seed)


def test_shares_follow_the_weights():
    mixed = _mixed(*(Part(source=LIBRARY, weight=w) for w in (1, 0, 3)))
    part, _ = mixed.origin(np.arange(40_000))
    shares = np.bincount(part, minlength=3) / len(part)
    np.testing.assert_allclose(shares, [0.25, 0, 0.75], atol=0.01)


def test_shares_follow_a_schedule():
    moving = Part(source=LIBRARY, schedule=((10_000, 0.0), (30_000, 1.0)))
    part, _ = _mixed(moving, Part(source=LIBRARY, schedule=((0, 1.0),))).origin(np.arange(60_000))
    assert (part[:10_000] == 1).all()
    middle = np.mean(part[19_000:21_000] == 0)  # weights 0.5 and 1
    assert abs(middle - 1 / 3) < 0.04
    assert abs(np.mean(part[30_000:] == 0) - 0.5) < 0.02


def test_a_part_gives_its_rows_in_order_across_chunks():
    mixed = _mixed(Part(source=LIBRARY, weight=2), Part(source=LIBRARY))
    numbers = np.arange(2 * CHUNK + 100)
    part, row = mixed.origin(numbers)
    for which in (0, 1):
        np.testing.assert_array_equal(row[part == which], np.arange(np.sum(part == which)))
    late = np.array([CHUNK - 1, CHUNK, 2 * CHUNK + 7])
    fresh = _mixed(Part(source=LIBRARY, weight=2), Part(source=LIBRARY)).origin(late)
    np.testing.assert_array_equal(fresh, (part[late], row[late]))


def test_seeds_draw_differently():
    parts = (Part(source=LIBRARY), Part(source=LIBRARY))
    draws = [_mixed(*parts, seed=seed).origin(np.arange(100))[0] for seed in (0, 1)]
    assert (draws[0] != draws[1]).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mixture(parts=()),
        lambda: Mixture(parts=(Part(source=LIBRARY, weight=0.0),)),
        lambda: Mixture(parts=(Part(source=LIBRARY, schedule=((0, 1.0), (9, 0.0))),)),
        lambda: Part(source=LIBRARY, weight=-1.0),
        lambda: Part(source=LIBRARY, weight=float("nan")),
        lambda: Part(source=LIBRARY, schedule=((5, 1.0), (5, 2.0))),
    ],
)
def test_impossible_weights_are_refused(make):
    with pytest.raises(ValueError, match=r"weights|ascend"):
        make()
