"""Tiny language models with random weights, and one of them as a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.manager import Checkpoint, Manager
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.tokenizer import Bytes, open_tokenizer
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Sigmoid
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import Decoder, layer_table
from deepseek_jax.serving.language import LanguageModel

ATTENTIONS = {
    "gqa": GQA(num_heads=4, num_kv_heads=2, head_dim=8),
    "gqa window": GQA(num_heads=4, num_kv_heads=1, head_dim=8, window=5, bias=True),
    "mla": MLA(num_heads=2, kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6),
    "mla q_rank": MLA(
        num_heads=2, kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6, q_rank=10, interleaved=False
    ),
}


@pytest.fixture(scope="session")
def tiny():
    """A maker of models by the name of their attention."""
    return _tiny


def _tiny(name):
    tokenizer = open_tokenizer(Bytes())
    config = Decoder(
        vocab_size=tokenizer.vocab_size + 6,  # ids that the tokenizer lacks must never be drawn
        embed_dim=24,
        num_layers=2,
        attention=ATTENTIONS[name],
        mlp_dim=32,
        moe=MoE(
            num_experts=4,
            expert_dim=16,
            num_shared_experts=1,
            router=Sigmoid(num_active_experts=2),
        ),
    )
    model = build(config, Precision(compute="float32"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(s.dtype), model.shapes)
    return LanguageModel(model, jax.tree.map(jnp.asarray, params), tokenizer, config)


@pytest.fixture(scope="session")
def lm():
    """One that no test changes."""
    return _tiny("mla")


@pytest.fixture(scope="session")
def saved(lm, tmp_path_factory):
    """A run directory that holds a checkpoint of `lm`."""
    run = tmp_path_factory.mktemp("run")
    config = {"model": to_dict(lm.config), "precision": to_dict(Precision())}
    manager = Manager(run / "checkpoints", Checkpoint(), layer_table(lm.config))
    manager.save(3, {"params": lm.params}, position=0, config=config, files=lm.tokenizer.files())
    manager.close()
    return run
