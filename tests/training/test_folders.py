"""Learning and round trip: each family trains from a Hugging Face folder and goes back into one."""

import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family_table import family

import deepseek_jax
from deepseek_jax import convert
from deepseek_jax.checkpoint.manager import Checkpoint, Manager
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.optimizer import AdamW, make_optimizer
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import make_gradients, make_train_step

FIRST = {family(name): name for name in reversed(hf_cases.CASES)}  # each family's first case


@pytest.mark.shows("train", "export")
@pytest.mark.filterwarnings("ignore")  # of transformers, about rope
@pytest.mark.parametrize("name", FIRST.values())
def test_a_folder_trains_and_goes_back(name, tmp_path):
    """The loss falls as transformers counts it, too: it opens the trained weights."""
    lm = deepseek_jax.load(hf_cases.save(hf_cases.hf_model(name), tmp_path / "hf"))
    objective = make_language(Language(), lm.model)
    optimizer = make_optimizer(AdamW(weight_decay=0.0), lm.model.specs)
    step = jax.jit(
        make_train_step(make_gradients(objective), objective, optimizer, lambda _: 0.01),
        donate_argnums=0,
    )
    rows = hf_cases.tokens(2)
    batch = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:, None],
        "weights": np.ones((2, hf_cases.LENGTH - 1, 1), np.float32),
        "segments": np.ones((2, hf_cases.LENGTH - 1), np.int32),
        "positions": np.tile(np.arange(hf_cases.LENGTH - 1, dtype=np.int32), (2, 1)),
    }
    state, losses = initial_state(lm.params, optimizer, 1.0), []
    for index in range(8):
        state, metrics = step(state, jax.tree.map(jnp.asarray, batch), jax.random.key(index))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    manager = Manager(tmp_path / "run/checkpoints", Checkpoint(), layer_table(lm.config))
    recorded = {"model": to_dict(lm.config), "precision": to_dict(Precision(compute="float32"))}
    manager.save(8, {"params": state.params}, position=0, config=recorded, files={})
    manager.close()
    convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "back")])
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if lm.config.moe is not None:
        theirs.set_experts_implementation("eager")
    trained = deepseek_jax.load(tmp_path / "run")
    np.testing.assert_allclose(
        trained.logits(rows), hf_cases.logits(theirs, rows), atol=2e-5, rtol=0
    )
    ids = torch.tensor(rows)
    with torch.no_grad():
        last = theirs(ids, labels=ids).loss.item()
    assert last < losses[0] - 0.5
