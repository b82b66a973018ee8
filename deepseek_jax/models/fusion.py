"""One classifier of several modalities, any of which may be absent: encoders, heads, a fusion.

Every modality has an encoder and a head of its own, so that each can answer alone. A fusion makes
one answer of those present, and says how much each weighs: late, by weighing the heads' logits, or
by attention between the modalities' tokens (MBT, arXiv 2107.00135). What stands in an absent
modality, NaN included, changes neither answers nor gradients. Modalities may share an encoder that
takes any (models/any_modality).

Answers to questions about an image (VQA) are classes of two modalities, one of them a text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.block import Remat
from deepseek_jax.layers.encoder import Stack, Transformer, Whole, learned
from deepseek_jax.layers.linear import Dtypes, LayerNorm, Projection, weight
from deepseek_jax.models.any_modality import TAKEN, AnyModality, AnyTransformer
from deepseek_jax.models.build import Network, declarations, dtypes_of
from deepseek_jax.models.encoder import KINDS, EncoderConfig
from deepseek_jax.ops.fusion import (
    attention_weights,
    bottleneck_mask,
    entropy_weights,
    fused,
    label_entropy_weights,
    modality_dropout,
    present_softmax,
    progressive_mask,
    token_streams,
    where_present,
)
from deepseek_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modality:
    """One of the inputs, and what encodes it."""

    name: str
    """As the data call it."""
    encoder: EncoderConfig
    """Modalities of the same AnyModality share one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossModal:
    """All modalities' tokens see each other, in every layer."""

    transformer: Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive:
    """Below a layer tokens see their own modality's alone, from it on all."""

    transformer: Transformer
    first_joint_layer: int

    def __post_init__(self):
        _check_first(self.first_joint_layer, self.transformer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """As `Progressive`, but what a modality learns of others passes through a few tokens."""

    transformer: Transformer
    num_tokens: int = 4
    first_joint_layer: int = 0

    def __post_init__(self):
        _check_first(self.first_joint_layer, self.transformer)
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens is {self.num_tokens}; there must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted:
    """The heads' logits, weighed by a learned gate, each head's own confidence, or a query."""

    kind: Literal["gate", "confidence", "attention"] = "gate"
    embed_dim: int = 64
    """Width in which gate and query look at the modalities; confidence looks at logits."""

    def __post_init__(self):
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim is {self.embed_dim}; it must be at least 1.")


Tokenwise: TypeAlias = CrossModal | Bottleneck | Progressive
Fusion: TypeAlias = Tokenwise | Weighted


def _check_first(first: int, transformer: Transformer) -> None:
    if not 0 <= first < transformer.num_layers:
        raise ValueError(
            f"first_joint_layer ({first}) must be one of the {transformer.num_layers} layers, "
            "counted from 0."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """A classifier of several modalities."""

    modalities: tuple[Modality, ...]
    num_classes: int
    multi_label: bool = False
    """Whether a row may be of several classes, or of none (diagnosis), instead of one."""
    fusion: Fusion = Weighted()
    modality_dropout: float = 0.0
    """How often training hides each modality from the fusion; never all of a row, and never from
    its own head."""
    init_scale: float = 0.02

    def __post_init__(self):
        names = self.names
        bad = [name for name in names if not name.isidentifier() or name == "fusion"]
        if len(names) < 2 or len(set(names)) < len(names) or bad:
            raise ValueError(
                f"modalities {names} must be two or more different names, each an identifier and "
                "none of them fusion."
            )
        for name, encoder in ((one.name, one.encoder) for one in self.modalities):
            if isinstance(encoder, AnyModality) and TAKEN.get(name) not in encoder.taken:
                raise ValueError(f"the AnyModality of {name} takes {', '.join(encoder.taken)}.")
        if self.num_classes < (1 if self.multi_label else 2):
            raise ValueError(f"num_classes ({self.num_classes}) leaves nothing to tell apart.")
        if not 0 <= self.modality_dropout < 1:
            raise ValueError(f"modality_dropout ({self.modality_dropout}) must lie in [0, 1).")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the modalities."""
        return tuple(modality.name for modality in self.modalities)

    @property
    def num_layers(self) -> int:
        """Of all transformers."""
        stacks = [*(m.encoder for m in self.modalities), self.fusion]
        return sum(getattr(getattr(s, "transformer", None), "num_layers", 0) for s in stacks)

    @property
    def remat(self) -> Remat:
        """The first encoder's."""
        own = getattr(self.modalities[0].encoder, "transformer", None)
        return own.remat if own else "none"


class Alone(NamedTuple):
    """What a modality's own encoder and head make of it; zeros where it is absent."""

    hidden: Float[Array, "B T D"]
    real: Bool[Array, "B T"]
    pooled: Float[Array, "B D"]
    logits: Float[Array, "B V"]
    """Float32."""


class Answer(NamedTuple):
    """A batch's logits, float32, and what they come from; modalities are in the config's order."""

    logits: Float[Array, "B V"]
    alone: Float[Array, "B M V"]
    """Each modality's own head; zeros where it is absent."""
    weights: Float[Array, "B M"]
    """What each modality weighs in `logits`: 0 where absent or hidden, else at least 0 and one in
    sum."""
    vectors: Float[Array, "B M D"] | None
    """Each modality's vector that was weighed; None where confidence weighs."""


class Branch(nn.Module):
    """A modality's encoder and head."""

    config: Modality
    num_classes: int
    dtypes: Dtypes
    shared: nn.Module | None = None
    """The encoder, where other modalities have it too."""

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array], present: Bool[Array, " B"]) -> Alone:
        encoder = self.shared
        if encoder is None:
            kind = KINDS[type(self.config.encoder)].module
            encoder = kind(self.config.encoder, self.dtypes, name="encoder")
        # Not after the encoder alone: a NaN in its input would come back through its slopes.
        kept = {
            name: _only(x, present) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for name, x in inputs.items()
        }
        found = encoder(**kept)
        hidden = _only(found.hidden, present)
        real = jnp.broadcast_to(present[:, None], hidden.shape[:2])
        real = real if found.mask is None else real & found.mask
        pooled = _mean(hidden, real) if found.pooled is None else _only(found.pooled, present)
        shape, axes = (pooled.shape[-1], self.num_classes), ("embed", "vocab")
        head = Projection("btd,dv->btv", shape, axes, self.dtypes, True, name="head")
        logits = head(pooled[:, None])[:, 0].astype(jnp.float32)
        return Alone(hidden, real, pooled, _only(logits, present))


def _only(x: Array, present: Bool[Array, " B"]) -> Array:
    return where_present(x[:, None], present[:, None])[:, 0].astype(x.dtype)


def _mean(x: Float[Array, "B T D"], real: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    total = jnp.where(real[:, :, None], x.astype(jnp.float32), 0.0).sum(1)
    return (total / jnp.maximum(real.sum(1), 1)[:, None]).astype(x.dtype)


class Fusing(nn.Module):
    """A fusion as a module: what the branches made, and who is there, into logits and weights."""

    config: Fused
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, branches: tuple[Alone, ...], present: Bool[Array, "B M"]
    ) -> tuple[Float[Array, "B V"], Float[Array, "B M"], Float[Array, "B M D"] | None]:
        if isinstance(self.config.fusion, Weighted):
            return self._weighed(branches, present)
        return self._attended(branches, present)

    def _inward(self, x: Float[Array, "B T D"], name: str, width: int) -> Float[Array, "B T E"]:
        """A modality's tokens in the fusion's width, with the vector that says whose they are."""
        shape, axes = (x.shape[-1], width), ("embed", "mlp")
        project = Projection("btd,de->bte", shape, axes, self.dtypes, name=f"{name}_inward")
        x = project(x) + learned(self, name, (width,)).astype(x.dtype).reshape(1, 1, -1)
        # On a mesh of several axes XLA gets the slopes of parts that are joined wrong, where it may
        # choose their layout (jax 0.10, CPU).
        return constrain(x)

    def _weighed(self, branches: tuple[Alone, ...], present: Array) -> tuple[Array, Array, Any]:
        c, logits = self.config.fusion, jnp.stack([branch.logits for branch in branches], 1)
        # A weighted mean is less sure than its parts together.
        sure = weight(self, "log_scale", (), (), init=0.0, dtype=jnp.dtype(jnp.float32))
        if c.kind == "confidence":
            of = label_entropy_weights if self.config.multi_label else entropy_weights
            weights, vectors = of(logits, present), None
        else:
            rows = [
                self._inward(branch.pooled[:, None], name, c.embed_dim)
                for branch, name in zip(branches, self.config.names, strict=True)
            ]
            vectors = where_present(jnp.concatenate(rows, 1), present)
            weights = self._gate(vectors, present) if c.kind == "gate" else None
            if weights is None:
                weights = attention_weights(self._query(vectors), vectors, present)
        return jnp.exp(sure) * fused(logits, weights, present), weights, vectors

    def _gate(self, vectors: Float[Array, "B M D"], present: Array) -> Float[Array, "B M"]:
        """Of a feed-forward layer's score of each modality, the same for all of them."""
        width = vectors.shape[-1]
        shape, axes = (width, width), ("embed", "mlp")
        up = Projection("btd,df->btf", shape, axes, self.dtypes, True, name="gate_up")
        shape, axes = (width, 1), ("embed", "router")
        score = Projection("btd,df->btf", shape, axes, self.dtypes, name="gate")
        return present_softmax(score(jax.nn.gelu(up(vectors)))[..., 0], present)

    def _query(self, vectors: Float[Array, "B M D"]) -> Float[Array, "B D"]:
        query = learned(self, "query", vectors.shape[-1:]).astype(vectors.dtype)
        return jnp.broadcast_to(query[None], (vectors.shape[0], query.shape[0]))

    def _attended(self, branches: tuple[Alone, ...], present: Array) -> tuple[Array, Array, Array]:
        c, t, kept = self.config.fusion, self.config.fusion.transformer, self.dtypes
        parts, real = [], []
        for i, (branch, name) in enumerate(zip(branches, self.config.names, strict=True)):
            real.append(branch.real & present[:, i, None])
            x = self._inward(branch.hidden, name, t.embed_dim)
            parts.append(jnp.where(real[-1][:, :, None], x, 0))
        lengths = tuple(part.shape[1] for part in parts)
        narrow = isinstance(c, Bottleneck)
        if narrow:
            own = learned(self, "bottleneck", (c.num_tokens, t.embed_dim)).astype(parts[0].dtype)
            parts.append(jnp.broadcast_to(own[None], (present.shape[0], *own.shape)))
            real.append(jnp.ones(parts[-1].shape[:2], bool))
        x, valid = jnp.concatenate(parts, 1), jnp.concatenate(real, 1)
        streams = token_streams(lengths, c.num_tokens if narrow else 0)
        mask = bottleneck_mask if narrow else progressive_mask
        first = getattr(c, "first_joint_layer", 0)
        for joint, count in ((False, first), (True, t.num_layers - first)):
            if count:
                some = dataclasses.replace(t, num_layers=count)
                stack = Stack(some, kept, name=f"segment_{int(joint and first > 0)}")
                x, _ = stack(x, Whole(mask(streams, joint, valid)))
        x = LayerNorm(kept, eps=t.norm_eps, name="final_norm")(x)
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        cut = [
            _mean(x[:, end - length : end], there)
            for end, length, there in zip(ends, lengths, real[: len(lengths)], strict=True)
        ]
        vectors = jnp.stack(cut, 1)
        weights = attention_weights(self._query(vectors), vectors, present)
        shape, axes = (t.embed_dim, self.config.num_classes), ("embed", "vocab")
        head = Projection("btd,dv->btv", shape, axes, kept, True, name="head")
        one = fused(vectors, weights, present)[:, None]
        return head(one)[:, 0].astype(jnp.float32), weights, vectors


def trunks(config: Fused) -> dict[str, AnyModality]:
    """The encoders that modalities share, by the names of their weights."""
    encoders = dict.fromkeys(m.encoder for m in config.modalities)
    shared = [encoder for encoder in encoders if isinstance(encoder, AnyModality)]
    return {f"trunk_{number}": encoder for number, encoder in enumerate(shared)}


class FusedClassifier(nn.Module):
    """A classifier of several modalities as a module."""

    config: Fused
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, Mapping[str, Any]],
        present: Bool[Array, "B M"],
        key: Key[Array, ""] | None = None,
    ) -> Answer:
        c = self.config
        shared = {
            config: AnyTransformer(config, self.dtypes, name=name)
            for name, config in trunks(c).items()
        }
        branches = tuple(
            Branch(
                modality, c.num_classes, self.dtypes, shared.get(modality.encoder),
                name=modality.name,
            )(inputs[modality.name], present[:, i])
            for i, modality in enumerate(c.modalities)
        )  # fmt: skip
        if key is not None and c.modality_dropout:
            present = modality_dropout(key, present, c.modality_dropout)
        logits, weights, vectors = Fusing(c, self.dtypes, name="fusion")(branches, present)
        return Answer(logits, jnp.stack([b.logits for b in branches], 1), weights, vectors)


@dataclasses.dataclass(frozen=True)
class FusedNetwork(Network):
    """A classifier of several modalities as functions."""

    config: Fused
    module: FusedClassifier

    def apply(
        self,
        params: Any,
        inputs: Mapping[str, Mapping[str, Any]],
        present: Bool[Array, "B M"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Answer:
        """The answers to a batch: of each modality, by name, its encoder's inputs.

        `present` says who is there, in the config's order; None: all. With a key, the config's
        `modality_dropout` hides some from the fusion: in training.
        """
        if missing := set(self.config.names) ^ set(inputs):
            raise ValueError(
                f"inputs are {sorted(inputs)}, and the modalities {self.config.names}: "
                f"{sorted(missing)} stand on one side alone"
            )
        if present is None:
            rows = jax.tree.leaves(dict(inputs))[0].shape[0]
            present = jnp.ones((rows, len(self.config.names)), bool)
        return self.module.apply({"params": params}, inputs, present, key)


def example(modality: Modality, length: int = 0) -> dict[str, Array]:
    """A modality's inputs of one row, zeros; a wave of `length` samples, if that is more."""
    found = KINDS[type(modality.encoder)].example(modality.encoder)
    if isinstance(modality.encoder, AnyModality):
        found = {name: x for name, x in found.items() if name == TAKEN[modality.name]}
    for name in {"wave", "audio"} & {*found}:
        found[name] = jnp.zeros((1, max(length, found[name].shape[1])))
    return found


def build_fused(config: Fused, precision: Precision = Precision()) -> FusedNetwork:
    """The classifier of a config: no parameters are made, only their shapes."""
    dtypes = dtypes_of(precision)
    module = FusedClassifier(config, dtypes)
    inputs = {modality.name: example(modality) for modality in config.modalities}
    present = jnp.ones((1, len(config.modalities)), bool)
    return FusedNetwork(
        config, dtypes, declarations(module, inputs=inputs, present=present), module
    )
