"""Reference and learning: the language objective on a decoder that sees; loss on answers alone."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.layers.router import Balance
from deepseek_jax.models.projectors import DownsampleProjector
from deepseek_jax.models.vision_language import TEXT, VisionLanguage, build_vision_language
from deepseek_jax.models.vit import ViT
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.optimizer import AdamW, make_optimizer
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import make_gradients, make_train_step

VIEW = ViT(
    transformer=Transformer(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24),
    image_size=(8, 8), patch_size=4, class_token=False, pooling="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    decoder = cases.decoder("gqa", "sigmoid", num_layers=2, num_dense_layers=1)
    moe = dataclasses.replace(decoder.moe, balance=Balance(bias_rate=0.01))
    config = VisionLanguage(
        language=dataclasses.replace(decoder, moe=moe),
        vision=VIEW,
        projector=DownsampleProjector(),
        init_scale=0.1,
    )
    return build_vision_language(config, Precision(compute="float32"))


@pytest.fixture(scope="module")
def batch(model):
    """Four rows alike but for the picture, each with an answer of its own: tokens 11 to 14."""
    rng = np.random.default_rng(0)
    layout = model.config.sight.layout()
    length = len(layout) + 4
    tokens = np.tile(np.array([1, *[60] * len(layout), 2, 3, 4]), (4, 1)).astype(np.int32)
    tokens[:, -1] = 11 + np.arange(4)
    sources = np.full(tokens.shape, TEXT, np.int32)
    sources[:, 1 : 1 + len(layout)] = layout
    targets = np.roll(tokens, -1, axis=1)[..., None]
    weights = np.zeros((4, length, 1), np.float32)
    weights[:, -2] = 1  # of what comes before the answer
    images = np.tile(rng.normal(size=(4, 1, 8, 8, 3)), (1, model.config.sight.num_views(), 1, 1, 1))
    return {
        "tokens": tokens, "sources": sources, "images": images.astype(np.float32),
        "targets": targets, "weights": weights, "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(length, dtype=np.int32), (4, 1)),
    }  # fmt: skip


def test_the_loss_is_that_of_the_answers(model, batch):
    params = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, 0))
    given = jax.tree.map(jnp.asarray, batch)
    objective = make_language(Language(), model)
    assert objective.bias_rates == {"language/segment_1/block": 0.01}
    terms, routing = jax.jit(objective.loss_fn)(params, given, None)
    assert routing.keys() == objective.bias_rates.keys()
    total, weight = terms["loss"]
    inputs = {k: given[k] for k in ("tokens", "images", "sources", "segments", "positions")}
    logits = model.logits(params, jax.jit(model.apply)(params, **inputs).hidden)
    logits = np.asarray(logits, np.float64)[:, -2]
    chosen = logits[np.arange(4), 11 + np.arange(4)]
    expected = (np.log(np.exp(logits).sum(-1)) - chosen).sum()
    assert weight == 4
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_it_learns_to_tell_pictures_apart(model, batch):
    objective = make_language(Language(), model)
    optimizer = make_optimizer(AdamW(weight_decay=0.0), model.specs)
    step = make_train_step(make_gradients(objective), objective, optimizer, lambda _: 1e-2)
    state = initial_state(model.init(jax.random.key(0)), optimizer, 1.0)
    before, step, losses = tree.flatten(state.params), jax.jit(step), []
    for _ in range(40):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 1.3  # without the picture at best log 4
    assert losses[-1] < 0.1
    for path, leaf in tree.flatten(state.params).items():
        if "attention/k/bias" not in path:  # which softmax does not see
            assert np.abs(np.asarray(leaf) - np.asarray(before[path])).max() > 1e-5, path


def test_there_is_nothing_to_warm_up(model):
    with pytest.raises(InputError, match="needs a model whose attention has an indexer"):
        make_language(Language(indexer_warmup=True), model)
