"""Speech in training: any mesh, resumed runs, transformers' transcripts and folders, refusals."""

import dataclasses
import functools
import io
import json
import wave as wave_files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from encoder_cases import randomized

import deepseek_jax
from deepseek_jax import convert, evaluate
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.media import MediaFolder
from deepseek_jax.data.utterances import Utterances, standardized
from deepseek_jax.evaluation.speech import edits, error_rates
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.audio import CTC, Codebook, Wav2Vec2
from deepseek_jax.models.counts import row_tokens, train_flops_per_token
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings
from deepseek_jax.train import lent_to
from deepseek_jax.training.loop import train
from deepseek_jax.training.optimizer import AdamW, Constant
from deepseek_jax.training.planning import abstract_batch
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.speech import (
    Transcription,
    Wav2Vec,
    hidden,
    make_speech,
    speech_warning,
)
from deepseek_jax.training.step import make_gradients

MODEL = Wav2Vec2(
    transformer=Transformer(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48),
    convolutions=((8, 10, 5), (16, 4, 4), (16, 2, 2)),
    conv_norm="layer",
    position_size=8,
    position_groups=4,
    head=CTC(vocab_size=8),
)
PRETRAINED = dataclasses.replace(MODEL, head=Codebook(num_codes=6, code_dim=8, shared_dim=12))
WAV2VEC = Wav2Vec(mask_share=0.5, mask_span=3, num_distractors=8)
LENGTH = 1200  # samples, 29 frames
ALPHABET = "abcde"


def make_batch(rows, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.integers(400, LENGTH, rows).astype(np.int32)
    wave = rng.normal(size=(rows, LENGTH)).astype(np.float32)
    wave *= np.arange(LENGTH) < counts[:, None]
    labels = rng.integers(1, 7, (rows, 5)).astype(np.int32)
    labels[:, 3:] = np.where(rng.random((rows, 2)) < 0.5, -1, labels[:, 3:])
    numbers = np.arange(rows, dtype=np.int32) + 40
    batch = {"wave": wave, "counts": counts, "labels": labels, "rows": numbers}
    return batch | {"steps": np.full(rows, 7, np.int32)}


KINDS = {"ctc": (MODEL, Transcription()), "wav2vec": (PRETRAINED, WAV2VEC)}


@functools.cache
def gradients(kind):
    """A model, parameters, its objective and its compiled gradient function."""
    config, objective = KINDS[kind]
    model = build_encoder(config, Precision(compute="float32"))
    objective = make_speech(objective, model)
    return model, model.init(jax.random.key(1)), objective, jax.jit(make_gradients(objective))


GIVEN = jax.random.key(0), np.float32(1)


def same_gradients(found, wanted):
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(wanted))
    other = tree.flatten(found)
    for path, grad in tree.flatten(wanted).items():
        atol = 2e-5 * largest
        np.testing.assert_allclose(other[path], grad, rtol=1e-3, atol=atol, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_changes_nothing(kind):
    model, params, objective, alone = gradients(kind)
    batch = make_batch(8)
    grads, means, _ = alone(params, batch, *GIVEN)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, model.specs, model.shapes))
        found = jax.jit(make_gradients(objective))(placed, place_batch(mesh, batch), *GIVEN)
    for name, mean in means.items():
        np.testing.assert_allclose(found[1][name], mean, rtol=1e-5, atol=1e-6, err_msg=name)
    same_gradients(found[0], grads)


def test_microbatches_change_nothing():
    _, params, objective, alone = gradients("ctc")
    batch = make_batch(8)
    halves = jax.jit(make_gradients(objective, 2))(params, batch, *GIVEN)
    grads, means, _ = alone(params, batch, *GIVEN)
    same_gradients(halves[0], grads)
    for name, mean in means.items():
        np.testing.assert_allclose(halves[1][name], mean, rtol=1e-5, atol=1e-6, err_msg=name)


def test_masks_are_of_a_rows_number():
    _, params, _, alone = gradients("wav2vec")
    batch = {name: jnp.asarray(x) for name, x in make_batch(8).items()}
    means = alone(params, batch, *GIVEN)[1]
    assert float(means["code_temperature"]) == pytest.approx(2 * 0.999995**7, rel=1e-6)
    masked, others = map(np.asarray, hidden(WAV2VEC, PRETRAINED, batch))
    half = {name: x[4:] for name, x in batch.items()}
    np.testing.assert_array_equal(hidden(WAV2VEC, PRETRAINED, half)[0], masked[4:])
    frames = np.array([PRETRAINED.num_frames(int(n)) for n in batch["counts"]])
    assert not masked[np.arange(29) >= frames[:, None]].any()
    np.testing.assert_allclose(means["masked"], masked.sum() / frames.sum(), rtol=1e-6)
    assert (masked.sum(1) >= 3).all() and len({row.tobytes() for row in masked}) == 8
    assert all(masked[row, others[row, masked[row]]].all() for row in range(8))


def test_rows_that_cannot_be_said_are_reported_and_teach_nothing():
    _, params, _, alone = gradients("ctc")
    batch = make_batch(8)
    batch["counts"][2] = 90  # a frame, several characters
    grads, means, _ = alone(params, batch, *GIVEN)
    assert means["impossible"] == 0.125 and np.isfinite(means["loss"])
    batch["wave"][2] = 3 * batch["wave"][1]
    again, other, _ = alone(params, batch, *GIVEN)
    assert means["loss"] == other["loss"]
    jax.tree.map(np.testing.assert_array_equal, grads, again)
    assert "12.5% of the rows have more characters than frames" in speech_warning(1, means)


@pytest.mark.parametrize("values, said", [
    ({"perplexity": 1.02, "codes_in_use": 1.02 / 320, "masked": 0.5}, "320 codes of a group 1.02"),
    ({"perplexity": 40.0, "codes_in_use": 40 / 320, "masked": 0.5}, None),
    ({"loss": 3.0, "impossible": 0.0}, None),
])  # fmt: skip
def test_collapse_is_said(values, said):
    found = speech_warning(3, values)
    assert found is None if said is None else said in found


def test_a_step_without_a_masked_frame_fails_loudly():
    _, params, _, alone = gradients("wav2vec")
    batch = make_batch(8) | {"counts": np.full(8, 60, np.int32)}  # a frame each: no span of 3
    values = {name: float(x) for name, x in alone(params, batch, *GIVEN)[1].items()}
    assert values["masked"] == 0 and np.isfinite(list(values.values())).all()
    with pytest.raises(InputError, match="step 9: no frame was masked"):
        speech_warning(9, values)


def test_error_rates():
    assert edits("kitten", "sitting") == 3 and edits("", "ab") == 2 and edits("ab", "") == 2
    rng = np.random.default_rng(0)

    def by_rule(a, b):
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return by_rule(a[1:], b[1:])
        return 1 + min(by_rule(a[1:], b), by_rule(a, b[1:]), by_rule(a[1:], b[1:]))

    for _ in range(30):
        a, b = ("".join(rng.choice(list("ab"), rng.integers(6))) for _ in range(2))
        assert edits(a, b) == by_rule(a, b)
    found = error_rates(["one two", "six"], ["one too", ""])
    assert found == {"character_error_rate": 4 / 10, "word_error_rate": 2 / 3}


# -- runs ------------------------------------------------------------------------------------------


def wav(samples, rate=8000, channels=1):
    stream = io.BytesIO()
    with wave_files.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.repeat(samples, channels) * 2**14).astype("<i2").tobytes())
    return stream.getvalue()


def tone(text, rate=8000):
    """A pitch a character."""
    time = np.arange(int(0.025 * rate)) / rate
    parts = [np.sin(2 * np.pi * (400 + 300 * ALPHABET.find(sign)) * time) for sign in text]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty texts as tones; one file truncated."""
    folder, rng, lines = tmp_path_factory.mktemp("tones"), np.random.default_rng(0), []
    for i in range(40):
        text = "".join(rng.choice(list(ALPHABET), 4))
        (folder / f"{i}.wav").write_bytes(wav(tone(text)))
        lines.append(json.dumps({"audio": f"{i}.wav", "text": text}))
    (folder / "7.wav").write_bytes((folder / "7.wav").read_bytes()[:500])
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def recipe(folder, run_dir, kind="ctc", **fields):
    model, objective = KINDS[kind]
    source = MediaFolder(path=str(folder), group="text")
    data = Utterances(
        source=source, alphabet=ALPHABET, rate=8000, min_seconds=0.03, max_characters=8,
        max_skipped=0.05,
    )  # fmt: skip
    base = {"steps": 4, "batch_size": 8, "sequence_length": LENGTH, "log_every": 1, "save_every": 2}
    base |= {"precision": Precision(compute="float32"), "objective": objective, "model": model}
    base |= {"optimizer": AdamW(learning_rate=3e-3, warmup_steps=1, schedule=Constant())}
    return TrainConfig(data=data, run_dir=str(run_dir), **(base | fields))


def lines(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu", "time")}
        for row in rows
    ]


def run(config):
    return train(config, lent_to(config))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_to_the_bit_and_loads(folder, tmp_path, capsys, kind):
    assert run(recipe(folder, tmp_path / "whole", kind)) == 0
    out = capsys.readouterr()
    assert "7.wav: truncated" in out.err
    assert run(recipe(folder, tmp_path / "parts", kind, steps=2)) == 0
    assert run(recipe(folder, tmp_path / "parts", kind)) == 0
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts] and len(whole) == 4
    scores = json.loads((tmp_path / "whole" / "eval.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(tmp_path / "whole"), "--json", "--batch-size", "8"])
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(scores["loss"], rel=1e-4)
    model = deepseek_jax.load(tmp_path / "whole")
    waves = [tone("abca"), tone("ed")]
    assert model.encode(**model.prepared(waves)).shape == (2, 29, 32)
    if kind == "ctc":
        assert "held-out utterances and what is heard" in out.out
        assert {"character_error_rate", "word_error_rate"} <= scores.keys()
        heard = model.transcribe(waves)
        assert len(heard) == 2 and model.transcribe(waves[1]) == heard[1:]
        tuned(model, waves, tmp_path)
        return
    assert "codes a group" in out.out and {"accuracy", "codes_in_use"} <= scores.keys()
    assert [row["code_temperature"] for row in whole] == pytest.approx(
        [2 * 0.999995**step for step in range(4)], rel=1e-6
    )
    with pytest.raises(InputError, match="a CTC head transcribes"):
        model.transcribe(waves)
    config = recipe(folder, tmp_path / "tuned", steps=1, init_from=str(tmp_path / "whole"))
    assert run(config) == 0
    assert "its new head made anew" in capsys.readouterr().err


def tuned(model, waves, tmp_path):
    """A run as a folder: transformers says the same of a wave, and so does `load`."""
    convert.main(["to-hf", str(tmp_path / "whole"), str(tmp_path / "folder")])
    theirs, info = transformers.Wav2Vec2ForCTC.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    given = model.prepared(waves)
    out = theirs(*(torch.from_numpy(given[n]) for n in ("inputs", "attention_mask")))
    ours = model.encoder.module.apply(
        {"params": model.params}, model.encode(**given), method="logits"
    )
    np.testing.assert_allclose(ours[0], out.logits[0].detach(), atol=1e-4)
    assert deepseek_jax.load(tmp_path / "folder").transcribe(waves) == model.transcribe(waves)


def test_transcripts_are_transformers(tmp_path):
    """A folder with a vocabulary: greedy decoding as transformers' tokenizer does it."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6, "'": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    config = transformers.Wav2Vec2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        conv_dim=[8, 16], conv_kernel=[10, 4], conv_stride=[5, 4], vocab_size=8,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, pad_token_id=0,
        feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    theirs = randomized(transformers.Wav2Vec2ForCTC(config))
    theirs.save_pretrained(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    extractor.save_pretrained(tmp_path)
    ours, rng = deepseek_jax.load(tmp_path), np.random.default_rng(0)
    waves = [5 + rng.normal(size=n).astype(np.float32) for n in (600, 600)]
    given = extractor(waves, sampling_rate=16_000, return_tensors="pt", padding=True)
    with torch.no_grad():
        said = tokenizer.batch_decode(theirs(**given).logits.argmax(-1))
    assert ours.transcribe(waves) == said and len({*said, ""}) == 3
    mine = ours.prepared(waves)
    np.testing.assert_allclose(mine["inputs"], given["input_values"], atol=1e-5)
    other = ours.transcribe([waves[0], waves[1][:300]])
    assert other[0] == said[0]  # a row does not see another's length
    for wrong in ([], [np.zeros((2, 600))], [np.zeros(0)]):
        with pytest.raises(InputError, match="give one wave"):
            ours.transcribe(wrong)
    with pytest.raises(InputError, match="a row has 5 samples"):
        ours.transcribe(np.ones(5))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"word_delimiter_token": "_"}))
    with pytest.raises(InputError, match="separates words by '_'"):
        deepseek_jax.load(tmp_path)


def test_what_does_not_belong_together_is_refused(folder, tmp_path):
    base = recipe(folder, tmp_path)

    def refused(message, **fields):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(base, **fields)

    data = base.data
    refused("objective is Language", objective=TrainConfig.objective)
    refused("data is Data; a model of kind Wav2Vec2 needs Utterances", data=Data())
    refused("head of kind Codebook; model.head is CTC", objective=WAV2VEC)
    refused("model.head is None", model=dataclasses.replace(MODEL, head=None))
    refused("needs data.texts", data=dataclasses.replace(data, texts=False))
    refused("no pipeline and no int4", mesh=MeshShape(stage=2))
    refused("is less than data.min_seconds", sequence_length=200)
    short = dataclasses.replace(data, min_seconds=0.005)
    refused("makes 0 frames, fewer than the 1 that a text needs", data=short)
    with pytest.raises(ValueError, match="makes 5 frames, fewer than the 10 that a masked span"):
        recipe(folder, tmp_path, "wav2vec", objective=Wav2Vec())
    for wrong in ({"code_decay": 0.0}, {"least_code_temperature": 3.0}, {"mask_span": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Wav2Vec(**wrong)
    small = dataclasses.replace(MODEL, head=CTC(vocab_size=4))
    with pytest.raises(InputError, match=r"the tokenizer has 7 tokens, but model.vocab_size is 4"):
        run(recipe(folder, tmp_path / "small", model=small))


def test_a_plan_knows_the_batch_and_the_work(folder, tmp_path):
    config = recipe(folder, tmp_path)
    model = build_encoder(MODEL, Precision(compute="float32"))
    mesh = make_mesh(MeshShape(data=8))
    found = abstract_batch(mesh, 8, LENGTH, config)
    real = make_batch(8)
    assert {n: (x.shape[1:], x.dtype) for n, x in found.items()} == {
        n: ((8,) if n == "labels" else real[n].shape[1:], real[n].dtype) for n in found
    }
    assert row_tokens(model, LENGTH) == 29
    frames = [239, 59, 29]
    convs = [10 * 8 * 239, 4 * 8 * 16 * 59, 2 * 16 * 16 * 29]
    inner = 2 * (4 * 32 * 32 + 2 * 32 * 48) + 16 * 32 + 32 * 8 + 8 * 32 * 32 // 4
    work = sum(convs) + inner * frames[-1] + 2 * 2 * 32 * 29**2
    assert train_flops_per_token(model, LENGTH) * 29 == pytest.approx(6 * work)


def test_silence_and_normalization():
    np.testing.assert_array_equal(standardized(np.zeros(5, np.float32)), 0)
    wave = standardized(np.random.default_rng(0).normal(3, 2, 1000))
    np.testing.assert_allclose([wave.mean(), wave.std()], [0, 1], atol=1e-5)
    assert wave.dtype == np.float32
