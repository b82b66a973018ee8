"""A model as functions: init and apply over explicit trees, nothing hidden."""

import dataclasses
import functools
import re
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision, compute_dtype
from deepseek_jax.layers.linear import Declared, Dtypes, Normal
from deepseek_jax.layers.moe import Dropless
from deepseek_jax.models.decoder import Decoder, LanguageDecoder, Output, layer_table
from deepseek_jax.ops.matmul import dot, thickened


@dataclasses.dataclass(frozen=True)
class Network:
    """A model as functions. Parameters are nested dicts of arrays, given to every call."""

    config: Any
    dtypes: Dtypes
    declared: Any = dataclasses.field(compare=False)  # a dict: not part of the hash that jit needs
    """Like the parameters: each leaf's shape, dtype, meaning and start (`Declared`)."""
    module: Any

    @property
    def specs(self) -> Any:
        """Like the parameters: each leaf's `core.axes.Spec`."""
        return jax.tree.map(lambda d: d.spec, self.declared, is_leaf=_is_declared)

    @property
    def shapes(self) -> Any:
        """Like the parameters: each leaf's shape and dtype, no arrays."""
        return nn.meta.unbox(self.declared)

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Which layers each stack of blocks holds, as `models.decoder.layer_table` says it.

        A stack is the leaves under PART/segment_N/block; each part counts its layers from 0.
        """
        table: dict[str, tuple[int, ...]] = {}
        counts: dict[str, int] = {}
        for path, leaf in tree.flatten(self.shapes).items():
            if found := STACK.match(path):
                stack, part = found[0], found[1]
                if stack not in table:
                    first = counts.get(part, 0)
                    counts[part] = first + leaf.shape[0]
                    table[stack] = tuple(range(first, counts[part]))
        return table

    def init(self, key: Array) -> Any:
        """Fresh parameters. A leaf depends on the key and its own path alone."""

        def make() -> Any:
            leaves, alike, values = tree.flatten(self.declared, is_leaf=_is_declared), {}, {}
            for path, leaf in leaves.items():
                if leaf.init == "normal" or isinstance(leaf.init, Normal):
                    alike.setdefault(leaf.value.shape, []).append(path)
                elif leaf.init == "sinusoids":
                    values[path] = sinusoids(*leaf.value.shape).astype(leaf.value.dtype)
                else:
                    values[path] = jnp.full_like(leaf.value, STARTS.get(leaf.init, leaf.init))
            for shape, paths in alike.items():  # compiled once for all leaves of a shape
                names = jnp.array([zlib.crc32(path.encode()) for path in paths], jnp.uint32)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, names)
                drawn = jax.vmap(lambda own, shape=shape: jax.random.normal(own, shape))(keys)
                for path, value in zip(paths, drawn, strict=True):
                    own = leaves[path].init
                    scale = own.deviation if isinstance(own, Normal) else self.config.init_scale
                    values[path] = (value * scale).astype(leaves[path].value.dtype)
            ordered = [values[path] for path in leaves]
            return jax.tree.unflatten(jax.tree.structure(self.shapes), ordered)

        return jax.jit(make)()


@dataclasses.dataclass(frozen=True)
class Model(Network):
    """A language model's functions."""

    config: Decoder
    module: LanguageDecoder

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Which layers each stack holds, MTP layers numbered after the last."""
        return layer_table(self.config)

    def apply(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        next_tokens: Int[Array, "B T M"] | None = None,
        drop: bool = True,
    ) -> Output:
        """Final hidden states, MTP ones if `next_tokens` (t+1, t+2, ...) are given, and reports.

        Segment 0 is padding; without segments every row is one document. Tokens attend to earlier
        ones of their own segment. `drop=False` lifts a capacity: for evaluation and serving.
        """
        module = self.module if drop else self._dropless
        return module.apply({"params": params}, tokens, segments, positions, next_tokens)

    def dense(self) -> "Model":
        """The same model, its parameters too, with an indexer that keeps every token."""
        attention = self.config.attention
        indexer = dataclasses.replace(attention.indexer, top_k=2**30)
        attention = dataclasses.replace(attention, indexer=indexer)
        config = dataclasses.replace(self.config, attention=attention)
        module = LanguageDecoder(config, self.dtypes)
        return dataclasses.replace(self, config=config, module=module)

    @property
    def _dropless(self) -> LanguageDecoder:
        config = without_capacity(self.config)
        return self.module if config is self.config else LanguageDecoder(config, self.dtypes)

    def head(self, params: Any) -> Float[Array, "D V"]:
        """The output projection as it is stored; products narrow it themselves."""
        if self.config.tie_embeddings:
            return params["embedding"]["weight"].T
        return params["head"]["weight"]

    def logits(self, params: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of final hidden states."""
        head = self.head(params).astype(hidden.dtype)
        return thickened(lambda x: dot("btd,dv->btv", x, head), hidden)

    def init_cache(self, batch_size: int, length: int) -> tuple:
        """An empty cache for `length` positions a row: one a segment, leaves [R, B, S, ...]."""
        shapes = self.config.attention.cache_shapes.items()
        return tuple(
            {n: jnp.zeros((r, batch_size, length, *s), self.dtypes.compute) for n, s in shapes}
            for _, r in self.config.segments
        )

    def decode(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        cache: tuple,
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T V"], tuple]:
        """Float32 logits of tokens standing at `positions` of their rows, and the grown cache.

        Prefill and decoding are the same call. Position -1 is padding: not written, not attended.
        No capacity applies.
        """
        hidden, cache = self._dropless.apply(
            {"params": params}, tokens, cache, positions, method="decode"
        )
        return self.logits(params, hidden), cache


def sinusoids(length: int, width: int) -> Float[Array, "length width"]:
    """Sines, then cosines, of a place times 10000^(-i / (width / 2 - 1)): Whisper's positions."""
    rates = jnp.exp(-jnp.log(10_000.0) / (width // 2 - 1) * jnp.arange(width // 2))
    angles = jnp.arange(length)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


STACK = re.compile(r"(.*?)segment_\d+/block(?=/)")
STARTS = {"ones": 1.0, "zeros": 0.0}


def _is_declared(node: Any) -> bool:
    return isinstance(node, Declared)


def without_capacity(config: Decoder) -> Decoder:
    """The config, its experts without a capacity; the same object where they have none."""
    moe = config.moe
    if moe is None or isinstance(moe.dispatch, Dropless):
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(moe, dispatch=Dropless()))


def build(config: Decoder, precision: Precision = Precision()) -> Model:
    """The model of a config: no parameters are made, only their shapes."""
    dtypes = dtypes_of(precision)
    module = LanguageDecoder(config, dtypes)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    following = jax.ShapeDtypeStruct((1, 2, config.num_mtp_layers), jnp.int32)
    declared = declarations(module, tokens=tokens, next_tokens=following)
    return Model(config, dtypes, declared, module)


def dtypes_of(precision: Precision) -> Dtypes:
    """What modules need to know of a precision."""
    return Dtypes(jnp.dtype(precision.params), compute_dtype(precision)[0])


def declarations(module: nn.Module, **inputs: Any) -> Any:
    """What a module declares when it is called with inputs (shapes will do): see `Network`."""
    shapes, structure = jax.tree.flatten(jax.eval_shape(lambda: inputs))
    return _declared(module, tuple(shapes), structure)


@functools.lru_cache(maxsize=64)  # a run builds its model for training, for answers, for reports
def _declared(module: nn.Module, shapes: tuple[jax.ShapeDtypeStruct, ...], structure: Any) -> Any:
    init = functools.partial(module.init, jax.random.key(0))
    return jax.eval_shape(init, **jax.tree.unflatten(structure, shapes))["params"]
