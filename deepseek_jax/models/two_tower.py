"""Two towers in one shared space: what contrastive training brings together (CLIP, SigLIP).

Each tower's pooled vector goes through a projection (or none) and is normalized; the logits of a
pair are their product times a learned scale, plus a learned bias where the loss is SigLIP's. With a
captioner, a decoder learns to write the caption from the image tower's tokens as well.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.block import Remat
from deepseek_jax.layers.linear import Dtypes, Projection, weight
from deepseek_jax.models import text_tower, vit
from deepseek_jax.models.build import Network, declarations, dtypes_of
from deepseek_jax.models.captioner import Captioner, CaptionTransformer
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.vit import ViT
from deepseek_jax.ops.contrastive import START, Kind, l2_normalized
from deepseek_jax.ops.matmul import dot


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTower:
    """An image tower and a text tower."""

    image: ViT
    text: TextTower
    shared_dim: int | None = 512
    """Width of the shared space, reached by a projection of each tower; None: as they come out."""
    loss: Kind = "softmax"
    """What brings the towers together: CLIP's, or SigLIP's, whose logits have a bias as well."""
    captioner: Captioner | None = None
    """Learns to write captions, where the objective has a caption_weight."""
    learned_weights: bool = False
    """Whether the losses are weighed by uncertainties that are learned (ops/alignment)."""
    init_scale: float = 0.02

    def __post_init__(self):
        if self.image.pooling == "none":
            raise ValueError("image.pooling is 'none': there is no vector to compare.")
        if self.shared_dim is not None and self.shared_dim < 1:
            raise ValueError(f"shared_dim is {self.shared_dim}; it must be at least 1, or None.")
        widths = self.image.transformer.embed_dim, self.text_dim
        if self.shared_dim is None and widths[0] != widths[1]:
            raise ValueError(
                f"the towers' vectors have widths {widths}; give shared_dim to bring them together."
            )

    @property
    def text_dim(self) -> int:
        """Width of the text tower's vector."""
        return self.text.head_dim or self.text.transformer.embed_dim

    @property
    def num_layers(self) -> int:
        """Of both towers, and of the captioner."""
        parts = [self.image, self.text, *([self.captioner] if self.captioner else [])]
        return sum(part.transformer.num_layers for part in parts)

    @property
    def aligns(self) -> bool:
        """Whether single tokens of both towers reach the shared space as pooled vectors do."""
        return self.shared_dim is not None and self.text.head_dim is None

    @property
    def remat(self) -> Remat:
        """The image tower's."""
        return self.image.transformer.remat

    @property
    def vocab_size(self) -> int:
        """Tokens that the text tower knows."""
        return self.text.vocab_size

    def at_size(self, size: int | None) -> "TwoTower":
        """The same weights on images of this height and width: `ViT.at_size`."""
        return dataclasses.replace(self, image=self.image.at_size(size))


class Pairing(NamedTuple):
    """Both towers' vectors of a batch, normalized, float32, and what turns products into logits."""

    image: Float[Array, "B E"]
    text: Float[Array, "B E"]
    log_scale: Float[Array, ""]
    bias: Float[Array, ""]
    """0 where the model has none."""
    image_tokens: Float[Array, "B P E"] | None = None
    """In the shared space, normalized, where the model `aligns`."""
    text_tokens: Float[Array, "B T E"] | None = None
    written: Float[Array, "B T D"] | None = None
    """What each token's follower is predicted from, where there is a captioner."""
    log_variances: Float[Array, "3"] | None = None
    """Of the contrastive, the caption and the alignment loss, where they are learned."""


class TwoTowers(nn.Module):
    """Two towers as a module."""

    config: TwoTower
    dtypes: Dtypes

    def setup(self):
        c = self.config
        self.image = vit.VisionTransformer(c.image, self.dtypes)
        self.text = text_tower.TextTransformer(c.text, self.dtypes)
        if c.shared_dim is not None:
            axes = ("embed", "mlp")
            self.image_projection, self.text_projection = (
                Projection("btd,de->bte", (width, c.shared_dim), axes, self.dtypes)
                for width in (c.image.transformer.embed_dim, c.text_dim)
            )
        kind, (scale, bias) = jnp.dtype(jnp.float32), START[c.loss]
        self.logit_scale = weight(self, "logit_scale", (), (), init=scale, dtype=kind)
        if c.loss == "sigmoid":
            self.logit_bias = weight(self, "logit_bias", (), (), init=bias, dtype=kind)
        if c.captioner is not None:
            sizes = c.vocab_size, c.text.max_length, c.image.transformer.embed_dim
            self.captioner = CaptionTransformer(c.captioner, *sizes, self.dtypes)
        if c.learned_weights:
            self.log_variances = weight(
                self, "log_variances", (3,), ("position",), init=0.0, dtype=kind
            )

    def _shared(self, side: str, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """A side's vectors in the shared space, normalized."""
        if self.config.shared_dim is not None:
            x = getattr(self, f"{side}_projection")(x)
        return l2_normalized(x)

    def embed_image(self, images: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """Normalized vectors of images."""
        return self._shared("image", self.image(images).pooled[:, None])[:, 0]

    def embed_text(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B E"]:
        """Normalized vectors of texts."""
        return self._shared("text", self.text(tokens, mask).pooled[:, None])[:, 0]

    def seen(self, images: Float[Array, "B H W C"]) -> Float[Array, "B P D"]:
        """The image tower's tokens: what the captioner writes of."""
        return self.image(images).hidden

    def write(
        self, seen: Float[Array, "B P C"], tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """What each token's follower is predicted from, given what is `seen`."""
        return self.captioner(seen, tokens)

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
    ) -> Pairing:
        c = self.config
        bias = self.logit_bias if c.loss == "sigmoid" else jnp.zeros(())
        scale, bias = (x.astype(jnp.float32) for x in (self.logit_scale, bias))
        found = {"image": self.image(images), "text": self.text(tokens, mask)}
        vectors = (self._shared(side, x.pooled[:, None])[:, 0] for side, x in found.items())
        pair = Pairing(*vectors, scale, bias)
        if c.aligns:
            image, text = (self._shared(side, x.hidden) for side, x in found.items())
            pair = pair._replace(image_tokens=image, text_tokens=text)
        if c.captioner is not None:
            pair = pair._replace(written=self.captioner(found["image"].hidden, tokens))
        return pair._replace(log_variances=self.log_variances) if c.learned_weights else pair


@dataclasses.dataclass(frozen=True)
class Towers(Network):
    """Two towers as functions."""

    config: TwoTower
    module: TwoTowers

    def apply(
        self, params: Any, images: Array, tokens: Array, mask: Array | None = None
    ) -> Pairing:
        """Both sides of a batch of pairs."""
        return self.module.apply({"params": params}, images, tokens, mask)

    def embed_image(self, params: Any, images: Array) -> Float[Array, "B E"]:
        """Normalized vectors of images [B, H, W, C], float32."""
        return self.module.apply({"params": params}, images, method="embed_image")

    def embed_text(
        self, params: Any, tokens: Array, mask: Array | None = None
    ) -> Float[Array, "B E"]:
        """Normalized vectors of texts, float32."""
        return self.module.apply({"params": params}, tokens, mask, method="embed_text")

    def caption_head(self, params: Any) -> Float[Array, "D V"]:
        """The captioner's output projection: its table of embeddings."""
        return params["captioner"]["embedding"]["weight"].T

    def captions(
        self,
        params: Any,
        images: Float[Array, "B H W C"],
        key: Array,
        *,
        begin: int,
        end: int,
        length: int,
        allowed: Bool[Array, " V"],
        temperature: float = 1.0,
    ) -> Int[Array, "B T"]:
        """Sampled captions of images: `length` tokens, `begin` first, `end` from their end on.

        Drawn among `allowed` tokens; a temperature of 0 takes the likeliest. Every token costs a
        pass over all of them (captions are short).
        """
        run = functools.partial(self.module.apply, {"params": params})
        seen, head = run(images, method="seen"), self.caption_head(params).astype(jnp.float32)
        rows = jnp.full((images.shape[0], length), end, jnp.int32).at[:, 0].set(begin)

        def one_more(place: Array, carry: tuple) -> tuple:
            rows, done = carry
            hidden = run(seen, rows, method="write")
            last = jnp.take(hidden, place - 1, axis=1).astype(jnp.float32)
            logits = jnp.where(allowed[None], dot("bd,dv->bv", last, head), -jnp.inf)
            if temperature:
                drawn = jax.random.categorical(jax.random.fold_in(key, place), logits / temperature)
            else:
                drawn = logits.argmax(-1)
            drawn = jnp.where(done, end, drawn.astype(jnp.int32))
            return rows.at[:, place].set(drawn), done | (drawn == end)

        return jax.lax.fori_loop(1, length, one_more, (rows, rows[:, 0] == end))[0]


def build_towers(config: TwoTower, precision: Precision = Precision()) -> Towers:
    """The towers of a config: no parameters are made, only their shapes."""
    dtypes = dtypes_of(precision)
    module = TwoTowers(config, dtypes)
    inputs = vit.example(config.image) | text_tower.example(config.text)
    return Towers(config, dtypes, declarations(module, **inputs), module)
