"""What the media of a row become for a model: views or patches, windows, and their tokens' places.

Features of a row are the tokens of all the views that it has room for, then those of its windows of
sound (models/vision_language): a token's source is its number among them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audio import Windows
from deepseek_jax.data.packing import Batch
from deepseek_jax.data.tiles import MAX_TILES, Budget, Shape, Sight, laid_out, views_of
from deepseek_jax.data.vision import Normalization


class Senses(NamedTuple):
    """How a model takes media in, and the room that a row has for them."""

    sight: Sight | Budget
    ear: Windows | None
    """None: the model hears nothing."""
    views: int
    """Of every row, used or not."""
    windows: int
    """Likewise, of sound; 0: a batch has no sounds."""
    normalization: Normalization

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of a row's arrays, their dtypes beside: `images`, of patches `shapes`, and `sounds`."""
        found = {name: ((self.views, *s), kind) for name, (s, kind) in self.sight.shapes.items()}
        if self.ear and self.windows:
            found["sounds"] = ((self.windows, self.ear.size), np.dtype(np.float32))
        return found

    def nothing(self) -> Batch:
        """The arrays of a row without media."""
        return {name: np.zeros(*shape) for name, shape in self.shapes.items()}

    def check(self, kinds: Sequence[str], frames: int) -> None:
        """InputError where a row cannot have media of these kinds, films being so many frames."""
        images, films = kinds.count("image"), kinds.count("video")
        if "audio" in kinds and self.ear is None:
            raise InputError("there is a sound, and this model has no ear: its model.audio is None")
        if films and not frames:
            raise InputError("there is a film, and data.frames is 0")
        if images * self.sight.num_views() + films * frames > self.views:
            more = f" and {films} films of {frames} frames" if films else ""
            raise InputError(f"{images} images{more}, and data.views is {self.views}")
        if kinds.count("audio") > self.windows:
            raise InputError(f"{kinds.count('audio')} sounds, and data.windows is {self.windows}")

    def taken(self, media: Sequence[tuple[str, np.ndarray]]) -> tuple[Batch, list[np.ndarray]]:
        """A row's arrays, and where the tokens of each medium come from.

        `media` are ("image", uint8 [H, W, 3]), ("video", uint8 [T, H, W, 3]) or ("audio", a wave
        [T] at the ear's rate), which `check` has seen. InputError where a sound is too long.
        """
        found, places = self.nothing(), []
        pictures = sum(kind == "image" for kind, _ in media)
        frames = sum(len(medium) for kind, medium in media if kind == "video")
        tiles = min(MAX_TILES, (self.views - frames) // max(1, pictures) - 1)
        seen = heard = 0
        for kind, medium in media:
            if kind == "audio":
                layout, heard = self._heard(medium, found, heard)
                places.append(layout)
                continue
            views, grids = views_of(
                [*medium] if kind == "video" else [medium], self.sight, self.normalization,
                max_tiles=tiles, num_images=pictures, frames=kind == "video",
            )  # fmt: skip
            places.append(laid_out(self.sight, grids, seen))
            end = seen + len(views)
            found["images"][seen:end] = views
            if isinstance(self.sight, Budget):
                found["shapes"][seen:end] = [(high, wide) for wide, high in grids]
            seen = end
        return found, places

    def _heard(self, wave: np.ndarray, found: Batch, first: int) -> tuple[np.ndarray, int]:
        """A sound's layout when its windows stand from `first` on, and where they end."""
        assert self.ear is not None  # `check` has looked
        cut = self.ear.cut(wave)
        if (end := first + len(cut)) > self.windows:
            raise InputError(f"{end} windows of sound, and data.windows is {self.windows}")
        found["sounds"][first:end] = cut
        before = self.views * self.sight.tokens + first * self.ear.tokens
        return before + self.ear.layout(len(wave)), end
