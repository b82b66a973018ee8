"""Classification in training: torch's losses, accumulation, scikit-learn's scores, resumed runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
import torch

import deepseek_jax
from deepseek_jax import evaluate
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.audiovisual import AudioVisual, open_digits
from deepseek_jax.data.pairs import Pairs
from deepseek_jax.evaluation.classification import (
    alone_and_together,
    answers,
    classification,
    scores_of,
)
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.any_modality import AnyModality, Words
from deepseek_jax.models.audio import Whisper
from deepseek_jax.models.counts import row_tokens, train_flops_per_token
from deepseek_jax.models.fusion import Fused, Modality, Progressive, Weighted, build_fused
from deepseek_jax.models.raw_inputs import encoder_inputs
from deepseek_jax.models.vit import ViT
from deepseek_jax.ops.losses import class_losses, label_losses
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.training.classification import (
    Classification,
    make_classification,
)
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.optimizer import AdamW, Constant
from deepseek_jax.training.planning import abstract_batch
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.step import make_gradients

SMALL = Transformer(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24)
LENGTH = 11_200
MODEL = Fused(
    modalities=(
        Modality(name="sound", encoder=Whisper(transformer=SMALL, num_mels=20, num_positions=35)),
        Modality(
            name="image",
            encoder=ViT(transformer=SMALL, image_size=(8, 8), patch_size=4, pooling="mean"),
        ),
    ),
    num_classes=10,
    fusion=Weighted(embed_dim=16),
    init_scale=0.1,
)  # fmt: skip
SHORT = dataclasses.replace(
    MODEL,
    modalities=(
        Modality(name="sound", encoder=Whisper(transformer=SMALL, num_mels=8, num_positions=2)),
        MODEL.modalities[1],
    ),
)


def make_batch(rows, num_labels=None, seed=0, length=640):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 10, rows)
    if num_labels:
        labels = rng.integers(-1, 2, (rows, num_labels))
    there = {"image": rng.random(rows) < 0.7, "sound": rng.random(rows) < 0.7}
    there["image"][0] = there["sound"][0] = False
    return {
        "inputs": {
            "image": rng.integers(0, 256, (rows, 8, 8, 3)).astype(np.uint8),
            "sound": rng.normal(size=(rows, length)).astype(np.float32),
        },
        "present": there,
        "labels": labels.astype(np.int32),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_losses_and_their_slopes_are_torchs(smoothing):
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=(7, 5)).astype(np.float32)
    labels = np.array([0, 4, -1, 2, 2, -1, 1], np.int32)
    many = rng.integers(-1, 2, (7, 5)).astype(np.int32)

    def run(losses, given):
        def total(x):
            each, weights = losses(x, given, smoothing)
            return each.sum(), weights

        (loss, weights), slope = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logits))
        return float(loss), np.asarray(weights), np.asarray(slope)

    theirs = torch.from_numpy(logits).requires_grad_()
    kind = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "sum"}
    torch.nn.functional.cross_entropy(theirs, torch.from_numpy(labels).long(), **kind).backward()
    loss, weights, slope = run(class_losses, jnp.asarray(labels))
    np.testing.assert_allclose(slope, theirs.grad, atol=1e-6)
    np.testing.assert_array_equal(weights, labels >= 0)

    theirs.grad = None
    target = torch.from_numpy(many * (1 - smoothing) + smoothing / 2).float()
    known = torch.from_numpy(many >= 0).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        theirs, target.clamp(0), known, reduction="sum"
    )
    expected.backward()
    loss, weights, slope = run(label_losses, jnp.asarray(many))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(slope, theirs.grad, atol=1e-6)
    np.testing.assert_array_equal(weights, (many >= 0).sum(1))


@pytest.mark.parametrize("labels", [None, 4])
def test_the_objective_means_over_who_is_there_in_any_number_of_parts(labels):
    config = SHORT if labels is None else dataclasses.replace(
        SHORT, num_classes=labels, multi_label=True
    )  # fmt: skip
    model = build_fused(config, Precision(compute="float32"))
    params, batch = model.init(jax.random.key(0)), make_batch(8, labels)
    objective = make_classification(Classification(label_smoothing=0.1), model, "half")
    assert objective.coefficients == {"loss": 1.0, "sound_loss": 1.0, "image_loss": 1.0}
    whole, parts = (
        jax.jit(make_gradients(objective, n))(params, batch, jax.random.key(0), np.float32(1))
        for n in ((1, 2) if labels is None else (1, 1))  # each other number is a program
    )
    for path, slope in tree.flatten(whole[0]).items():
        np.testing.assert_allclose(tree.flatten(parts[0])[path], slope, atol=2e-6, err_msg=path)
    for name, mean in whole[1].items():
        np.testing.assert_allclose(parts[1][name], mean, rtol=1e-5, err_msg=name)
    found = answers(model, params, [batch | {"labels": np.abs(batch["labels"])}], "half")
    present = np.stack([batch["present"][name] for name in config.names], 1)
    known = batch["labels"] >= 0
    for name, logits, there in (
        ("", found["logits"], present.any(1)),
        ("sound_", found["alone"][:, 0], present[:, 0]),
        ("image_", found["alone"][:, 1], present[:, 1]),
    ):
        counted = known & (there if labels is None else there[:, None])
        right = logits.argmax(1) == batch["labels"] if labels is None else (logits > 0) == (
            batch["labels"] > 0
        )  # fmt: skip
        np.testing.assert_allclose(whole[1][f"{name}accuracy"], right[counted].mean(), rtol=1e-6)
        if labels is None:
            kind = {"ignore_index": -1, "label_smoothing": 0.1}
            target = torch.from_numpy(np.where(counted, batch["labels"], -1)).long()
            loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), target, **kind)
            np.testing.assert_allclose(whole[1][f"{name}loss"], loss, rtol=1e-5)
    np.testing.assert_allclose([whole[1]["sound_weight"] + whole[1]["image_weight"]], 1, rtol=1e-6)


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, (200, 3))
    alone = rng.normal(size=(200, 2, 3)) + labels[:, None]
    weights = rng.dirichlet([1, 1], 200)
    found = {"labels": labels, "logits": alone.mean(1), "alone": alone, "weights": weights}
    scores = scores_of(found, ("image", "sound"), ("a", "b", "c"))
    expected = sklearn.metrics.roc_auc_score(labels, found["logits"], average="macro")
    assert scores["auroc"] == pytest.approx(expected, rel=1e-9)
    expected = sklearn.metrics.roc_auc_score(labels, alone[:, 1], average="macro")
    assert scores["sound_auroc"] == pytest.approx(expected, rel=1e-9)
    false, true, _ = sklearn.metrics.roc_curve(labels[:, 1], found["logits"][:, 1])
    assert scores["sensitivity@0.9/b"] == pytest.approx(true[false <= 0.1].max())
    assert 0 < scores["calibration_error"] < 1
    assert scores["image_weight"] + scores["sound_weight"] == pytest.approx(1)
    one = {"labels": labels[:, 0], **{name: found[name] for name in ("logits", "alone", "weights")}}
    single = scores_of(one, ("image", "sound"), ("a", "b", "c"))
    expected = sklearn.metrics.log_loss(
        one["labels"], torch.from_numpy(found["logits"]).softmax(1).numpy(), labels=[0, 1, 2]
    )
    assert single["loss"] == pytest.approx(expected, rel=1e-9)
    assert single["accuracy"] == (found["logits"].argmax(1) == one["labels"]).mean()


def recipe(run_dir, **fields):
    cache = {"cache_dir": str(run_dir.parent / "sounds"), "voices": ("m1", "f2"), "pitches": (50,)}
    data = AudioVisual(image_noise=(0.0, 0.3), sound_noise=(0.0, 1.0), missing=0.1, **cache)
    base = {"model": MODEL, "data": data, "objective": Classification(), "run_dir": str(run_dir)}
    base |= {"steps": 30, "batch_size": 32, "sequence_length": LENGTH, "log_every": 1}
    base |= {"optimizer": AdamW(learning_rate=1e-2, warmup_steps=3, schedule=Constant())}
    return TrainConfig(**(base | {"precision": Precision(compute="float32")} | fields))


def test_shapes_and_costs_are_known_before_anything_runs(tmp_path):
    config = recipe(tmp_path / "run")
    mesh = make_mesh(MeshShape(data=2), jax.devices()[:2])
    told = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_batch(mesh, 6, LENGTH, config))
    made = jax.tree.map(lambda x: (x.shape, x.dtype), make_batch(6, length=LENGTH))
    assert told == made
    model = build_fused(MODEL)
    assert row_tokens(model, LENGTH) == 35 + 5
    whole = train_flops_per_token(model, LENGTH) * 40
    joint = dataclasses.replace(
        MODEL, fusion=Progressive(transformer=SMALL, first_joint_layer=0)
    )  # fmt: skip
    block = 4 * 16 * 16 + 2 * 16 * 24  # weights of a block's products
    assert whole > 6 * 40 * block
    more = train_flops_per_token(build_fused(joint), LENGTH) * 40 - whole
    # A block over all tokens, which come in by a layer each, and a head; without the two pooled
    # vectors' layers and the gate's two.
    expected = 40 * (block + 16 * 16) + 2 * 16 * 40**2 + 16 * 10 - 3 * 16 * 16 - 16
    assert more == pytest.approx(6 * expected, rel=0.01)


@pytest.mark.slow
def test_a_run_learns_resumes_to_the_bit_and_tells_of_each_modality(tmp_path, capsys):
    pytest.importorskip("espeakng_loader", reason="the extra `speech` (GPL) is not installed")
    lent = Lent(classification, alone_and_together)
    model = dataclasses.replace(MODEL, modality_dropout=0.2)
    assert train(recipe(tmp_path / "whole", model=model), lent) == 0
    said = capsys.readouterr().out
    assert "held-out after 30 steps: accuracy" in said and "sound alone" in said
    assert train(recipe(tmp_path / "parts", model=model, steps=15), lent) == 0
    assert train(recipe(tmp_path / "parts", model=model), lent) == 0
    whole, parts = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    )
    for one, two in zip(whole, parts, strict=True):
        assert [one[k] for k in ("loss", "image_loss", "sound_loss", "image_weight")] == [
            two[k] for k in ("loss", "image_loss", "sound_loss", "image_weight")
        ]
    assert np.mean([row["loss"] for row in whole[-5:]]) < whole[0]["loss"] - 0.2
    scores = json.loads((tmp_path / "whole" / "eval.jsonl").read_text().splitlines()[-1])
    assert {"accuracy", "image_accuracy", "sound_weight", "calibration_error"} <= scores.keys()
    assert (tmp_path / "whole" / "report" / "report.html").exists()

    # What was saved answers as the run did, and with one modality as that modality's own head.
    lm = deepseek_jax.load(tmp_path / "whole")
    dataset = open_digits(lm.data, sequence_length=LENGTH, seed=0)
    batch = next(dataset.held_batches(16))
    both, seen = lm.classify(batch["inputs"]), lm.classify({"image": batch["inputs"]["image"]})
    found = classification(lm.model, lm.params, dataset, 16)
    assert found["loss"] == pytest.approx(scores["loss"], rel=1e-3)
    np.testing.assert_allclose(seen.alone["image"], both.alone["image"], atol=1e-6)
    assert (seen.weights["image"] == 1).all() and (seen.weights["sound"] == 0).all()
    np.testing.assert_allclose(seen.probabilities.sum(1), 1, rtol=1e-5)
    for given, why in (
        ({}, "not nothing"),
        ({"smell": np.zeros(1)}, "one of them or all; not 'smell'"),
        ({"image": batch["inputs"]["image"][:, :4]}, r"image has the shape \(16, 4, 8, 3\)"),
        (batch["inputs"] | {"sound": batch["inputs"]["sound"][:2]}, "numbers of rows"),
    ):
        with pytest.raises(InputError, match=why):
            lm.classify(given)
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(tmp_path / "whole"), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == found["accuracy"]

    labels = dataclasses.replace(MODEL, num_classes=4, multi_label=True)
    data = dataclasses.replace(recipe(tmp_path / "labels").data, labels="properties")
    capsys.readouterr()
    assert train(recipe(tmp_path / "labels", model=labels, data=data, steps=3), lent) == 0
    assert "sensitivity at specificity 0.9" in capsys.readouterr().out
    scores = json.loads((tmp_path / "labels" / "eval.jsonl").read_text().splitlines()[-1])
    assert 0 < scores["auroc/prime"] < 1 and scores["classes_scored"] == 4


def test_what_does_not_belong_together_is_refused(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="objective is Language"):
        recipe(run, objective=TrainConfig.objective)
    with pytest.raises(ValueError, match="data is Pairs"):
        recipe(run, data=Pairs())
    with pytest.raises(ValueError, match="no pipeline"):
        recipe(run, mesh=MeshShape(stage=2))
    with pytest.raises(ValueError, match=r"leave mesh.context at 1"):
        recipe(run, mesh=MeshShape(context=2))
    with pytest.raises(ValueError, match="data has 10 classes"):
        recipe(run, model=dataclasses.replace(MODEL, num_classes=9))
    video = dataclasses.replace(MODEL.modalities[1], name="video")
    with pytest.raises(ValueError, match=r"data has \['image', 'sound'\]"):
        modalities = (MODEL.modalities[0], video)
        recipe(run, model=dataclasses.replace(MODEL, modalities=modalities))
    with pytest.raises(ValueError, match="every head is trained"):
        Classification(alone=0.0)
    with pytest.raises(InputError, match="35 positions are those of 11200"):
        encoder_inputs(MODEL.modalities[0].encoder, jnp.zeros((1, 4000)), "half")
    words = AnyModality(transformer=SMALL, text=Words(vocab_size=5))
    with pytest.raises(InputError, match="for an encoder of kind AnyModality"):
        encoder_inputs(words, jnp.zeros((1, 4)), "half")
