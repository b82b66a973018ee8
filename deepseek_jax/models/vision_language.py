"""Vision-language decoders: what encoders see and hear stands among the tokens of a row.

An encoder's features pass a projector and replace the embeddings of the tokens that stand for an
image or a sound; the decoder is as it is for text. DeepSeek-VL (arXiv 2403.05525; of the 7B two
encoders see, models/hybrid) and Janus's understanding (2410.13848) take a plain MLP; DeepSeek-VL2
(2412.10302) joins 2 x 2 features and lays tiles out as lines with newlines. Images are
Float[Array, "B M H W C"]: M views a row, of which a row need not use all; a NaFlex's are patches,
"B M T X". A video is its frames, a view each. Sounds are waves, "B A S". Left out: multi-token
prediction, whose layers would have to see images too.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.core.precision import Precision
from deepseek_jax.data.audio import Windows
from deepseek_jax.data.tiles import TEXT, Budget, Sight, tile_side
from deepseek_jax.layers.block import Remat
from deepseek_jax.layers.encoder import Transformer, learned
from deepseek_jax.layers.linear import Dtypes
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
from deepseek_jax.models.ear import Ear, Hearing
from deepseek_jax.models.hybrid import Hybrid, HybridTransformer
from deepseek_jax.models.naflex import NaFlex, NaFlexTransformer
from deepseek_jax.models.prefix import Prefix, reach_of
from deepseek_jax.models.projectors import (
    Aligner,
    DownsampleProjector,
    MLPProjector,
    Projector,
    Resampler,
    SplitProjector,
)
from deepseek_jax.models.vit import VisionTransformer, ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguage:
    """A decoder that sees images and, with `audio`, hears."""

    language: Decoder
    vision: ViT | NaFlex | Hybrid
    projector: Projector = MLPProjector()
    audio: Ear | None = None
    max_patches: int = 256
    """Patches that a NaFlex's view has room for."""
    image_id: int | None = None
    """The token that stands, as often as needed, for an image; None: the tokenizer knows it."""
    prefix: Prefix = "causal"
    """What sees itself both ways: nothing (the published models); each image or sound (what touches
    counts as one); of rows with an image or sound all before the first answer (PaliGemma)."""
    init_scale: float = 0.02

    def __post_init__(self):
        if self.language.num_mtp_layers:
            raise ValueError("language.num_mtp_layers must be 0: those layers do not see images.")
        ids = {"image_id": self.image_id, "audio.audio_id": self.audio and self.audio.audio_id}
        for name, number in ids.items():
            if number is not None and not 0 <= number < self.vocab_size:
                raise ValueError(
                    f"{name} is {number}; it must lie in the vocabulary of {self.vocab_size}."
                )
        if self.image_id is not None and self.image_id == ids["audio.audio_id"]:
            raise ValueError(f"image_id and audio.audio_id are both {self.image_id}.")
        attention = self.language.attention
        narrow = not sees_all(attention) or getattr(attention, "window", None)
        if self.prefix != "causal" and narrow:
            why = "needs a language.attention that leaves out nothing."
            raise ValueError(f"prefix {self.prefix!r} {why}")
        takes_two = isinstance(self.vision, Hybrid) and self.language.embed_dim % 2 == 0
        if isinstance(self.projector, SplitProjector) and not takes_two:
            raise ValueError("a SplitProjector needs a Hybrid, and an even language.embed_dim.")
        square = isinstance(self.vision, ViT) and len({*self.vision.grid}) == 1
        if isinstance(self.projector, DownsampleProjector) and not square:
            raise ValueError("a DownsampleProjector takes a ViT's square views.")
        if self.max_patches < 1:
            raise ValueError(f"max_patches is {self.max_patches}; it must be at least 1.")
        width = self.language.embed_dim
        for projector in (self.projector, self.audio and self.audio.projector):
            if isinstance(projector, Resampler) and width % projector.num_heads:
                raise ValueError(
                    f"language.embed_dim ({width}) must be a multiple of the Resampler's num_heads "
                    f"({projector.num_heads})."
                )

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of a view's features; None: each image has its own."""
        return None if isinstance(self.vision, NaFlex) else self.vision.grid

    @property
    def view_tokens(self) -> int:
        """Tokens that a view has room for, newlines left out."""
        if isinstance(self.projector, Resampler):
            return self.projector.num_tokens
        if isinstance(self.projector, DownsampleProjector):
            return self.side**2
        return math.prod(self.grid or (self.max_patches,))

    @property
    def view_shape(self) -> tuple[int, ...]:
        """Of one view in `images`: height, width, channels, or a NaFlex's patches, their values."""
        if isinstance(self.vision, NaFlex):
            return self.max_patches, self.vision.patch_dim
        if isinstance(self.vision, Hybrid):
            return self.vision.view_shape
        return *self.vision.image_size, self.vision.num_channels

    @property
    def side(self) -> int:
        """Tokens along a joined view's side."""
        assert isinstance(self.projector, DownsampleProjector) and isinstance(self.vision, ViT)
        return tile_side(self.vision.image_size[0], self.vision.patch_size, self.projector.factor)

    @property
    def sight(self) -> Sight | Budget:
        """How images are taken in, and laid out as tokens."""
        if isinstance(self.vision, NaFlex):
            each = isinstance(self.projector, MLPProjector)
            return Budget(self.vision.patch_size, self.max_patches, self.view_tokens, each)
        if isinstance(self.vision, Hybrid):
            return Sight(self.vision.sizes[0], self.view_tokens, small=self.vision.sizes[1])
        side = self.side if isinstance(self.projector, DownsampleProjector) else None
        return Sight(self.vision.image_size[0], self.view_tokens, side)

    @property
    def hearing(self) -> Windows | None:
        """How sounds are taken in; None: not at all."""
        return self.audio.windows if self.audio else None

    @property
    def num_layers(self) -> int:
        """Of all parts."""
        heard = (self.audio.encoder.transformer,) if self.audio else ()
        return sum(t.num_layers for t in (*self.transformers, *heard)) + self.language.num_layers

    @property
    def transformers(self) -> tuple[Transformer, ...]:
        """Those that see."""
        own = self.vision
        return own.transformers if isinstance(own, Hybrid) else (own.transformer,)

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

    def at_size(self, size: int | None) -> "VisionLanguage":
        """The same weights, views (a NaFlex's largest squares) of this side. Or a ValueError."""
        if size is None or (size, size) == self.view_shape[:2]:
            return self
        if isinstance(self.vision, NaFlex):
            if size < 1 or size % (patch := self.vision.patch_size):
                raise ValueError(f"views of size {size}: a NaFlex takes whole patches of {patch}")
            return dataclasses.replace(self, max_patches=(size // patch) ** 2)
        if isinstance(self.vision, Hybrid) or isinstance(self.projector, DownsampleProjector):
            raise ValueError(f"views of size {size}: this model's are laid out for one size")
        return dataclasses.replace(self, vision=self.vision.at_size(size))


ENCODERS = {ViT: VisionTransformer, NaFlex: NaFlexTransformer, Hybrid: HybridTransformer}


class VisionLanguageDecoder(nn.Module):
    """Encoders, projectors and decoder as a module."""

    config: VisionLanguage
    dtypes: Dtypes

    def setup(self):
        c, width = self.config, self.config.language.embed_dim
        self.language = LanguageDecoder(c.language, self.dtypes)
        self.vision = ENCODERS[type(c.vision)](c.vision, self.dtypes)
        first = c.vision.widths[0] if isinstance(c.vision, Hybrid) else None
        self.projector = Aligner(c.projector, c.grid, width, self.dtypes, first)
        if c.audio:
            self.audio = Hearing(c.audio, width, self.dtypes)
        if isinstance(c.projector, DownsampleProjector):
            self.image_newline = learned(self, "image_newline", (width,))
            self.view_separator = learned(self, "view_separator", (width,))

    def features(
        self,
        images: Float[Array, "B M ..."] | None = None,
        shapes: Int[Array, "B M 2"] | None = None,
        sounds: Float[Array, "B A S"] | None = None,
    ) -> Float[Array, "B F D"]:
        """What tokens of a row may stand for: its views' tokens, then its windows of sound's.

        Behind them, where the projector has them, the separator and the newline: `sources` finds
        these from the end.
        """
        parts = [] if images is None else [self._seen(images, shapes)]
        if sounds is not None and self.config.audio is None:
            raise ValueError("this model takes no audio: its config has none")
        parts += [] if sounds is None else [self.audio(sounds)]
        rows, dtype = len(parts[0]), parts[0].dtype
        parts = [part.reshape(rows, -1, part.shape[-1]) for part in parts]
        if isinstance(self.config.projector, DownsampleProjector):
            more = jnp.stack([self.view_separator, self.image_newline]).astype(dtype)
            parts.append(jnp.broadcast_to(more[None], (rows, *more.shape)))
        return jnp.concatenate(parts, axis=1)

    def _seen(self, images: Array, shapes: Array | None) -> Float[Array, "B M U D"]:
        """Each view's tokens."""
        c, lead = self.config, images.shape[:2]
        if c.grid is None and images.shape[2:] != c.view_shape:
            raise ValueError(f"a view is {images.shape[2:]}, and this model's {c.view_shape}")
        if (shapes is None) == isinstance(c.vision, NaFlex):
            raise ValueError("a NaFlex's images, and no others, come with shapes")
        images, mask = images.reshape(-1, *images.shape[2:]), None
        if shapes is None:
            seen = self.vision(images).hidden
            seen = seen[:, c.vision.leading :] if isinstance(c.vision, ViT) else seen
        else:
            shapes = jnp.maximum(shapes.reshape(-1, 2), 1)  # views that no row uses may have none
            mask = jnp.arange(c.max_patches)[None] < shapes.prod(1)[:, None]
            seen = self.vision(images, mask, shapes).hidden
        found = self.projector(seen, mask)
        return found.reshape(*lead, *found.shape[1:])

    def _mixed(self, tokens: Array, features: Array | None, sources: Array | None) -> Array:
        """Embeddings of a row: each from where `sources` says."""
        x = self.language.embed(tokens)
        if features is None and sources is None:
            return x
        if features is None or sources is None:
            raise ValueError(
                "images, sounds (or features) and sources come together, or not at all"
            )
        index = sources[..., None] % features.shape[1]
        found = jnp.take_along_axis(features.astype(x.dtype), index, axis=1)
        return jnp.where(sources[..., None] > TEXT, found, x)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B M ..."] | None = None,
        sources: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        shapes: Int[Array, "B M 2"] | None = None,
        sounds: Float[Array, "B A S"] | None = None,
        learned: Bool[Array, "B T"] | None = None,
    ) -> Output:
        nothing = images is None and sounds is None
        features = None if nothing else self.features(images, shapes, sounds)
        x = self._mixed(tokens, features, sources)
        reach = reach_of(self.config.prefix, sources, segments, learned)
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
        learned: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple]:
        """As `LanguageDecoder.decode`; what sees itself both ways must come in one call."""
        x = self._mixed(tokens, features, sources)
        reach = reach_of(self.config.prefix, sources, jnp.int32(positions >= 0), learned)
        if reach is not None:
            reach = jnp.take_along_axis(positions, reach, axis=1)
        return self.language.decode(tokens, caches, positions, x, reach)


@dataclasses.dataclass(frozen=True)
class VisionLanguageModel(Network):
    """A decoder that sees images and may hear sounds, as functions.

    `sources` says of each token of a row where its embedding comes from: a number of the row's
    features, NEWLINE, SEPARATOR, or TEXT: the token itself. Features are the tokens of its M views,
    `view_tokens` each, one view after another, then those of its A windows of sound, from
    M * view_tokens on, `audio.window_tokens` each. Views and windows that no token of the row
    stands for change nothing. `shapes` are a NaFlex's views' rows and columns of patches.
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
        images: Float[Array, "B M ..."] | None = None,
        shapes: Int[Array, "B M 2"] | None = None,
        sounds: Float[Array, "B A S"] | None = None,
        sources: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        learned: Bool[Array, "B T"] | None = None,
        drop: bool = True,
    ) -> Output:
        """Final hidden states and reports, as of `Model.apply`.

        `learned` says of which tokens the follower is an answer's; the first of them ends what is
        asked (`prefix`), and without it all is.
        """
        module = self.module if drop else self._dropless
        given = images, sources, segments, positions, shapes, sounds, learned
        return module.apply({"params": params}, tokens, *given)

    @property
    def _dropless(self) -> VisionLanguageDecoder:
        language = without_capacity(self.config.language)
        if language is self.config.language:
            return self.module
        config = dataclasses.replace(self.config, language=language)
        return VisionLanguageDecoder(config, self.dtypes)

    def features(
        self,
        params: Any,
        images: Float[Array, "B M ..."] | None = None,
        *,
        shapes: Int[Array, "B M 2"] | None = None,
        sounds: Float[Array, "B A S"] | None = None,
    ) -> Float[Array, "B F D"]:
        """What tokens of each row may stand for, to be given to `decode`."""
        return self.module.apply({"params": params}, images, shapes, sounds, method="features")

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
        learned: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], tuple]:
        """As `Model.decode`; what sees itself both ways comes in one call."""
        given = tokens, cache, positions, features, sources, learned
        hidden, cache = self._dropless.apply({"params": params}, *given, method="decode")
        return self.logits(params, hidden), cache


def build_vision_language(
    config: VisionLanguage, precision: Precision = Precision()
) -> VisionLanguageModel:
    """The model of a config: no parameters are made, only their shapes."""
    dtypes = dtypes_of(precision)
    module = VisionLanguageDecoder(config, dtypes)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    given = {"images": jax.ShapeDtypeStruct((1, 1, *config.view_shape), jnp.float32)}
    if isinstance(config.vision, NaFlex):
        given["shapes"] = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
    if config.audio:
        given["sounds"] = jax.ShapeDtypeStruct((1, 1, config.audio.window), jnp.float32)
    declared = declarations(module, tokens=tokens, sources=tokens, **given)
    return VisionLanguageModel(config, dtypes, declared, module, build(config.language, precision))
