"""Decoders that see in training: resumed runs, frozen parts, meshes, starts in parts, refusals."""

import dataclasses
import json

import cases
import jax
import numpy as np
import pytest
import transformers
from encoder_cases import on_disk, randomized
from media_cases import film, wav
from PIL import Image
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import deepseek_jax
from deepseek_jax import evaluate
from deepseek_jax.checkpoint.manager import load_params, resolve
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.media import MediaFolder
from deepseek_jax.data.seeing import Seeing, SeeingPart
from deepseek_jax.data.tokenizer import BPE
from deepseek_jax.evaluation.answers import answers, samples
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.audio import Whisper
from deepseek_jax.models.counts import train_flops_per_token
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.ear import Ear
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.projectors import DownsampleProjector, SplitProjector
from deepseek_jax.models.sam import SAM
from deepseek_jax.models.vision_language import (
    VisionLanguage,
    build_vision_language,
)
from deepseek_jax.models.vit import ViT
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings
from deepseek_jax.serving.encoder import load_encoder
from deepseek_jax.train import dry_run
from deepseek_jax.training.language import Language, inputs_of, make_language
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.optimizer import AdamW, Constant
from deepseek_jax.training.planning import abstract_batch
from deepseek_jax.training.recipe import InitPart, Stage, TrainConfig
from deepseek_jax.training.stages import sized, stage_data, stage_objective, stage_state
from deepseek_jax.training.start import params_of_parts
from deepseek_jax.training.step import make_gradients

VIEW = ViT(
    transformer=Transformer(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48),
    image_size=(16, 16), patch_size=8, class_token=False, pooling="none",
)  # fmt: skip
COLORS = ("red", "green", "blue")
EAR = Ear(
    encoder=Whisper(
        transformer=Transformer(num_layers=1, embed_dim=32, num_heads=4, mlp_dim=48),
        num_mels=8, num_positions=6,
    ),
    join=3,
)  # fmt: skip


TWO = Hybrid(
    low=dataclasses.replace(VIEW, transformer=dataclasses.replace(VIEW.transformer, num_layers=1)),
    high=SAM(
        transformer=Transformer(num_layers=2, embed_dim=24, num_heads=3, mlp_dim=48),
        image_size=24, patch_size=4, window=3, whole_layers=(1,), output_dim=8,
    ),
)  # fmt: skip


def model_config(**fields):
    decoder = cases.decoder("gqa", "sigmoid", num_layers=2, num_dense_layers=1, vocab_size=320)
    return VisionLanguage(language=decoder, vision=VIEW, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty pictures in three colors, and which color it is."""
    folder, lines = tmp_path_factory.mktemp("colors"), []
    for i in range(30):
        color = [30, 30, 30]
        color[i % 3] = 150 + 3 * i
        Image.new("RGB", (18, 20), tuple(color)).save(folder / f"{i}.png")
        said = ({"role": "user", "content": "<image>?"},)
        said += ({"role": "assistant", "content": COLORS[i % 3]},)
        lines.append(json.dumps({"image": f"{i}.png", "messages": said}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def senses(tmp_path_factory):
    """High and low tones, some in two windows, and films that grow brighter or darker."""
    folder, lines = tmp_path_factory.mktemp("senses"), []
    for i in range(32):
        high, times = i % 2, np.arange(1200 + 60 * i) / 16_000
        wav(folder / f"{i}.wav", 0.3 * np.sin(2 * np.pi * (300 + 10 * i + 2000 * high) * times))
        levels = [60 + i, 180 + i] if high else [180 + i, 60 + i]
        film(folder / f"{i}.mkv", np.stack([np.full((18, 10, 3), x, np.uint8) for x in levels]))
        for kind, ending, words in (
            ("audio", "wav", ("low", "high")), ("video", "mkv", ("darker", "brighter")),
        ):  # fmt: skip
            said = ({"role": "user", "content": f"<{kind}>?"},)
            said += ({"role": "assistant", "content": words[high]},)
            lines.append(json.dumps({kind: f"{i}.{ending}", "messages": said}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def hearing(senses, run_dir, **fields):
    """A run whose model takes films as patches, and sounds."""
    flexible = NaFlex(transformer=VIEW.transformer, grid_size=2, patch_size=8, pooling="none")
    model = dataclasses.replace(
        model_config(), vision=flexible, max_patches=4, audio=EAR, init_scale=0.1
    )
    config = recipe(senses, run_dir, model=model)
    data = dataclasses.replace(config.data, views=2, frames=2, windows=2)
    return dataclasses.replace(config, data=data, **fields)


def recipe(folder, run_dir, **fields):
    part = SeeingPart(source=MediaFolder(path=str(folder)))
    data = Seeing(parts=(part,), tokenizer=BPE(vocab_size=290), cache_dir=str(folder / "cache"))
    base = {"steps": 3, "batch_size": 8, "sequence_length": 32, "log_every": 1}
    base |= {"precision": Precision(compute="float32"), "model": model_config(), "data": data}
    base |= {"optimizer": AdamW(learning_rate=1e-2, schedule=Constant())}
    return TrainConfig(run_dir=str(run_dir), **(base | fields))


def of_two(folder, run_dir, **fields):
    """A run whose model sees each picture in two sizes."""
    model = dataclasses.replace(model_config(), vision=TWO, projector=SplitProjector())
    config = recipe(folder, run_dir, model=model, **fields)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, normalization="clip+half")
    )


LENT = Lent(answers, samples)
ALIGN, ALL = Stage(name="align", trainable=("projector/*",)), Stage(name="all")


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_behind_a_boundary_and_loads(folder, tmp_path, capsys):
    """Behind it views are larger; questions see themselves both ways, also where it is used."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seeing = {"model": model_config(prefix="question")}
    larger = dataclasses.replace(recipe(folder, whole).data, size=24)
    one, longer = (dataclasses.replace(ALL, steps=n, data=larger) for n in (1, 40))
    assert train(recipe(folder, whole, stages=(ALIGN, longer), **seeing), LENT) == 0
    said = capsys.readouterr().out
    assert "held-out questions, answers" in said and "accuracy" in said
    model = build_vision_language(model_config(), Precision(compute="float32"))
    key = jax.random.key(0)  # inside, as in the loop: as an argument it is another program
    fresh = tree.flatten(jax.jit(lambda: model.init(key))())
    for stages in ((ALIGN,), (ALIGN, one), (ALIGN, longer)):
        assert train(recipe(folder, parts, stages=stages, **seeing), LENT) == 0
        found = tree.flatten(load_params(resolve(parts), model.shapes, model.layers))
        for path, leaf in found.items():
            if "attention/k/bias" not in path:  # which softmax does not see
                frozen = len(stages) == 1 and not path.startswith("projector/")
                assert np.array_equal(leaf, fresh[path]) == frozen, path
    assert losses(whole) == losses(parts)

    scores = json.loads((whole / "eval.jsonl").read_text().splitlines()[-1])
    assert scores["accuracy"] > 0.9 > scores["majority_accuracy"]
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(whole), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == scores["accuracy"]
    lm = deepseek_jax.load(whole)
    assert lm.config.vision.image_size == (24, 24) and lm.config.view_tokens == 9
    pictures = [np.full((20, 20, 3), color, np.uint8) for color in ((250, 30, 30), (30, 30, 240))]
    prompts = ["User: <image>?\n\nAssistant:"] * 2
    found = lm.generate(prompts, images=pictures, max_new_tokens=8)
    assert [text.strip() for text in found] == ["red", "blue"]


@pytest.mark.slow
def test_a_run_hears_and_sees_films(senses, tmp_path, capsys):
    config = hearing(senses, tmp_path, steps=60, batch_size=16)
    assert train(config, LENT) == 0
    said = capsys.readouterr().out
    assert "<audio>? -> " in said and "<video>? -> " in said
    scores = json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[-1])
    assert scores["accuracy"] > 0.9 > 0.6 > scores["majority_accuracy"]
    evaluate.main(["--checkpoint", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == scores["accuracy"]
    lm, times = deepseek_jax.load(tmp_path), np.arange(1700) / 16_000
    tones = [0.3 * np.sin(2 * np.pi * pitch * times) for pitch in (450, 2450)]
    prompts = ["User: <audio>?\n\nAssistant:"] * 2
    found = lm.generate(prompts, audio=tones, max_new_tokens=8)
    assert [text.strip() for text in found] == ["low", "high"]
    films = [str(senses / f"{i}.mkv") for i in (4, 5)]
    prompts = ["User: <video>?\n\nAssistant:"] * 2
    found = lm.generate(prompts, video=films, num_frames=2, max_new_tokens=8)
    assert [text.strip() for text in found] == ["darker", "brighter"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "heard, sizes",
    [(False, {"data": 2, "fsdp": 2, "tensor": 2}), (True, {"fsdp": 2, "expert": 2, "tensor": 2})],
    ids=str,
)
def test_a_mesh_changes_nothing(folder, senses, tmp_path, heard, sizes):
    config = recipe(folder, tmp_path)
    seeing = dataclasses.replace(config.model, projector=DownsampleProjector())
    data = dataclasses.replace(config.data, views=2)
    config = dataclasses.replace(config, model=seeing, data=data)
    if heard:  # its weights are tripled, too: larger ones would amplify rounding
        config = hearing(senses, tmp_path)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, init_scale=0.02)
        )
    model = build_vision_language(config.model, Precision(compute="float32"))
    params = model.init(jax.random.key(1))
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)  # attention of some size
    batch = stage_data(config, config.filled_stages()[0]).train.batch(np.arange(8))
    gradients = make_gradients(make_language(Language(), model))
    alone = jax.jit(gradients)(params, batch, jax.random.key(0), np.float32(1))
    mesh = make_mesh(MeshShape(**sizes))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, model.specs, model.shapes))
        given = place_batch(mesh, batch), jax.random.key(0), np.float32(1)
        found = jax.jit(gradients)(placed, *given)
    for name, mean in alone[1].items():
        np.testing.assert_allclose(found[1][name], mean, rtol=1e-5, atol=1e-6, err_msg=name)
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(alone[0]))
    other = tree.flatten(found[0])
    for path, grad in tree.flatten(alone[0]).items():
        atol = 1e-5 * largest
        np.testing.assert_allclose(other[path], grad, rtol=1e-4, atol=atol, err_msg=path)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Folders of transformers': a CLIP, a Llama and a Whisper's encoder."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    shape |= {"intermediate_size": 48}
    clip = transformers.CLIPConfig(
        text_config=shape | {"vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49},
        vision_config=shape | {"image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    llama = transformers.LlamaConfig(**shape, vocab_size=320, tie_word_embeddings=False)
    whisper = transformers.WhisperConfig(
        num_mel_bins=8, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48,
        d_model=32, max_source_positions=6,
    )  # fmt: skip
    models = transformers.CLIPModel(clip), transformers.LlamaForCausalLM(llama)
    models += (WhisperEncoder(whisper),)
    paths = [tmp_path_factory.mktemp(name) for name in ("clip", "llama", "whisper")]
    for path, model in zip(paths, models, strict=True):
        randomized(model).save_pretrained(path)
    return paths


def test_parts_start_from_others(folder, tmp_path, given):
    clip, llama, whisper = (
        load_encoder(given[0]),
        deepseek_jax.load(given[1]),
        load_encoder(given[2]),
    )
    vision = dataclasses.replace(clip.config.image, pooling="none")
    language = dataclasses.replace(llama.config, scan=True)
    parts = tuple(
        InitPart(part=name, source=str(path))
        for name, path in zip(("vision", "language", "audio"), given, strict=True)
    )
    ear = Ear(encoder=whisper.config, join=2)
    seeing = VisionLanguage(language=language, vision=vision, audio=ear)
    config = recipe(folder, tmp_path, model=seeing, init_parts=parts)
    model = build_vision_language(seeing, config.precision)
    mesh = make_mesh(MeshShape(fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        abstract = stage_state(config, model, mesh).params
        found, said = params_of_parts(config, model, abstract)
    assert said.endswith("the rest anew") and str(given[0]) in said
    flat = tree.flatten(found)
    assert flat.keys() == tree.flatten(model.shapes).keys()
    for path, leaf in tree.flatten(abstract).items():
        assert flat[path].sharding == leaf.sharding, path
    ours = on_disk(found, model.layers)
    for part, other, inside in (
        ("vision", on_disk(clip.params, clip.towers.layers), "image/"),
        ("language", on_disk(llama.params, llama.model.layers), ""),
        ("audio/encoder", on_disk(whisper.params, whisper.encoder.layers), ""),
    ):
        for path, leaf in ours.items():
            if path.startswith(f"{part}/"):
                there = other[inside + path.removeprefix(f"{part}/")]
                np.testing.assert_array_equal(leaf, there, err_msg=path)

    faster = dataclasses.replace(language.attention, rope_theta=5000.0)
    turned = dataclasses.replace(seeing, language=dataclasses.replace(language, attention=faster))
    with jax.set_mesh(mesh):
        said = params_of_parts(dataclasses.replace(config, model=turned), model, abstract)[1]
    assert said.endswith("computes otherwise: language.attention.rope_theta was 10000.0, is 5000.0")

    wide = dataclasses.replace(vision, image_size=(24, 24))
    for changes, more, why in (
        ({"vision": wide}, parts, r"init_parts\[0\].*does not fit model.vision: positions is "),
        ({"vision": VIEW}, parts[:1], r"class_token is not in this model"),
        ({}, (InitPart(part="language", source=str(given[0])),), "holds a TwoTower; language"),
        ({"audio": EAR}, (InitPart(part="audio", source=str(given[1])),), "one of Whisper, Vision"),
    ):
        changed = dataclasses.replace(seeing, **changes)
        bad = dataclasses.replace(config, model=changed, init_parts=more)
        model = build_vision_language(changed, config.precision)
        with jax.set_mesh(mesh), pytest.raises(InputError, match=why):
            params_of_parts(bad, model, stage_state(bad, model, mesh).params)


def test_each_of_two_encoders_starts_from_its_own(folder, tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "image_size": 16}
    low = transformers.SiglipVisionConfig(
        **sizes, intermediate_size=48, patch_size=8, hidden_act="gelu"
    )
    high = transformers.SamVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=24, patch_size=4,
        window_size=3, global_attn_indexes=[1], output_channels=8, mlp_dim=48,
    )  # fmt: skip
    models = {"vision_low": transformers.SiglipVisionModel(low)}
    models["vision_high"] = transformers.SamVisionModel(high)
    for name, model in models.items():
        randomized(model).save_pretrained(tmp_path / name)
    parts = tuple(InitPart(part=name, source=str(tmp_path / name)) for name in models)
    config = of_two(folder, tmp_path, init_parts=parts)
    model, mesh = build_vision_language(config.model, config.precision), make_mesh(MeshShape())
    with jax.set_mesh(mesh):
        found, said = params_of_parts(config, model, stage_state(config, model, mesh).params)
    assert "otherwise" not in said
    ours = on_disk(found, model.layers)
    for name in models:
        own, inside = load_encoder(tmp_path / name), f"vision/{name.removeprefix('vision_')}/"
        there = on_disk(own.params, own.encoder.layers)
        compared = {p.removeprefix(inside): x for p, x in ours.items() if p.startswith(inside)}
        assert {p for p in there.keys() - compared.keys() if not p.startswith("head/")} == set()
        for path, leaf in compared.items():
            np.testing.assert_array_equal(leaf, there[path], err_msg=path)
    with pytest.raises(ValueError, match="model.vision must be a Hybrid for its encoders"):
        recipe(folder, tmp_path, init_parts=parts[:1])


def test_flops_are_those_of_the_encoder_and_the_decoder():
    """Against XLA's count of the encoders' forward passes, three times."""
    one = dataclasses.replace(VIEW.transformer, num_layers=1)  # of a loop XLA counts one round
    large = dataclasses.replace(one, embed_dim=96, mlp_dim=384)
    wide = dataclasses.replace(EAR.encoder, transformer=large, num_positions=60)
    config = dataclasses.replace(
        model_config(),
        projector=DownsampleProjector(),
        vision=dataclasses.replace(VIEW, transformer=one),
        audio=dataclasses.replace(EAR, encoder=wide),
    )
    model = build_vision_language(config, Precision(compute="float32"))
    views = jax.ShapeDtypeStruct((1, 2, 16, 16, 3), "float32")
    counted = jax.jit(model.features).lower(model.shapes, views).cost_analysis()["flops"]
    ours = 32 * (train_flops_per_token(model, 32, 2) - train_flops_per_token(model, 32))
    assert ours == pytest.approx(3 * counted, rel=0.15)  # which counts norms and softmax, too
    mel = jax.ShapeDtypeStruct((2, 120, 8), "float32")
    ear = build_encoder(wide, Precision(compute="float32"))
    heard = jax.jit(ear.apply).lower(ear.shapes, mel=mel).cost_analysis()["flops"]
    layers = tree.flatten(model.shapes["audio"]["projector"])
    heard += 2 * 2 * 20 * sum(x.size for path, x in layers.items() if path.endswith("/weight"))
    ours = 32 * (train_flops_per_token(model, 32, 0, 2) - train_flops_per_token(model, 32))
    assert ours == pytest.approx(3 * heard, rel=0.15)
    high = dataclasses.replace(TWO.high.transformer, embed_dim=96, num_heads=4, mlp_dim=384)
    two = Hybrid(
        low=dataclasses.replace(TWO.low, transformer=large),
        high=dataclasses.replace(
            TWO.high, transformer=high, relative_positions=False, output_dim=64, image_size=96
        ),
    )
    config = dataclasses.replace(model_config(), vision=two, projector=SplitProjector())
    model = build_vision_language(config, Precision(compute="float32"))
    views = jax.ShapeDtypeStruct((1, 2, *config.view_shape), "float32")
    counted = jax.jit(model.features).lower(model.shapes, views).cost_analysis()["flops"]
    ours = 32 * (train_flops_per_token(model, 32, 2) - train_flops_per_token(model, 32))
    assert ours == pytest.approx(3 * counted, rel=0.15)


def test_a_plans_batch_is_a_runs(senses, folder, tmp_path):
    mesh = make_mesh(MeshShape(fsdp=2), jax.devices()[:2])
    configs = hearing(senses, tmp_path), recipe(folder, tmp_path), of_two(folder, tmp_path)
    for config in configs:
        batch = stage_data(config, config.filled_stages()[0]).train.batch(np.arange(4))
        planned = abstract_batch(mesh, 4, config.sequence_length, config)
        found, wanted = ({n: (x.shape, x.dtype) for n, x in b.items()} for b in (planned, batch))
        assert found == wanted
        assert ("sounds" in batch) == (config.model.audio is not None)


def test_a_stage_of_larger_views_is_planned_as_it_runs(folder, tmp_path):
    config = recipe(folder, tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, size=24))
    (stage,), mesh = config.filled_stages(), make_mesh(MeshShape(data=8))
    batch = stage_data(config, stage).train.batch(np.arange(8))
    planned = abstract_batch(mesh, 8, 32, config)
    for rows in (batch, planned):
        assert {n: (x.shape, x.dtype) for n, x in rows.items()}["images"] == (
            (8, 1, 24, 24, 3), np.uint8,
        )  # fmt: skip
    assert {n: x.shape for n, x in batch.items()} == {n: x.shape for n, x in planned.items()}
    assert ((batch["sources"] >= 0).sum(1) == 9).all()
    asked = inputs_of(batch)["learned"]
    np.testing.assert_array_equal(asked, batch["weights"][..., 0] > 0)
    model = build_vision_language(config.model, config.precision)
    wide, own = (train_flops_per_token(m, 32, 1) for m in (sized(model, stage), model))
    assert wide > own
    assert "parameters: " in dry_run(config)
    config = hearing(folder, tmp_path)
    data = dataclasses.replace(config.data, size=24, frames=0, windows=0)
    config = dataclasses.replace(config, data=data)
    (stage,) = config.filled_stages()
    batch = stage_data(config, stage).train.batch(np.arange(8))
    planned = abstract_batch(mesh, 8, 32, config)
    assert batch["images"].shape == planned["images"].shape == (8, 2, 9, 192)
    assert (batch["shapes"][:, 0].prod(1) == 9).all()  # a budget of 3 x 3 patches, of 2 x 2 before
    assert ((batch["sources"] >= 0).sum(1) == 9).all()
    model = build_vision_language(config.model, config.precision)
    params = jax.tree.map(jax.numpy.asarray, cases.random_params(model.shapes, 3))
    images = batch["images"].astype(np.float32)
    found = jax.jit(sized(model, stage).features)(params, images, shapes=batch["shapes"])
    at_size = build_vision_language(stage.sized(config.model), config.precision)
    wanted = jax.jit(at_size.features)(params, images, shapes=batch["shapes"])
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match=r"a view is \(9, 192\), and this model's \(4, 192\)"):
        jax.jit(model.features)(params, images, shapes=batch["shapes"])
    loss = stage_objective(stage, model).loss_fn
    assert jax.eval_shape(loss, params, batch, jax.random.key(0))
    assert "->" in samples(sized(model, stage), params, stage_data(config, stage), config)
    with pytest.raises(ValueError, match="views of size 20: a NaFlex takes whole patches of 8"):
        dataclasses.replace(config, data=dataclasses.replace(data, size=20))


def test_what_does_not_belong_together_is_refused(folder, tmp_path):
    config, parts = recipe(folder, tmp_path), (InitPart(part="vision", source="a"),)
    tiles = dataclasses.replace(config.model, projector=DownsampleProjector())
    odd = dataclasses.replace(config.data, size=20)
    for changes, why in (
        ({"data": Data()}, "data is Data; a model of kind VisionLanguage needs Seeing"),
        ({"model": config.model.language}, "data is Seeing"),
        ({"mesh": MeshShape(stage=2)}, "no pipeline and no int4"),
        ({"mesh": MeshShape(slice=2, slice_gradients="int4")}, "no pipeline and no int4"),
        ({"objective": Language(indexer_warmup=True)}, "a decoder that sees has none"),
        ({"model": tiles}, "data.views is 1; one image takes 2"),
        ({"model": tiles, "data": dataclasses.replace(config.data, views=2, size=24)},
         "views of size 24: this model's are laid out for one size"),
        ({"stages": (ALIGN, dataclasses.replace(ALL, data=odd))},
         r"stages\[1\]: data: images of size 20: it must be a multiple of patch_size \(8\)"),
        ({"init_parts": parts * 2}, "each part once"),
        ({"data": dataclasses.replace(config.data, windows=1)}, "1, and this model has no ear"),
        ({"init_parts": (InitPart(part="audio", source="a"),)}, "init_parts has audio, and this"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            dataclasses.replace(config, **changes)
    assert isinstance(config.model.language, Decoder)
