"""One transformer for images, clips, texts and sounds: a stem a modality, the trunk is shared.

A stem makes tokens of an input: a 3-D convolution of images (clips of one frame) and clips, a 1-D
convolution of a text's embeddings, a linear layer on a sound's spectrum. Each adds its learned
positions and its modality's vector; then all tokens pass the same blocks. Several modalities given
together stand in one row, in the order of `MODALITIES`, and see each other. Images are
Float[Array, "B H W C"], clips Float[Array, "B T H W C"], sounds Float[Array, "B T"].
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.layers.encoder import Encoded, Stack, Transformer, Whole, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection
from deepseek_jax.models.decoder import Table
from deepseek_jax.models.video import tubelets
from deepseek_jax.ops.signal import frame_counts, hann, power_spectrum, valid
from deepseek_jax.parallel.sharding import constrain

MODALITIES = ("image", "video", "text", "audio")
TAKEN = {"image": "image", "video": "video", "text": "text", "sound": "audio"}  # of the data's
FAINT = 1e-20  # the least power whose root is taken: at 0 a root has no slope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes:
    """Boxes of pixels as tokens: a 3-D convolution whose steps are as long as its taps."""

    num_frames: int = 1
    image_size: tuple[int, int] = (224, 224)
    box: tuple[int, int, int] = (1, 16, 16)
    """Frames, height and width of what becomes one token."""
    num_channels: int = 3

    def __post_init__(self):
        if min(self.box) < 1 or any(n % b for n, b in zip(self.size, self.box, strict=True)):
            raise ValueError(
                f"num_frames and image_size {self.size} must be multiples of box {self.box}."
            )

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a whole clip."""
        return self.num_frames, *self.image_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """Token ids as tokens: each with its neighbours, by a 1-D convolution of their embeddings."""

    vocab_size: int
    taps: int = 3
    max_length: int = 512
    """Positions that are learned."""

    def __post_init__(self):
        if min(self.vocab_size, self.max_length, self.taps) < 1 or self.taps % 2 == 0:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) and max_length ({self.max_length}) must be at "
                f"least 1, and taps ({self.taps}) odd."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Frames of a sound as tokens: the magnitudes of its short-time Fourier transform."""

    window: int = 400
    """Samples of a frame (Hann); frames have their middles at 0, hop, 2 hop, ..."""
    hop: int = 160
    max_length: int = 1501
    """Frames, which have learned positions."""

    def __post_init__(self):
        if min(self.window, self.hop, self.max_length) < 1:
            raise ValueError(
                f"window ({self.window}), hop ({self.hop}) and max_length ({self.max_length}) must "
                "be at least 1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyModality:
    """An encoder of any of some modalities; None: it takes none such."""

    transformer: Transformer
    image: Boxes | None = None
    video: Boxes | None = None
    text: Words | None = None
    audio: Spectrum | None = None
    init_scale: float = 0.02

    def __post_init__(self):
        if not self.taken:
            raise ValueError(f"the encoder needs at least one of {', '.join(MODALITIES)}.")
        if self.image and self.image.num_frames != 1:
            raise ValueError(f"image.num_frames is {self.image.num_frames}; an image has 1.")

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows of texts; 0 where it takes none."""
        return self.text.vocab_size if self.text else 0

    @property
    def taken(self) -> tuple[str, ...]:
        """The modalities that it takes."""
        return tuple(name for name in MODALITIES if getattr(self, name))


class Stem(nn.Module):
    """A modality's tokens, and which are real."""

    config: Boxes | Words | Spectrum
    embed_dim: int
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, inputs: Array, lengths: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B N D"], Bool[Array, "B N"]]:
        kind = {Boxes: self._boxes, Words: self._words, Spectrum: self._spectrum}
        x, real = kind[type(self.config)](inputs, lengths)
        most = x.shape[1] if isinstance(self.config, Boxes) else self.config.max_length
        if x.shape[1] > most:
            raise ValueError(f"the {self.name} has {x.shape[1]} tokens, and this stem {most}")
        positions = learned(self, "positions", (most, self.embed_dim))[: x.shape[1]]
        known = positions + learned(self, "modality", (self.embed_dim,))[None]
        return constrain(x) + known[None].astype(x.dtype), real

    def _projected(self, equation: str, shape: tuple[int, ...], x: Array) -> Array:
        axes = ("patch",) * len(shape) + ("embed",)
        shape = (*shape, self.embed_dim)
        return Projection(equation, shape, axes, self.dtypes, True, name="stem")(x)

    def _boxes(self, clips: Array, lengths: None) -> tuple[Array, Array]:
        c = self.config
        if clips.ndim == 4:
            clips = clips[:, None]
        if clips.shape[1:] != (wanted := (*c.size, c.num_channels)):
            raise ValueError(f"the {self.name} is {clips.shape[1:]}, and this stem's {wanted}")
        shape = (*c.box, c.num_channels)
        x = self._projected("btfijc,fijcd->btd", shape, tubelets(clips, c.box))
        return x, jnp.ones(x.shape[:2], bool)

    def _words(self, tokens: Array, lengths: Array | None) -> tuple[Array, Array]:
        c, d, count = self.config, self.embed_dim, tokens.shape[1]
        real = jnp.ones(tokens.shape, bool) if lengths is None else valid(lengths, count)
        table = Table((c.vocab_size, d), ("vocab", "embed"), self.dtypes, name="embedding")
        x = jnp.where(real[:, :, None], table(jnp.where(real, tokens, 0)), 0)
        x = jnp.pad(x, ((0, 0), (c.taps // 2, c.taps // 2), (0, 0)))
        x = jnp.stack([x[:, i : i + count] for i in range(c.taps)], axis=2)
        return self._projected("btkc,kcd->btd", (c.taps, d), x), real

    def _spectrum(self, wave: Array, lengths: Array | None) -> tuple[Array, Array]:
        c = self.config
        power = power_spectrum(wave, hann(c.window), c.hop, lengths)
        x = self._projected("btf,fd->btd", power.shape[2:], jnp.sqrt(jnp.maximum(power, FAINT)))
        if lengths is None:
            return x, jnp.ones(x.shape[:2], bool)
        return x, valid(frame_counts(lengths, c.window, c.hop), x.shape[1])


class AnyTransformer(nn.Module):
    """An `AnyModality` as a module; pooled: the mean over real tokens."""

    config: AnyModality
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "B H W C"] | None = None,
        video: Float[Array, "B T H2 W2 C2"] | None = None,
        text: Int[Array, "B S"] | None = None,
        audio: Float[Array, "B samples"] | None = None,
        text_lengths: Int[Array, " B"] | None = None,
        audio_lengths: Int[Array, " B"] | None = None,
        keep: bool = False,
    ) -> Encoded:
        """Lengths: how many of a row's token ids and samples are real, at least one; None: all."""
        c, t = self.config, self.config.transformer
        given = {"image": image, "video": video, "text": text, "audio": audio}
        given = {name: x for name, x in given.items() if x is not None}
        if not given or not {*given} <= {*c.taken}:
            raise ValueError(
                f"given {', '.join(given) or 'nothing'}; it takes {', '.join(c.taken)}"
            )
        if len({x.shape[0] for x in given.values()}) > 1:
            rows = ", ".join(f"{name} {x.shape[0]}" for name, x in given.items())
            raise ValueError(f"all modalities must have as many rows: {rows}")
        lengths = {"text": text_lengths, "audio": audio_lengths}
        stems = [
            Stem(getattr(c, name), t.embed_dim, self.dtypes, name=name)(x, lengths.get(name))
            for name, x in given.items()
        ]
        x, mask = (jnp.concatenate(parts, axis=1) for parts in zip(*stems, strict=True))
        x, layers = Stack(t, self.dtypes, keep, name="segment_0")(x, Whole(mask))
        hidden = LayerNorm(self.dtypes, eps=t.norm_eps, name="final_norm")(x)
        real = mask[:, :, None].astype(jnp.float32)
        pooled = (hidden.astype(jnp.float32) * real).sum(1) / real.sum(1)
        return Encoded(hidden, pooled.astype(hidden.dtype), mask, layers)


def example(config: AnyModality) -> dict[str, Array]:
    """Inputs of the encoder, of one row: zeros, of every modality that it takes."""
    made = {
        "image": lambda c: jnp.zeros((1, *c.image_size, c.num_channels)),
        "video": lambda c: jnp.zeros((1, *c.size, c.num_channels)),
        "text": lambda c: jnp.zeros((1, 1), jnp.int32),
        "audio": lambda c: jnp.zeros((1, c.window)),
    }
    return {name: made[name](getattr(config, name)) for name in config.taken}
