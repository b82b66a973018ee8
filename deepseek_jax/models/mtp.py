"""Multi-token prediction as in DeepSeek-V3 (arXiv 2412.19437, section 2.2).

Layer d sees the embedding of token t+1+d beside the previous depth's hidden state at t (after its
final norm), and predicts token t+2+d with the shared head. The embedding comes first, as in the
released weights.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.attention import Place
from deepseek_jax.layers.block import stacked
from deepseek_jax.layers.linear import Dtypes, Projection, RMSNorm
from deepseek_jax.layers.moe import Routing


class PredictionLayer(nn.Module):
    """One prediction depth; its block is like the model's last (a stack of one)."""

    config: Any  # models.decoder.Decoder, which imports this file
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B T D"], embedded: Float[Array, "B T D"], place: Place
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        c = self.config
        joined = jnp.concatenate(
            [
                RMSNorm(self.dtypes, eps=c.norm_eps, name="embedding_norm")(embedded),
                RMSNorm(self.dtypes, eps=c.norm_eps, name="hidden_norm")(hidden),
            ],
            axis=-1,
        )
        shape = (2 * c.embed_dim, c.embed_dim)
        axes = ("embed", "mlp")
        x = Projection("btc,cd->btd", shape, axes, self.dtypes, name="projection")(joined)
        block = stacked(1, c.remat, 1)(
            c.attention, c.moe or c.mlp_dim, c.embed_dim, c.norm_eps, self.dtypes, name="block"
        )
        x, (_, routing) = block(x, None, place)
        return RMSNorm(self.dtypes, eps=c.norm_eps, name="final_norm")(x), routing
