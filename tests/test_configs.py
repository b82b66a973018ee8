"""Contract: every file in configs/ loads, says its command, and its model has shapes.

Reference: the released models have the published sizes, by our count and by transformers'. Called
as a program, it prints the README's table of them.
"""

import dataclasses
import pathlib

import jax
import pytest
import torch
import transformers

from deepseek_jax.checkpoint import families
from deepseek_jax.core import tree
from deepseek_jax.core.config import from_dict, load_config, override, to_dict
from deepseek_jax.models.audio import Wav2Vec2
from deepseek_jax.models.build import build
from deepseek_jax.models.counts import num_params
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.fusion import Fused
from deepseek_jax.models.networks import build_network
from deepseek_jax.models.two_tower import TwoTower
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.ops.routing import Sigmoid
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.training.language import inputs_of
from deepseek_jax.training.planning import abstract_batch
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.stages import stage_objective

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
# The dense ones: the hub's count of their parameters, and what their config.json says.
QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
QWEN2 |= {"vocab_size": 152064, "rope_theta": 1e6, "use_sliding_window": False}
MATH = QWEN2 | {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
LLAMA = {
    "model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "vocab_size": 128256, "rope_theta": 5e5, "num_key_value_heads": 8, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "head_dim": 128,
    "vocab_size": 151936, "rope_theta": 1e6, "num_key_value_heads": 8, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        "attn_factor": 0.8782488562869419,
    },
}  # fmt: skip
# Decoders that see: billions as the hub counts them, encoder and all; the decoder's active ones as
# the paper does (arXiv 2412.10302, Table 2), which leaves the embedding out.
SEEING = {"vl2_tiny": (3.37, 0.57), "vl2_small": (16.1, 2.4), "vl2_base": (27.5, 4.1)}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DENSE = {
    "r1_distill_qwen_1_5b": (
        1_777_088_000, MATH | {"vocab_size": 151936, "num_key_value_heads": 2},
        (1536, 8960, 28, 12),
    ),
    "r1_distill_qwen_7b": (
        7_615_616_512, MATH | {"num_key_value_heads": 4}, (3584, 18944, 28, 28),
    ),
    "r1_distill_qwen_14b": (
        14_770_033_664, QWEN2 | {"num_key_value_heads": 8}, (5120, 13824, 48, 40),
    ),
    "r1_distill_qwen_32b": (
        32_763_876_352, QWEN2 | {"num_key_value_heads": 8}, (5120, 27648, 64, 40),
    ),
    "r1_distill_llama_8b": (8_030_261_248, LLAMA, (4096, 14336, 32, 32)),
    "r1_distill_llama_70b": (70_553_706_496, LLAMA, (8192, 28672, 80, 64)),
    "r1_0528_qwen3_8b": (8_190_735_360, QWEN3, (4096, 12288, 36, 32)),
}  # fmt: skip


def model_of(name):
    return load_config(ROOT / f"configs/{name}.py", TrainConfig).model


def size_in_transformers(fields):
    """Of its model of such a config.json, made of shapes alone."""
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**fields)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_models_have_their_published_sizes(name):
    config = model_of(name)
    alone = dataclasses.replace(config, num_mtp_layers=0)
    total, active = num_params(build(alone))
    assert round(total / 1e9, 3) == PUBLISHED[name][0]
    assert float(f"{active / 1e9:.3g}") == PUBLISHED[name][1]
    if config.num_mtp_layers:
        more = 11.62 if config.attention.indexer else 11.61
        assert round((num_params(build(config))[0] - total) / 1e9, 2) == more
    fields = families.hf_config(alone, {}, "bfloat16")
    if fields["model_type"] in transformers.CONFIG_MAPPING:
        assert size_in_transformers(fields) == total


@pytest.mark.filterwarnings("ignore")  # of transformers, about rope
@pytest.mark.parametrize("name", DENSE)
def test_dense_models_are_exactly_the_published_ones(name):
    """By the hub's count, by transformers', and field by field as the loader reads config.json."""
    published, fields, sizes = DENSE[name]
    fields = fields | dict(zip(SIZES, sizes, strict=True))
    ours = model_of(f"deepseek_{name}")
    assert num_params(build(ours)) == (published, published)
    assert size_in_transformers(fields) == published
    assert dataclasses.replace(families.decoder(fields), remat=ours.remat) == ours


VL2 = {  # arXiv 2412.10302, Table 2: rates, tokens, rows and the routers' steps of three stages
    "tiny": ((5.4e-4, 5.4e-4, 3e-5), (2e9, 798.5e9, 19.5e9), (256, 2304, 64), (0, 0, 0)),
    "small": ((4.2e-4, 4.2e-4, 1.4e-5), (2e9, 808.9e9, 20e9), (256, 2304, 64), (0, 0, 0)),
    "base": ((4.5e-4, 4.5e-4, 2e-5), (2e9, 796.5e9, 19.5e9), (256, 3360, 64), (0, 1e-3, 0)),
}


@pytest.mark.parametrize("size", VL2)
def test_vl2_is_trained_as_published(size):
    config = load_config(ROOT / f"configs/deepseek_vl2_{size}.py", TrainConfig)
    stages, model = config.filled_stages(), build_network(config.model)
    optimizers = [stage.optimizer for stage in stages]
    assert tuple(o.learning_rate for o in optimizers) == VL2[size][0]
    assert tuple(stage.tokens for stage in stages) == VL2[size][1]
    assert tuple(stage.batch_size for stage in stages) == VL2[size][2]
    assert [type(o.schedule).__name__ for o in optimizers] == ["Cosine", "Stairs", "Constant"]
    for o in optimizers:
        assert (o.weight_decay, o.clip_norm, o.b1, o.b2) == (0.1, 1.0, 0.9, 0.95)
        assert [(one.paths, one.factor) for one in o.slower] == [("vision/*", 0.1)]
        assert o.variance_dtype == ("bfloat16" if size == "base" else "float32")
    assert {stage.sequence_length for stage in stages} == {4096}
    assert config.model.moe.balance.sequence_weight == (0.0001 if size == "base" else 0.001)
    found = [stage_objective(stage, model, i) for i, stage in enumerate(stages)]
    sigmoid = isinstance(config.model.moe.router, Sigmoid)
    rates = [max(one.bias_rates.values(), default=0) if sigmoid else 0 for one in found]
    assert tuple(rates) == VL2[size][3]
    paths = tree.flatten(model.shapes)
    for one, learns in zip(found, (False, True, True), strict=True):
        assert one.trains("vision/positions")
        assert one.trains("language/embedding/weight") == learns
    assert set(paths) == {path for path in paths if found[1].trains(path)}


@pytest.mark.parametrize("name", SEEING)
def test_decoders_that_see_have_their_published_sizes(name):
    config = model_of(f"deepseek_{name}")
    total, _ = num_params(build_network(config))
    pool = 1152 * (1 + 4 * 1152 + 2 * 4304)  # SigLIP's, which counts there and is left out here
    assert float(f"{(total + pool) / 1e9:.3g}") == SEEING[name][0]
    _, active = num_params(build(config.language))
    active -= config.language.vocab_size * config.language.embed_dim
    assert active / 1e9 == pytest.approx(SEEING[name][1], abs=0.06)


def table():
    """The released models as the README shows them."""
    rows = ["| config | parameters | active a token |", "|---|---|---|"]
    for path in CONFIGS:
        if path.startswith("configs/deepseek_"):
            alone = model_of(pathlib.Path(path).stem)
            if isinstance(alone, Decoder):
                alone = dataclasses.replace(alone, num_mtp_layers=0)
            total, active = (f"{size / 1e9:.3f} B" for size in num_params(build_network(alone)))
            rows.append(f"| `{path}` | {total} | {active} |")
    return "\n".join(rows)


def test_the_readme_shows_every_released_model():
    others = [f"deepseek_{name}" for name in [*DENSE, *SEEING]]
    released = {f"configs/{name}.py" for name in [*PUBLISHED, *others]}
    assert released == {path for path in CONFIGS if path.startswith("configs/deepseek_")}
    assert table() in (ROOT / "README.md").read_text(), "paste what this file prints"


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
    model = build_network(config.model, config.precision)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(model.shapes)
    total, active = num_params(model)
    leaves = tree.flatten(shapes)
    sizes = [leaf.size for path, leaf in leaves.items() if not path.endswith("router/bias")]
    assert sum(sizes) == total >= active > 0
    if isinstance(config.model, Fused):
        assert active == total
        assert config.model.names == config.data.modalities
        return
    if isinstance(config.model, TwoTower):
        assert active == total
        images = jax.ShapeDtypeStruct((2, *config.model.image.image_size, 3), "float32")
        tokens = jax.ShapeDtypeStruct((2, config.sequence_length), "int32")
        pair = jax.eval_shape(model.apply, shapes, images, tokens)
        assert pair.image.shape == pair.text.shape == (2, config.model.shared_dim)
        return
    if isinstance(config.model, Wav2Vec2):
        assert active == total
        wave = jax.ShapeDtypeStruct((2, config.sequence_length), "float32")
        found = jax.eval_shape(lambda params, wave: model.apply(params, wave=wave), shapes, wave)
        frames = config.model.num_frames(config.sequence_length)
        assert found.hidden.shape == (2, frames, config.model.transformer.embed_dim)
        return
    moe = config.model.moe
    assert (active < total) == (moe is not None and moe.router.num_active_experts < moe.num_experts)
    tokens = jax.ShapeDtypeStruct((1, 16), "int32")
    output = jax.eval_shape(model.apply, shapes, tokens)
    decoder = config.model
    if isinstance(decoder, VisionLanguage):
        decoder = decoder.language
        batch = abstract_batch(make_mesh(MeshShape(data=8)), 8, 1024, config)
        seen = jax.eval_shape(lambda p, b: model.apply(p, **inputs_of(b)), shapes, batch)
        assert seen.hidden.shape == (8, 1024, decoder.embed_dim)
    assert output.hidden.shape == (1, 16, decoder.embed_dim)


if __name__ == "__main__":
    print(table())
