"""Contract: every file in configs/ loads, says its command, and its model has shapes."""

import dataclasses
import pathlib

import jax
import pytest

from deepseek_jax.core import tree
from deepseek_jax.core.config import from_dict, load_config, override, to_dict
from deepseek_jax.models.build import build
from deepseek_jax.models.counts import num_params
from deepseek_jax.training.recipe import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.py"))


# Total parameters in billions without MTP layers, as published (V2-Lite, V2 and V3 papers; the
# 16B and the active counts by the formula of models/counts on the published shapes).
PUBLISHED = {
    "deepseek_moe_16b": (16.376, 2.83),
    "deepseek_v2_lite": (15.706, 2.66),
    "deepseek_v2": (235.741, 21.4),
    "deepseek_v3": (671.026, 37.6),
    "deepseek_v32": (671.878, 38.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_models_have_their_published_sizes(name):
    config = load_config(ROOT / f"configs/{name}.py", TrainConfig).model
    total, active = num_params(build(dataclasses.replace(config, num_mtp_layers=0)))
    assert round(total / 1e9, 3) == PUBLISHED[name][0]
    assert float(f"{active / 1e9:.3g}") == PUBLISHED[name][1]
    if config.num_mtp_layers:
        more = 11.62 if config.attention.indexer else 11.61
        assert round((num_params(build(config))[0] - total) / 1e9, 2) == more


@pytest.fixture(params=CONFIGS)
def config(request):
    return load_config(ROOT / request.param, TrainConfig)


def test_there_is_a_quickstart():
    assert "configs/quickstart.py" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS)
def test_docstring_has_the_command(path):
    docstring = (ROOT / path).read_text().split('"""')[1]
    assert f"python -m deepseek_jax.train --config {path}" in docstring


def test_survives_json(config):
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_takes_flags(config):
    assert override(config, ["--seed", "5"], prog="train").seed == 5


def test_model_has_shapes(config):
    model = build(config.model, config.precision)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(model.shapes)
    total, active = num_params(model)
    leaves = tree.flatten(shapes)
    sizes = [leaf.size for path, leaf in leaves.items() if not path.endswith("router/bias")]
    assert sum(sizes) == total >= active > 0
    moe = config.model.moe
    assert (active < total) == (moe is not None and moe.router.num_active_experts < moe.num_experts)
    tokens = jax.ShapeDtypeStruct((1, 16), "int32")
    output = jax.eval_shape(model.apply, shapes, tokens)
    assert output.hidden.shape == (1, 16, config.model.embed_dim)
