"""Classifiers of labelled media: what fits whom, videos and texts that are absent, VQA learned.

Reference: pixels in float64 NumPy. Invariance: what stands where something is absent. Learning:
questions about held-out digits are answered together, and by neither modality alone.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import deepseek_jax
from deepseek_jax import evaluate
from deepseek_jax.core.config import load_config
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.digits import digit_numbers, load_digits
from deepseek_jax.data.labelled import Text
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.data.vision import ImageTransform
from deepseek_jax.data.vqa import DigitQuestions
from deepseek_jax.evaluation.classification import alone_and_together, classification
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.any_modality import AnyModality, Boxes, Words
from deepseek_jax.models.audio import Whisper
from deepseek_jax.models.fusion import Fused, Modality, Weighted, build_fused
from deepseek_jax.models.raw_inputs import encoder_inputs, inputs_of, misfit
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.video import Video
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import Stage, TrainConfig
from deepseek_jax.training.stages import stage_data

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = Transformer(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=12)
FILM = Video(transformer=SMALL, num_frames=2, image_size=(4, 4), tubelet=(1, 4, 4), pooling="mean")
WORDS = TextTower(transformer=SMALL, vocab_size=258, max_length=6)


def vqa(**fields):
    return dataclasses.replace(load_config(ROOT / "configs/vqa_tiny.py", TrainConfig), **fields)


def test_a_run_of_questions_has_one_bpe():
    """Also where later stages ask less, and would make another of it."""
    config = vqa()
    asks = dataclasses.replace(config.data, source=DigitQuestions(asks=("digit",)))
    config = dataclasses.replace(config, stages=(Stage(), Stage(data=asks)))
    first, second = (stage_data(config, stage) for stage in config.filled_stages())
    later = dataclasses.replace(config, data=asks, stages=(Stage(),))
    alone = stage_data(later, later.filled_stages()[0])
    assert first.tokenizer.files() == second.tokenizer.files() != alone.tokenizer.files()


def test_frames_are_normalized_as_pixels_are():
    frames = np.random.default_rng(0).integers(0, 256, (2, 2, 4, 4, 3)).astype(np.uint8)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (frames / 255 - mean) / deviation
    found = encoder_inputs(FILM, jnp.asarray(frames), "imagenet")
    np.testing.assert_allclose(found["clips"], expected, atol=1e-6)


def test_absent_videos_and_texts_change_nothing():
    config = Fused(
        modalities=(Modality(name="video", encoder=FILM), Modality(name="text", encoder=WORDS)),
        num_classes=3, multi_label=True, fusion=Weighted(embed_dim=8), init_scale=0.2,
    )  # fmt: skip
    model, rng = build_fused(config, Precision(compute="float32")), np.random.default_rng(1)
    params, rows = model.init(jax.random.key(0)), 4
    there = {"video": np.array([1, 1, 0, 1], bool), "text": np.array([1, 0, 1, 1], bool)}
    inputs = {
        "video": rng.integers(0, 256, (rows, 2, 4, 4, 3)).astype(np.uint8),
        "text": np.where(np.arange(6) < 4, rng.integers(0, 258, (rows, 6)), -1).astype(np.int32),
    }
    empty = {
        name: np.where(there[name].reshape(-1, *[1] * (x.ndim - 1)), x, np.zeros_like(x))
        for name, x in inputs.items()
    }
    run = jax.jit(lambda batch: model.apply(params, **inputs_of(config, batch, "half")))
    one, other = (run({"inputs": x, "present": there}) for x in (inputs, empty))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.isfinite(one.logits).all() and (np.ptp(one.logits, 0) > 0.01).all()
    weights = np.stack([there["video"], there["text"]], 1)
    np.testing.assert_array_equal(np.asarray(one.weights) > 0, weights)


def test_what_does_not_belong_together_is_refused(tmp_path):
    config = vqa()
    image, text = config.model.modalities

    def given(first=image, second=text, **fields):
        model = dataclasses.replace(config.model, modalities=(first, second))
        return vqa(model=model, **fields)

    deaf = Modality(name="image", encoder=Whisper(transformer=SMALL, num_positions=5))
    with pytest.raises(ValueError, match="image has a Whisper for encoder, and needs a ViT or"):
        given(deaf)
    with pytest.raises(ValueError, match=r"image of the data is \[16, 16, 3\], and its encoder, a"):
        given(data=dataclasses.replace(config.data, image=ImageTransform(size=16)))
    longer = dataclasses.replace(config.data, text=Text(length=13))
    with pytest.raises(ValueError, match=r"text of the data is \[13\], .* takes \[12\]"):
        given(data=longer, sequence_length=13)
    with pytest.raises(ValueError, match=r"data.text.length is 12, and sequence_length.* 20"):
        vqa(sequence_length=20)
    with pytest.raises(ValueError, match=r"data has \['image', 'text'\], and model.modalities"):
        given(second=dataclasses.replace(text, name="sound"))
    few = dataclasses.replace(text.encoder, vocab_size=200)
    wide = dataclasses.replace(config.data, text=Text(tokenizer=Bytes(), length=12))
    config = given(second=dataclasses.replace(text, encoder=few), data=wide)
    with pytest.raises(InputError, match="258 tokens, but model.vocab_size is 200"):
        stage_data(config, config.filled_stages()[0])
    film = dataclasses.replace(
        config.model, modalities=(Modality(name="video", encoder=FILM), config.model.modalities[1])
    )
    both = AnyModality(
        transformer=SMALL, image=Boxes(image_size=(8, 8), box=(1, 4, 4)),
        text=Words(vocab_size=512, max_length=12),
    )  # fmt: skip
    shared = [dataclasses.replace(one, encoder=both) for one in (image, text)]
    assert stage_data(given(*shared), given(*shared).filled_stages()[0])
    small = dataclasses.replace(both, image=Boxes(image_size=(4, 4), box=(1, 4, 4)))
    with pytest.raises(ValueError, match=r"is \[8, 8, 3\], and its encoder, a AnyMo.* \[4, 4, 3\]"):
        given(dataclasses.replace(image, encoder=small))
    short = dataclasses.replace(both, text=Words(vocab_size=512, max_length=9))
    with pytest.raises(ValueError, match=r"text of the data is \[12\], .* takes \[9\]"):
        given(second=dataclasses.replace(text, encoder=short))
    shapes = {"video": ((1, 3, 4, 4, 3), np.uint8), "text": ((1, 12), np.int32)}
    assert "video of the data is [3, 4, 4, 3]" in misfit(film, shapes)
    assert not misfit(film, shapes | {"video": ((1, 2, 4, 4, 3), np.uint8)})


@pytest.mark.slow
def test_questions_about_held_out_digits_are_answered_by_both_together(tmp_path, capsys):
    lent = Lent(classification, alone_and_together)
    kept = {"run_dir": str(tmp_path / "run"), "precision": Precision(compute="float32")}
    data = dataclasses.replace(vqa().data, cache_dir=str(tmp_path / "cache"))
    kept |= {"data": data, "eval_every": 0, "log_every": 50}
    assert train(vqa(steps=150, **kept), lent) == 0
    assert "text alone" in capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[-1])
    assert scores["image_accuracy"] < 0.45 and scores["text_accuracy"] < 0.45
    assert scores["accuracy"] > 0.7

    lm, numbers = deepseek_jax.load(tmp_path / "run"), digit_numbers(0.2, training=False)[:24]
    files = []
    for number in numbers:
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(load_digits().images[number]).save(files[-1])
    told = {
        ask: lm.classify({"image": files, "text": [ask] * len(files)}).labels
        for ask in ("Which digit is this?", "Is it odd or even?")
    }
    digits = load_digits().labels[numbers].tolist()
    which = [(lm.data.classes[digit],) for digit in digits]
    parity = [(("even", "odd")[digit % 2],) for digit in digits]
    for ask, right in (("Which digit is this?", which), ("Is it odd or even?", parity)):
        assert np.mean([a == b for a, b in zip(told[ask], right, strict=True)]) > 0.5
    pixels = np.repeat(load_digits().images[numbers][..., None], 3, axis=-1)
    as_array = lm.classify({"image": pixels, "text": ["Is it odd or even?"] * len(files)})
    assert as_array.labels == told["Is it odd or even?"]
    lacking = ["Is it odd or even?"] * (len(files) - 1) + [None]
    seen = lm.classify({"image": files, "text": lacking})
    assert seen.weights["text"][-1] == 0 and seen.weights["image"][-1] == pytest.approx(1)
    np.testing.assert_allclose(seen.probabilities[:-1], as_array.probabilities[:-1], atol=1e-5)
    for wrong, why in (
        ({"image": [files[0], None]}, "row 1 has none of image, text"),
        ({"image": []}, "or none"),
        ({"image": files[:2], "text": "Is it odd?"}, "numbers of rows"),
        ({"image": str(tmp_path / "none.png")}, "none.png"),
        ({"text": [7]}, "a text is a string, not 7"),
        ({"sound": [np.zeros(9)]}, "one of them or all; not 'sound'"),
    ):
        with pytest.raises(InputError, match=why):
            lm.classify(wrong)
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(tmp_path / "run"), "--json", "--batch-size", "64"])
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(scores["accuracy"], abs=1e-6)
