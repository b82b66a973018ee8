"""Reference: retrieval by brute force, and AUROC, sensitivity and calibration against sklearn."""

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score, roc_curve, top_k_accuracy_score

from deepseek_jax.core.errors import InputError
from deepseek_jax.evaluation.scores import (
    auroc,
    calibration_error,
    multilabel_scores,
    retrieval_ranks,
    retrieval_scores,
    sensitivity_at_specificity,
)

RNG = np.random.default_rng(0)


def test_recall_of_pairs_is_sklearns_top_k_accuracy():
    images = RNG.normal(size=(60, 4)).astype(np.float32)
    texts = images + RNG.normal(size=(60, 4)).astype(np.float32)
    found = retrieval_scores(images, texts)
    for name, a, b in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        similar = a.astype(np.float64) @ b.T.astype(np.float64)
        for k in (1, 5, 10):
            expected = top_k_accuracy_score(np.arange(60), similar, k=k, labels=np.arange(60))
            assert 0 < expected < 1
            assert found[f"{name}/recall@{k}"] == pytest.approx(expected)
            assert found[f"{name}/chance@{k}"] == pytest.approx(k / 60)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_ranks_with_several_positives_are_those_of_sorting(block):
    queries, keys = RNG.normal(size=(20, 3)), RNG.normal(size=(50, 3))
    own, others = (np.concatenate([np.arange(8), RNG.integers(0, 8, n)]) for n in (12, 42))
    ranks = retrieval_ranks(queries, keys, own, others, block)
    for i, rank in enumerate(ranks):
        order = np.argsort(-(keys @ queries[i]))
        assert rank == 1 + np.flatnonzero(others[order] == own[i])[0]
    scores = retrieval_scores(queries, keys, own, others, names=("a", "b"), ks=(3,))
    assert scores["a_to_b/recall@3"] == (ranks <= 3).mean()
    assert scores["a_to_b/median_rank"] == np.median(ranks)


def test_chance_is_what_random_rankings_reach():
    first, second = np.arange(10), np.repeat(np.arange(10), [1, 2, 3, 4, 5] * 2)
    hits = []
    for _ in range(300):
        a, b = RNG.normal(size=(10, 30)), RNG.normal(size=(len(second), 30))
        hits.append(retrieval_scores(a, b, first, second, ks=(4,)))
    for way in ("image_to_text", "text_to_image"):
        mean = np.mean([found[f"{way}/recall@4"] for found in hits])
        assert mean == pytest.approx(hits[0][f"{way}/chance@4"], abs=0.04)


def test_equal_embeddings_find_nothing():
    same = np.tile(RNG.normal(size=(1, 37)), (50, 1)).astype(np.float32)
    found = retrieval_scores(same, 3 * same)
    assert found["image_to_text/recall@10"] == found["text_to_image/recall@10"] == 0
    assert found["image_to_text/median_rank"] == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.full((2, 3), np.nan)}, "not finite"),
        ({"query_groups": np.array([0, 9])}, "query 1 of group 9"),
        ({"queries": np.ones((2, 4))}, "one width"),
        ({"key_groups": np.arange(3)}, "a group a row"),
    ],
)
def test_what_cannot_be_ranked_is_refused(change, message):
    given = {"queries": np.ones((2, 3)), "keys": np.ones((4, 3))}
    given |= {"query_groups": np.arange(2), "key_groups": np.arange(4)}
    with pytest.raises(InputError, match=message):
        retrieval_ranks(**given | change)


@pytest.mark.parametrize("levels", [3, 10, 10**6])  # few levels: many ties
@pytest.mark.parametrize("rows", [5, 200])
def test_auroc_and_sensitivity_are_sklearns(levels, rows):
    labels = np.arange(rows) % 3 == 0
    scores = np.round((RNG.random(rows) + 0.3 * labels) * levels) / levels
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    wrong, right, _ = roc_curve(labels, scores, drop_intermediate=False)
    for specificity in (0.0, 0.5, 0.8, 0.9, 1.0):
        expected = right[wrong <= 1 - specificity + 1e-9].max()
        assert sensitivity_at_specificity(scores, labels, specificity) == pytest.approx(expected)


def test_one_kind_of_labels_has_no_score():
    for labels in (np.zeros(4, int), np.ones(4, int)):
        assert math.isnan(auroc(np.arange(4), labels))
        assert math.isnan(sensitivity_at_specificity(np.arange(4), labels))
    assert math.isnan(calibration_error(np.zeros(0), np.zeros(0)))


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_is_that_of_sklearns_curve(bins):
    confidence = np.concatenate([RNG.random(300), [0.0, 0.25, 0.5, 1.0]])
    correct = RNG.random(304) < confidence**2
    shown, meant = calibration_curve(correct, confidence, n_bins=bins)
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    counts = np.unique(np.searchsorted(edges, confidence), return_counts=True)[1]
    expected = (counts * np.abs(shown - meant)).sum() / counts.sum()
    assert calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0]), bins) == 0


def test_missing_labels_do_not_count():
    labels, known = RNG.integers(0, 2, (80, 4)), RNG.random((80, 4)) < 0.7
    labels[:, 2] = 1  # no negatives: not scored
    probabilities = np.clip(RNG.random((80, 4)) * 0.7 + 0.3 * labels, 0, 1)
    hidden = np.where(known, labels, -1), np.where(known, probabilities, np.nan)
    names = ("edema", "mass", "all", "nodule")
    found = multilabel_scores(hidden[1], hidden[0], known, classes=names, specificity=0.8)
    each = {}
    for c, name in enumerate(names):
        rows = known[:, c]
        if name != "all":
            each[name] = roc_auc_score(labels[rows, c], probabilities[rows, c])
            assert found[f"auroc/{name}"] == pytest.approx(each[name])
            y, p = labels[rows, c], probabilities[rows, c]
            assert found[f"sensitivity@0.8/{name}"] == sensitivity_at_specificity(p, y, 0.8)
            assert found[f"calibration_error/{name}"] == calibration_error(p, y)
    assert math.isnan(found["auroc/all"])
    assert found["auroc"] == pytest.approx(np.mean([*each.values()]))
    assert found["classes_scored"] == 3
    none = multilabel_scores(probabilities, labels, np.zeros((80, 4), bool))
    assert math.isnan(none["auroc"])
    assert none["classes_scored"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((np.ones((2, 3)), np.ones((2, 2))), "probabilities has shape"),
        ((np.full((2, 2), np.nan), np.eye(2)), "not finite"),
        ((np.eye(2), -np.eye(2)), "0 or 1"),
        ((np.eye(2) * 3, np.eye(2)), "sigmoid"),
        ((np.eye(2), np.eye(2), np.eye(2)), "bool"),
    ],
)
def test_what_cannot_be_scored_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        multilabel_scores(*given)
