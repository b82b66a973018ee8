"""The decoder: embeddings, segments of blocks, head. One config for dense, V2, V3 and the rest.

DeepSeek-V3 (arXiv 2412.19437) is MLA, three dense layers, then MoE ones, and one layer of
multi-token prediction (MTP, section 2.2).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from deepseek_jax.core import target
from deepseek_jax.core.axes import BATCH_AXES
from deepseek_jax.layers.attention import GQA, Place, Selection
from deepseek_jax.layers.block import Attention, Remat, stacked
from deepseek_jax.layers.linear import Dtypes, Projection, RMSNorm, weight
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE, Routing
from deepseek_jax.ops.ring import zigzag, zigzag_order
from deepseek_jax.ops.rope import rotation
from deepseek_jax.parallel.manual import per_device
from deepseek_jax.parallel.sharding import constrain, names_of, tokens_spec, weight_spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only language model."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    attention: Attention
    mlp_dim: int
    """Width of the dense layers' feed-forward part."""
    moe: MoE | None = None
    """The other layers' feed-forward part; None makes every layer dense."""
    num_dense_layers: int = 0
    """Leading layers that stay dense when `moe` is set."""
    num_mtp_layers: int = 0
    """Multi-token prediction depth (V3: 1)."""
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    init_scale: float = 0.006
    """Standard deviation of the initial weights (V3's; small models take about embed_dim**-0.5)."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matmuls, whole blocks, or these from
    inputs that wait in the host's memory."""
    unroll: int = 1
    """Layers that one iteration of the scan over layers holds."""
    scan: bool = True
    """Whether like layers are stacked and scanned. Apart they compile longer and decode faster: a
    scan copies each layer's weights, every expert's too, before it uses some of them."""

    def __post_init__(self):
        sizes = (self.vocab_size, self.embed_dim, self.num_layers, self.mlp_dim, self.unroll)
        if min(sizes) < 1:
            raise ValueError(
                "model.vocab_size, embed_dim, num_layers, mlp_dim and unroll must be at least 1; "
                f"they are {sizes}."
            )
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"model.num_dense_layers is {self.num_dense_layers}; it must lie between 0 and "
                f"num_layers = {self.num_layers}."
            )
        if self.num_mtp_layers < 0:
            raise ValueError(f"model.num_mtp_layers is {self.num_mtp_layers}; 0 or more, please.")
        if self.norm_eps <= 0 or self.init_scale <= 0:
            raise ValueError(
                f"model.norm_eps ({self.norm_eps}) and init_scale ({self.init_scale}) must be "
                "above 0."
            )

    @property
    def segments(self) -> tuple[tuple[int | MoE, int], ...]:
        """Runs of like blocks: (the feed-forward part, repeats), in order."""
        num_dense = self.num_layers if self.moe is None else self.num_dense_layers
        runs = ((self.mlp_dim, num_dense), (self.moe, self.num_layers - num_dense))
        if self.scan:
            return tuple((feed_forward, repeats) for feed_forward, repeats in runs if repeats)
        return tuple((feed_forward, 1) for feed_forward, repeats in runs for _ in range(repeats))


def layer_table(config: Decoder) -> dict[str, tuple[int, ...]]:
    """Which layers each stacked block holds; MTP layers are numbered after the last one."""
    table, first = {}, 0
    for index, (_, repeats) in enumerate(config.segments):
        table[f"segment_{index}/block"] = tuple(range(first, first + repeats))
        first += repeats
    for depth in range(config.num_mtp_layers):
        table[f"mtp_{depth}/block"] = (first + depth,)
    return table


class Output(NamedTuple):
    """What a forward pass gives: final hidden states, and by block what was routed and selected."""

    hidden: Float[Array, "B T D"]
    mtp: tuple[Float[Array, "B T D"], ...]
    routing: dict[str, Routing]
    """Of the MoE blocks, by path."""
    selection: dict[str, Selection]
    """Of the blocks with a sparse attention, by path."""


class Segment(nn.Module):
    """A run of like blocks."""

    config: Decoder
    feed_forward: int | MoE
    repeats: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cache: Any, place: Place) -> Any:
        c = self.config
        blocks = stacked(self.repeats, c.remat, c.unroll)(
            c.attention, self.feed_forward, c.embed_dim, c.norm_eps, self.dtypes, name="block"
        )
        x, (cache, *found) = blocks(constrain(x), cache, place)
        return x, cache, found


class PredictionLayer(nn.Module):
    """One prediction depth; its block is like the model's last (a stack of one).

    Depth d sees the embedding of token t+1+d beside the previous depth's hidden state at t (after
    its final norm), and predicts token t+2+d with the shared head. The embedding comes first, as
    in the released weights.
    """

    config: Decoder
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B T D"], embedded: Float[Array, "B T D"], place: Place
    ) -> tuple[Float[Array, "B T D"], list[Routing | Selection | None]]:
        c = self.config
        pair = (
            RMSNorm(self.dtypes, eps=c.norm_eps, name=f"{name}_norm")(x)
            for name, x in (("embedding", embedded), ("hidden", hidden))
        )
        shape, axes = (2 * c.embed_dim, c.embed_dim), ("embed", "mlp")
        projection = Projection("btc,cd->btd", shape, axes, self.dtypes, name="projection")
        block = stacked(1, c.remat, 1)(
            c.attention, c.moe or c.mlp_dim, c.embed_dim, c.norm_eps, self.dtypes, name="block"
        )
        x, (_, *found) = block(projection(jnp.concatenate([*pair], axis=-1)), None, place)
        return RMSNorm(self.dtypes, eps=c.norm_eps, name="final_norm")(x), found


class Table(nn.Module):
    """Token embeddings, or the head that has one column a token."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    dtypes: Dtypes

    def setup(self):
        self.weight = weight(self, "weight", self.shape, self.axes, reduced=(0,), outputs=(1,))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        spec = tokens_spec(*tokens.shape)
        if spec is None or not target.partitioned():
            return self.weight[tokens].astype(self.dtypes.compute)
        table = weight_spec(self.axes, self.shape)
        look_up = functools.partial(own_rows, table, self.dtypes.compute)
        return per_device(look_up, (PartitionSpec(*spec[:2]), table), spec)(tokens, self.weight)


def own_rows(spec: PartitionSpec, dtype: Any, tokens: Array, table: Array) -> Array:
    """The rows of one device's tokens, from its part of the table.

    XLA would gather the whole table, and hold its whole slope. Instead every device looks up its
    columns for all tokens of its fsdp group, which then trade them.
    """
    rows, columns = (*spec, None, None)[:2]
    columns = names_of(columns)
    others = tuple(axis for axis in columns if axis in BATCH_AXES)  # with other tokens
    if others:
        tokens = jax.lax.all_gather(tokens, others, tiled=True)
    if rows is not None:
        tokens = tokens - jax.lax.axis_index(rows) * table.shape[0]
        mine = ((tokens >= 0) & (tokens < table.shape[0]))[..., None]
        x = jnp.where(mine, table[jnp.where(mine[..., 0], tokens, 0)], 0).astype(dtype)
        x = jax.lax.psum(x, rows)  # one of them is not 0
    else:
        x = table[tokens].astype(dtype)
    if same := tuple(axis for axis in columns if axis not in BATCH_AXES):
        x = jax.lax.all_gather(x, same, axis=2, tiled=True)
    return jax.lax.all_to_all(x, others, 0, 2, tiled=True) if others else x


def sees_all(attention: Attention) -> bool:
    """Whether it leaves out nothing within its window; only then rows may lie zigzag."""
    return type(attention) is GQA or (isinstance(attention, MLA) and attention.indexer is None)


NATURAL = None, lambda x: x, lambda x: x


def zigzag_rows(rows: int, length: int) -> tuple[Any, Any, Any]:
    """Where tokens stand, and functions that turn [B, T, ...] to that order and back.

    The order is natural (None) unless the context axis splits rows into even pairs of chunks.
    """
    spec, mesh = tokens_spec(rows, length), jax.sharding.get_abstract_mesh()
    if spec is None or mesh.shape["context"] == 1 or length % (2 * mesh.shape["context"]):
        return NATURAL
    time = PartitionSpec("context")
    local = length // mesh.shape["context"]
    order = per_device(lambda: zigzag_order(local, "context"), (), time)()

    def turn(x, back):
        own = PartitionSpec(*spec[:2])
        return per_device(lambda x: zigzag(x, "context", 1, back), (own,), own)(x)

    return order, functools.partial(turn, back=False), functools.partial(turn, back=True)


class LanguageDecoder(nn.Module):
    """The decoder as a module: hidden states for training, cached logits for decoding."""

    config: Decoder
    dtypes: Dtypes

    def setup(self):
        c = self.config
        self.embedding = Table((c.vocab_size, c.embed_dim), ("vocab", "embed"), self.dtypes)
        self.segments = [
            Segment(c, feed_forward, repeats, self.dtypes, name=f"segment_{index}")
            for index, (feed_forward, repeats) in enumerate(c.segments)
        ]
        self.final_norm = RMSNorm(self.dtypes, eps=c.norm_eps)
        self.mtp = [
            PredictionLayer(c, self.dtypes, name=f"mtp_{depth}")
            for depth in range(c.num_mtp_layers)
        ]
        if not c.tie_embeddings:
            self.head = Table((c.embed_dim, c.vocab_size), ("embed", "vocab"), self.dtypes)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        next_tokens: Int[Array, "B T M"] | None = None,
        embedded: Float[Array, "B T D"] | None = None,
        reach: Int[Array, "B T"] | None = None,
    ) -> Output:
        """`embedded` stands for the tokens' embeddings; `reach` is `Place.reach`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        zigzags = sees_all(self.config.attention) and reach is None
        order, turned, back = zigzag_rows(*tokens.shape) if zigzags else NATURAL
        tokens, positions = turned(tokens), turned(positions)
        segments, next_tokens = (x if x is None else turned(x) for x in (segments, next_tokens))
        place = place_of(self.config, positions, segments, order)._replace(reach=reach)
        x, reports = self.embed(tokens) if embedded is None else turned(embedded), {}
        for segment in self.segments:
            x, _, reports[f"{segment.name}/block"] = segment(x, None, place)
        hidden = self.final_norm(x)
        previous, predicted = hidden, []
        for depth, layer in enumerate(self.mtp if next_tokens is not None else ()):
            embedded = self.embedding(next_tokens[..., depth])
            found = _in_order(layer, previous, embedded, place)
            previous, reports[f"{layer.name}/block"] = found
            predicted.append(previous)
        if self.is_initializing() and not self.config.tie_embeddings:
            _ = self.head.weight  # declares it; losses and samplers read it themselves
        routing, selection = (
            {path: found[kind] for path, found in reports.items() if found[kind]} for kind in (0, 1)
        )
        return Output(back(hidden), tuple(map(back, predicted)), routing, selection)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The tokens' embeddings."""
        return self.embedding(tokens)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        caches: tuple,
        positions: Int[Array, "B T"],
        embedded: Float[Array, "B T D"] | None = None,
        reach: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple]:
        """Final hidden states of tokens at `positions` (-1 is padding), and the grown caches."""
        place = place_of(self.config, positions, (positions >= 0).astype(jnp.int32))
        place = place._replace(reach=reach)
        x, grown = self.embed(tokens) if embedded is None else embedded, []
        for segment, cache in zip(self.segments, caches, strict=True):
            x, cache, _ = segment(x, cache, place)
            grown.append(cache)
        return self.final_norm(x), tuple(grown)


def place_of(config: Decoder, positions: Array, segments: Any, order: Any = None) -> Place:
    """What all layers of a model know of where tokens stand."""
    a = config.attention
    dim = a.head_dim if isinstance(a, GQA) else a.rope_dim
    cosine, sine = rotation(positions, dim, a.rope_theta, a.yarn)
    return Place(cosine, sine, segments, positions, order)


def _in_order(layer: nn.Module, *given: Any) -> Any:
    """layer(*given); backward, its weights' slopes are made before its inputs' go on.

    Else a scheduler may leave them for last, and hold what they need through all other layers.
    """
    if layer.is_initializing():
        return layer(*given)

    def run(layer, *given):
        return layer(*given)

    def backward(back, slopes):
        return jax.lax.optimization_barrier(back(slopes))

    return nn.custom_vjp(run, functools.partial(nn.vjp, run), backward)(layer, *given)
