"""Vision-language decoders: what an image encoder sees stands among the tokens of a row.

An encoder's features pass a projector and replace the embeddings of the tokens that stand for an
image; the decoder is as it is for text. DeepSeek-VL (arXiv 2403.05525) and Janus's understanding
(2410.13848) take a plain MLP; DeepSeek-VL2 (2412.10302) joins 2 x 2 features and lays tiles out as
lines with newlines. Images are Float[Array, "B M H W C"]: M views a row, of which a row need not
use all. Left out: multi-token prediction, whose layers would have to see images too.
"""

import dataclasses
import math
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.core.precision import Precision
from deepseek_jax.data.tiles import TEXT, Sight, tile_side
from deepseek_jax.layers.block import Remat
from deepseek_jax.layers.encoder import ACTIVATIONS, Activation, learned
from deepseek_jax.layers.linear import Dtypes, Projection
from deepseek_jax.layers.moe import MoE
from deepseek_jax.models.build import (
    Model,
    Network,
    build,
    declarations,
    dtypes_of,
    without_capacity,
)
from deepseek_jax.models.decoder import Decoder, LanguageDecoder, Output, sees_all
from deepseek_jax.models.vit import VisionTransformer, ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPProjector:
    """Each feature on its own: linear layers to the decoder's width, activations between."""

    depth: int = 2
    activation: Activation = "gelu"

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"projector.depth is {self.depth}; it must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownsampleProjector:
    """Squares of `factor` x `factor` features joined, then an MLP: DeepSeek-VL2.

    Sides are filled up with zeros. An image's tokens are lines with a learned newline after each:
    the whole image, a learned separator, the tiles (`data.tiles.token_layout`).
    """

    factor: int = 2
    depth: int = 2
    ratio: int = 1
    """Width between the layers, in the decoder's."""
    activation: Activation = "gelu"

    def __post_init__(self):
        if self.factor < 1 or self.depth < 2 or self.ratio < 1:
            raise ValueError(
                f"projector.factor ({self.factor}) and ratio ({self.ratio}) must be at least 1, "
                f"depth ({self.depth}) at least 2."
            )


Projector: TypeAlias = MLPProjector | DownsampleProjector


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguage:
    """A decoder that sees images."""

    language: Decoder
    vision: ViT
    projector: Projector = MLPProjector()
    image_id: int | None = None
    """The token that stands, as often as needed, for an image; None: the tokenizer knows it."""
    whole_images: bool = False
    """Tokens of one image see each other both ways (images that touch count as one); all else stays
    causal, as everything does in the published models."""
    init_scale: float = 0.02

    def __post_init__(self):
        if self.language.num_mtp_layers:
            raise ValueError("language.num_mtp_layers must be 0: those layers do not see images.")
        if self.image_id is not None and not 0 <= self.image_id < self.vocab_size:
            raise ValueError(
                f"image_id is {self.image_id}; it must lie in the vocabulary of {self.vocab_size}."
            )
        attention = self.language.attention
        if self.whole_images and (not sees_all(attention) or getattr(attention, "window", None)):
            raise ValueError("whole_images needs a language.attention that leaves out nothing.")
        if isinstance(self.projector, DownsampleProjector) and self.grid[0] != self.grid[1]:
            raise ValueError(
                f"vision's grid is {self.grid}; a DownsampleProjector takes square views."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a view's features."""
        return self.vision.grid

    @property
    def view_tokens(self) -> int:
        """Tokens of one view, newlines left out."""
        if isinstance(self.projector, MLPProjector):
            return math.prod(self.grid)
        return self.side**2

    @property
    def side(self) -> int:
        """Tokens along a joined view's side."""
        assert isinstance(self.projector, DownsampleProjector)
        return tile_side(self.vision.image_size[0], self.vision.patch_size, self.projector.factor)

    @property
    def sight(self) -> Sight:
        """How images are taken in."""
        side = self.side if isinstance(self.projector, DownsampleProjector) else None
        return Sight(self.vision.image_size[0], self.view_tokens, side)

    def layout(self, grid: tuple[int, int] = (1, 1)) -> np.ndarray:
        """`sources` of one image's tokens, its views numbered from 0.

        With a DownsampleProjector an image is the whole and `grid` (wide, high) tiles; else a view.
        """
        return self.sight.layout(grid)

    def num_views(self, grid: tuple[int, int] = (1, 1)) -> int:
        """Views of one image."""
        return self.sight.num_views(grid)

    @property
    def num_layers(self) -> int:
        """Of both parts."""
        return self.vision.transformer.num_layers + self.language.num_layers

    @property
    def moe(self) -> MoE | None:
        """The decoder's mixture of experts."""
        return self.language.moe

    @property
    def remat(self) -> Remat:
        """The decoder's."""
        return self.language.remat

    @property
    def vocab_size(self) -> int:
        """Tokens that the decoder knows."""
        return self.language.vocab_size


def joined(x: Float[Array, "B T D"], grid: tuple[int, int], factor: int) -> Float[Array, "B U E"]:
    """Squares of features as one vector each, in reading order.

    Sides are filled with zeros, below and right. A vector runs over channels, then rows and columns
    of its square (torch's unfold).
    """
    (rows, columns), width = grid, x.shape[-1]
    x = x.reshape(-1, rows, columns, width)
    x = jnp.pad(x, ((0, 0), (0, -rows % factor), (0, -columns % factor), (0, 0)))
    high, wide = x.shape[1] // factor, x.shape[2] // factor
    x = x.reshape(-1, high, factor, wide, factor, width).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(-1, high * wide, width * factor**2)


class Aligner(nn.Module):
    """A projector as a module: a view's features [B, T, D] as tokens of the decoder."""

    config: Projector
    grid: tuple[int, int]
    embed_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B U E"]:
        c, inner = self.config, self.embed_dim
        if isinstance(c, DownsampleProjector):
            x, inner = joined(x, self.grid, c.factor), self.embed_dim * c.ratio
        for number in range(1, c.depth + 1):
            last = number == c.depth
            shape = (x.shape[-1], self.embed_dim if last else inner)
            axes = ("mlp", "embed") if last and number > 1 else ("embed", "mlp")
            name = f"linear_{number}"
            x = Projection("btd,de->bte", shape, axes, self.dtypes, bias=True, name=name)(x)
            x = x if last else ACTIVATIONS[c.activation](x)
        return x


def image_ends(sources: Int[Array, "B T"], segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Where in the row the last token of each token's image stands; of text its own place."""
    length = sources.shape[1]
    image = sources > TEXT
    goes_on = image[:, :-1] & image[:, 1:]
    if segments is not None:
        goes_on &= segments[:, :-1] == segments[:, 1:]
    goes_on = jnp.pad(goes_on, ((0, 0), (0, 1)))
    ends = jnp.where(goes_on, length, jnp.arange(length)[None])
    return jax.lax.cummin(ends, axis=1, reverse=True)


class VisionLanguageDecoder(nn.Module):
    """Encoder, projector and decoder as a module."""

    config: VisionLanguage
    dtypes: Dtypes

    def setup(self):
        c, width = self.config, self.config.language.embed_dim
        self.language = LanguageDecoder(c.language, self.dtypes)
        self.vision = VisionTransformer(c.vision, self.dtypes)
        self.projector = Aligner(c.projector, c.grid, width, self.dtypes)
        if isinstance(c.projector, DownsampleProjector):
            self.image_newline = learned(self, "image_newline", (width,))
            self.view_separator = learned(self, "view_separator", (width,))

    def features(self, images: Float[Array, "B M H W C"]) -> Float[Array, "B F D"]:
        """What tokens of a row may stand for: its views' tokens, one view after another.

        Behind them, where the projector has them, the separator and the newline: `sources` finds
        these from the end.
        """
        rows = images.shape[0]
        seen = self.vision(images.reshape(-1, *images.shape[2:])).hidden
        found = self.projector(seen[:, self.config.vision.leading :])
        found = found.reshape(rows, -1, found.shape[-1])
        if not isinstance(self.config.projector, DownsampleProjector):
            return found
        more = jnp.stack([self.view_separator, self.image_newline]).astype(found.dtype)
        more = jnp.broadcast_to(more[None], (rows, *more.shape))
        return jnp.concatenate([found, more], axis=1)

    def _mixed(self, tokens: Array, features: Array | None, sources: Array | None) -> Array:
        """Embeddings of a row: each from where `sources` says."""
        x = self.language.embed(tokens)
        if features is None and sources is None:
            return x
        if features is None or sources is None:
            raise ValueError("images (or features) and sources come together, or not at all")
        index = sources[..., None] % features.shape[1]
        found = jnp.take_along_axis(features.astype(x.dtype), index, axis=1)
        return jnp.where(sources[..., None] > TEXT, found, x)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B M H W C"] | None = None,
        sources: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Output:
        features = None if images is None else self.features(images)
        x = self._mixed(tokens, features, sources)
        reach = None
        if self.config.whole_images and sources is not None:
            reach = image_ends(sources, segments)
        output = self.language(tokens, segments, positions, embedded=x, reach=reach)
        routing, selection = (
            {f"language/{path}": found for path, found in reports.items()}
            for reports in (output.routing, output.selection)
        )
        return output._replace(routing=routing, selection=selection)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        caches: tuple,
        positions: Int[Array, "B T"],
        features: Float[Array, "B F D"] | None = None,
        sources: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple]:
        """As `LanguageDecoder.decode`; whole images must come in one call."""
        x = self._mixed(tokens, features, sources)
        reach = None
        if self.config.whole_images and sources is not None:
            reach = jnp.take_along_axis(positions, image_ends(sources, None), axis=1)
        return self.language.decode(tokens, caches, positions, x, reach)


@dataclasses.dataclass(frozen=True)
class VisionLanguageModel(Network):
    """A decoder that sees images, as functions.

    `sources` says of each token of a row where its embedding comes from: a number of the row's
    features (its views' tokens, `view_tokens` each, one view after another), NEWLINE, SEPARATOR,
    or TEXT: the token itself. Views that no token of the row stands for change nothing.
    """

    config: VisionLanguage
    module: VisionLanguageDecoder
    language: Model
    """The decoder alone; its parameters lie under `language`."""

    def apply(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        *,
        images: Float[Array, "B M H W C"] | None = None,
        sources: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        drop: bool = True,
    ) -> Output:
        """Final hidden states and reports, as of `Model.apply`."""
        module = self.module if drop else self._dropless
        return module.apply({"params": params}, tokens, images, sources, segments, positions)

    @property
    def _dropless(self) -> VisionLanguageDecoder:
        language = without_capacity(self.config.language)
        if language is self.config.language:
            return self.module
        config = dataclasses.replace(self.config, language=language)
        return VisionLanguageDecoder(config, self.dtypes)

    def features(self, params: Any, images: Float[Array, "B M H W C"]) -> Float[Array, "B F D"]:
        """What tokens of each row may stand for, to be given to `decode`."""
        return self.module.apply({"params": params}, images, method="features")

    def head(self, params: Any) -> Float[Array, "D V"]:
        """The output projection as it is stored."""
        return self.language.head(params["language"])

    def logits(self, params: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of final hidden states."""
        return self.language.logits(params["language"], hidden)

    def init_cache(self, batch_size: int, length: int) -> tuple:
        """An empty cache for `length` positions a row, images' tokens counted."""
        return self.language.init_cache(batch_size, length)

    def decode(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        cache: tuple,
        positions: Int[Array, "B T"],
        *,
        features: Float[Array, "B F D"] | None = None,
        sources: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], tuple]:
        """As `Model.decode`; with `whole_images` all of an image's tokens come in one call."""
        hidden, cache = self._dropless.apply(
            {"params": params}, tokens, cache, positions, features, sources, method="decode"
        )
        return self.logits(params, hidden), cache


def build_vision_language(
    config: VisionLanguage, precision: Precision = Precision()
) -> VisionLanguageModel:
    """The model of a config: no parameters are made, only their shapes."""
    dtypes = dtypes_of(precision)
    module = VisionLanguageDecoder(config, dtypes)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    view = (1, 1, *config.vision.image_size, config.vision.num_channels)
    images = jax.ShapeDtypeStruct(view, jnp.float32)
    declared = declarations(module, tokens=tokens, images=images, sources=tokens)
    return VisionLanguageModel(config, dtypes, declared, module, build(config.language, precision))
