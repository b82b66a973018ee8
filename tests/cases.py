"""Tiny decoders for the numeric tests: every attention, router and dispatch, and packed batches.

`Case` holds one config's parameters and batch, chosen so that no routing choice is close to a tie
(float32 would then be free to choose otherwise than the float64 reference).
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference

from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import Capacity, Dropless, MoE
from deepseek_jax.layers.router import Hierarchical, Sigmoid, Softmax
from deepseek_jax.layers.sparse_attention import GatedGQA, Indexer
from deepseek_jax.models.build import Model, build
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Yarn

YARN = Yarn(factor=4.0, original_length=8, mscale=0.7, mscale_all_dim=0.9)
SMALL = {"num_heads": 4, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
ATTENTIONS = {
    "gqa": GQA(num_heads=4, num_kv_heads=2, head_dim=8),
    "gqa_window": GQA(num_heads=4, num_kv_heads=1, head_dim=8, window=3),
    "gqa_bias": GQA(num_heads=4, num_kv_heads=4, head_dim=8, bias=True, rope_theta=500.0),
    "mla": MLA(**SMALL),
    "mla_q_rank": MLA(**SMALL, q_rank=12),
    "mla_halves": MLA(**SMALL, interleaved=False),
    "mla_yarn": MLA(**SMALL, yarn=YARN, rope_theta=100.0),
    "mla_indexer": MLA(
        **SMALL, q_rank=12, yarn=YARN, rope_theta=100.0,
        indexer=Indexer(num_heads=16, head_dim=6, top_k=4),
    ),
    "gqa_gate": GatedGQA(num_heads=4, num_kv_heads=2, head_dim=8, ratio=0.4),
}  # fmt: skip
ROUTERS = {
    "softmax": Softmax(num_active_experts=2, scale=1.5),
    "softmax_normalized": Softmax(num_active_experts=3, normalize=True),
    "softmax_grouped": Softmax(num_active_experts=2, num_groups=4, num_active_groups=2, scale=4.0),
    "sigmoid": Sigmoid(num_active_experts=2, scale=2.5),
    "sigmoid_grouped": Sigmoid(num_active_experts=2, num_groups=4, num_active_groups=2, scale=2.5),
    "hierarchical": Hierarchical(num_active_experts=2, num_groups=2, scale=2.0),
}
MORE = {  # outside the product; the first for 12 experts, the last for 1024
    "two_groups_of_three": Hierarchical(
        num_active_experts=4, num_groups=3, num_active_groups=2, normalize=True
    ),
    "everyone": Sigmoid(num_active_experts=8),
    "thousand": Hierarchical(num_active_experts=2, num_groups=32),
}
DISPATCHES = {"dropless": Dropless(), "capacity": Capacity(factor=0.75)}


def decoder(
    attention: str = "mla",
    router: str | None = "sigmoid",
    dispatch: str = "dropless",
    *,
    num_experts: int = 8,
    num_shared_experts: int = 0,
    **fields,
) -> Decoder:
    """A config by the names above; `router=None` is a dense model."""
    moe = None
    if router is not None:
        moe = MoE(
            num_experts=num_experts,
            expert_dim=16,
            router=(ROUTERS | MORE)[router],
            num_shared_experts=num_shared_experts,
            dispatch=DISPATCHES[dispatch],
        )
    base = {"vocab_size": 61, "embed_dim": 32, "num_layers": 1, "mlp_dim": 48}
    return Decoder(**(base | fields), attention=ATTENTIONS[attention], moe=moe)


PRODUCT = tuple(itertools.product(ATTENTIONS, ROUTERS, DISPATCHES))


def random_params(shapes: Any, seed: int) -> Any:
    """Parameters of these shapes with nothing left at a neutral value, as float32 NumPy arrays."""
    rng = np.random.default_rng(seed)

    def leaf(path: str, shape) -> np.ndarray:
        values = rng.normal(size=shape.shape)
        if path.endswith("scale"):
            values = 1 + 0.2 * values
        elif path.endswith(("attention/gate", "indexer/weight")):
            values = 0.5 * values  # choices far from ties
        elif path.endswith("router/bias"):
            values = 0.1 * values
        elif path.endswith(("router/weight", "router/groups")) or "embedding" in path:
            values = 0.5 * values
        else:
            values = 0.2 * values
        return values.astype(np.float32)

    return tree.map_with_path(leaf, shapes)


def make_batch(
    rows: tuple[tuple[int, ...], ...], length: int, num_targets: int, seed: int, vocab_size: int
) -> dict[str, np.ndarray]:
    """Rows of packed documents of these lengths, the rest padding; targets stay in the row."""
    rng = np.random.default_rng(seed)
    shape = (len(rows), length)
    batch = {
        "tokens": rng.integers(1, vocab_size, shape).astype(np.int32),
        "targets": np.zeros((*shape, num_targets), np.int32),
        "weights": np.zeros((*shape, num_targets), np.float32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    for b, documents in enumerate(rows):
        start = 0
        for number, size in enumerate(documents, start=1):
            inside = slice(start, start + size)
            batch["segments"][b, inside] = number
            batch["positions"][b, inside] = np.arange(size)
            for d in range(num_targets):
                known = slice(start, start + size - 1 - d)
                following = slice(start + 1 + d, start + size)
                if size > 1 + d:
                    batch["targets"][b, known, d] = batch["tokens"][b, following]
                    batch["weights"][b, known, d] = 1
            start += size
    batch["tokens"][batch["segments"] == 0] = 0
    return batch


ROWS = ((7, 9), (12,), (5, 6, 5))  # rows of 16: packed, padded, packed


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model, its parameters, a batch and what the reference makes of it."""

    config: Decoder
    model: Model
    params: Any
    batch: dict[str, np.ndarray]
    expected: reference.Result

    @functools.cached_property
    def apply(self):
        """The model's forward pass of (params, batch), compiled."""
        return jax.jit(lambda params, batch: forward(self.model, params, batch))

    def logits(self, hidden) -> np.ndarray:
        """Float64 logits of hidden states, through the head that the model says it has."""
        head = np.asarray(self.model.head(self.params), np.float64)
        return np.asarray(hidden, np.float64) @ head


def forward(model: Model, params: Any, batch: dict[str, Any]):
    """The JAX model's output for a whole batch."""
    num_mtp = model.config.num_mtp_layers
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    return model.apply(
        params,
        batch["tokens"],
        segments=batch["segments"],
        positions=batch["positions"],
        next_tokens=batch["targets"][..., :num_mtp] if num_mtp else None,
    )


def reference_forward(
    params: Any,
    config: Decoder,
    batch: dict[str, Any],
    before: reference.Result | None = None,
) -> reference.Result:
    """The same, in NumPy."""
    return reference.forward(
        params,
        config,
        batch["tokens"],
        batch["segments"],
        batch["positions"],
        batch["targets"][..., : config.num_mtp_layers],
        before,
    )


@functools.cache
def case(
    config: Decoder,
    rows: tuple[tuple[int, ...], ...] = ROWS,
    length: int = 16,
    margin: float = 1e-4,
) -> Case:
    """The first seed's case whose routing choices all keep `margin` from a tie."""
    model = build(config, Precision(compute="float32"))
    for seed in range(100):
        params = random_params(model.shapes, seed)
        batch = make_batch(rows, length, 1 + config.num_mtp_layers, seed, config.vocab_size)
        expected = reference_forward(params, config, batch)
        if expected.margin > margin:
            return Case(config, model, jax.tree.map(jnp.asarray, params), batch, expected)
    raise AssertionError(f"no seed keeps {config} from routing ties")
