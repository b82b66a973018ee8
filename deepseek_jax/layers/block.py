"""One transformer block, and the one place that scans and rematerializes blocks."""

from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from deepseek_jax.layers.attention import GQA, GroupedQueryAttention, Place, Selection
from deepseek_jax.layers.linear import Dtypes, RMSNorm, SwiGLU
from deepseek_jax.layers.mla import MLA, LatentAttention
from deepseek_jax.layers.moe import MixtureOfExperts, MoE, Routing
from deepseek_jax.layers.sparse_attention import GatedAttention, GatedGQA
from deepseek_jax.parallel.manual import in_region
from deepseek_jax.parallel.sharding import constrain

Remat = Literal["none", "dots", "full", "offload"]

ATTENTIONS: dict[type, type[nn.Module]] = {
    GQA: GroupedQueryAttention,
    GatedGQA: GatedAttention,
    MLA: LatentAttention,
}
Attention: TypeAlias = GQA | GatedGQA | MLA

LAYER_INPUT = "layer_input"  # the name of what `offload` moves
POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
RECOMPUTED = {"none": 0.0, "dots": 0.0, "full": 1.0, "offload": 1.0}  # forward passes added


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)).

    A MoE part also reports its routing, a sparse attention its selection.
    """

    attention: Attention
    feed_forward: int | MoE
    """A dense part's width, or a mixture of experts."""
    embed_dim: int
    norm_eps: float
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Any, place: Place
    ) -> tuple[Float[Array, "B T D"], tuple[Any, Routing | None, Selection | None]]:
        attend = ATTENTIONS[type(self.attention)](
            self.attention, self.embed_dim, self.dtypes, name="attention"
        )
        place = jax.tree.map(jnp.asarray, place)  # remat makes literals of what is constant
        # Left alone in a region, XLA splits the width of these sums along automatic axes.
        held = constrain if in_region() else lambda x: x
        x = checkpoint_name(held(x), LAYER_INPUT)  # all that a block needs to run again
        norm = RMSNorm(self.dtypes, eps=self.norm_eps, name="attention_norm")
        y, cache, selection = attend(norm(x), place, cache)
        x = held(x + y)
        y = RMSNorm(self.dtypes, eps=self.norm_eps, name="mlp_norm")(x)
        if isinstance(self.feed_forward, MoE):
            moe = MixtureOfExperts(self.feed_forward, self.embed_dim, self.dtypes, name="moe")
            y, routing = moe(y, place.segments, place.order)
            return x + y, (cache, routing, selection)
        y = SwiGLU(self.embed_dim, self.feed_forward, self.dtypes, name="mlp")(y)
        return x + y, (cache, None, selection)


def stacked(repeats: int, remat: Remat, unroll: int, block: type[nn.Module] = Block) -> Any:
    """A module class that runs `repeats` blocks in a scan; every leaf gains a leading dimension.

    Called as module(x, cache, place) -> (x, (cache, routing, selection)), these stacked too; with
    another kind of block as that is called: its second argument has a part for each repeat.
    """
    at_once = min(unroll, repeats)
    if remat != "none":
        # XLA opens a loop of one turn, and would then merge what is computed twice: no remat.
        single = at_once == repeats
        block = nn.remat(block, policy=POLICIES[remat], prevent_cse=single)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=repeats,
        unroll=at_once,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
