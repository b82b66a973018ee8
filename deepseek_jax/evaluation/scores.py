"""Scores of retrieval and of classification with missing labels: recall, AUROC, calibration.

Ties count as rankings at random would have them (AUROC) or against the model (ranks), so a model
that gives everything the same score gets no credit. Plain NumPy, in float64.
"""

import math
from collections.abc import Sequence

import numpy as np

from deepseek_jax.core.errors import InputError

TIE = 1e-12  # similarities, relative: what the order of float64 sums changes


def retrieval_ranks(
    queries: np.ndarray,
    keys: np.ndarray,
    query_groups: np.ndarray,
    key_groups: np.ndarray,
    block: int = 1024,
) -> np.ndarray:
    """The rank, from 1, of each query's best key among those of its group: int64 [queries].

    Embeddings [queries, D] and [keys, D]; similarity is their dot product. A key of another group
    that is as similar as the best comes before it. `block` queries' similarities exist at a time.
    Raises InputError for embeddings that are not finite and queries without a key of their group.
    """
    queries, keys = (np.asarray(x, np.float64) for x in (queries, keys))
    query_groups, key_groups = np.asarray(query_groups), np.asarray(key_groups)
    for name, x, groups in (("queries", queries, query_groups), ("keys", keys, key_groups)):
        if x.ndim != 2 or groups.shape != x.shape[:1] or x.shape[1:] != keys.shape[1:]:
            raise InputError(
                f"retrieval: {name} of shape {x.shape}, with groups of {groups.shape}, beside keys "
                f"of {keys.shape}; wanted are [rows, width] of one width and a group a row"
            )
        if not np.isfinite(x).all():
            rows = np.flatnonzero(~np.isfinite(x).all(1))
            raise InputError(f"retrieval: {len(rows)} {name} are not finite, the first {rows[0]}")
    lost = ~np.isin(query_groups, key_groups)
    if lost.any():
        raise InputError(
            f"retrieval: {lost.sum()} queries have no key of their group, the first is query "
            f"{np.flatnonzero(lost)[0]} of group {query_groups[lost][0]}"
        )
    ranks = []
    for start in range(0, len(queries), block):
        similar = queries[start : start + block] @ keys.T
        own = query_groups[start : start + block, None] == key_groups[None, :]
        best = np.where(own, similar, -np.inf).max(1, keepdims=True)
        reached = similar >= best - TIE * np.maximum(np.abs(best), 1.0)
        ranks.append(1 + (reached & ~own).sum(1))
    return np.concatenate(ranks) if ranks else np.zeros(0, np.int64)


def retrieval_scores(
    first: np.ndarray,
    second: np.ndarray,
    first_groups: np.ndarray | None = None,
    second_groups: np.ndarray | None = None,
    *,
    names: tuple[str, str] = ("image", "text"),
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Both ways, as `image_to_text/recall@1` (`names`): whether one of the group is among the first
    k, `chance@1`, that of a random order, and `median_rank` of the best one.

    Without groups, rows are pairs. With them either side may have several rows a group: five
    captions an image. Raises InputError as `retrieval_ranks` does, and without any row.
    """
    groups = [
        np.arange(len(x)) if given is None else np.asarray(given)
        for x, given in ((first, first_groups), (second, second_groups))
    ]
    if not len(first) or not len(second):
        raise InputError(f"retrieval: {len(first)} {names[0]} and {len(second)} {names[1]} rows")
    scores = {}
    for way in (0, 1):
        sides, whose = ((first, second), groups) if way == 0 else ((second, first), groups[::-1])
        ranks = retrieval_ranks(*sides, *whose)
        name = "{}_to_{}".format(*(names if way == 0 else names[::-1]))
        values, counts = np.unique(whose[1], return_counts=True)
        positives = counts[np.searchsorted(values, whose[0])]
        for k in ks:
            scores[f"{name}/recall@{k}"] = float((ranks <= k).mean())
            scores[f"{name}/chance@{k}"] = _chance(positives, len(sides[1]), k)
        scores[f"{name}/median_rank"] = float(np.median(ranks))
    return scores


def _chance(positives: np.ndarray, size: int, k: int) -> float:
    """The mean probability that k of `size` keys at random have one of a query's positives."""
    k = min(k, size)
    found, counts = np.unique(positives, return_counts=True)
    missed = [math.comb(size - int(p), k) / math.comb(size, k) for p in found]
    return float(1 - np.dot(missed, counts) / counts.sum())


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise InputError(f"scores of shape {scores.shape} beside labels of {labels.shape}")
    if not np.isfinite(scores).all():
        raise InputError(f"{(~np.isfinite(scores)).sum()} of {scores.size} scores are not finite")
    if not np.isin(labels, (0, 1)).all():
        raise InputError(
            f"labels must be 0 or 1, and some are {np.setdiff1d(labels, (0, 1))[:3]}; say with "
            "`known` which ones are missing"
        )
    return scores, labels.astype(bool)


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive's score is above a negative's, ties counting half.

    From ranks (Mann and Whitney). NaN where there are no positives, or no negatives.
    """
    scores, labels = _checked(scores, labels)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # the mean of those that tie
    above = ranks[labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def sensitivity_at_specificity(
    scores: np.ndarray, labels: np.ndarray, specificity: float = 0.9
) -> float:
    """The share of positives found at the lowest threshold that keeps this share of negatives out.

    "Found" is a score of at least the threshold, chosen on these rows themselves. NaN as `auroc`.
    """
    scores, labels = _checked(scores, labels)
    if labels.all() or not labels.any():
        return math.nan
    negatives = np.sort(scores[~labels])
    # Negatives at or above a threshold are wrong: so many may be, and the next one may not.
    allowed = math.floor((1 - specificity) * len(negatives) + 1e-9)
    if allowed >= len(negatives):
        return 1.0
    return float((scores[labels] > negatives[len(negatives) - 1 - allowed]).mean())


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error (arXiv 1706.04599, equation 3) in bins of equal width.

    Of a class's probabilities and its labels; or of each row's largest probability and whether that
    class was right. NaN without rows. Raises InputError for what is no probability.
    """
    confidence, correct = _checked(confidence, correct)
    if not len(confidence):
        return math.nan
    if confidence.min() < 0 or confidence.max() > 1:
        raise InputError(
            f"calibration needs probabilities, and these reach from {confidence.min():.3g} to "
            f"{confidence.max():.3g}; apply a sigmoid or softmax to logits first"
        )
    which = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    gaps = np.bincount(which, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def multilabel_scores(
    probabilities: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray | None = None,
    *,
    classes: Sequence[str] | None = None,
    specificity: float = 0.9,
    bins: int = 15,
) -> dict[str, float]:
    """Of [rows, classes]: `auroc`, `sensitivity@0.9` and `calibration_error`, and of each class
    `auroc/NAME` and so on.

    A label counts only where `known`. The first are means over the classes that have both positive
    and negative known labels, `classes_scored` says how many those are (NaN where none), and the
    others' own AUROC and sensitivity are NaN. Raises InputError for shapes that differ, labels that
    are neither 0 nor 1 and probabilities outside 0 to 1.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    known = np.ones(labels.shape, bool) if known is None else np.asarray(known)
    names = list(classes) if classes is not None else [str(i) for i in range(labels.shape[-1])]
    expected = (len(labels), len(names))
    for name, x in (("probabilities", probabilities), ("labels", labels), ("known", known)):
        if x.shape != expected:
            raise InputError(f"multi-label scores: {name} has shape {x.shape}, not {expected}")
    if known.dtype != bool:
        raise InputError(f"multi-label scores: known is {known.dtype}, and must be bool")
    kinds = {
        "auroc": auroc,
        f"sensitivity@{specificity:g}": lambda p, y: sensitivity_at_specificity(p, y, specificity),
        "calibration_error": lambda p, y: calibration_error(p, y, bins),
    }
    given = [(probabilities[known[:, c], c], labels[known[:, c], c]) for c in range(len(names))]
    table = {kind: [score(*pair) for pair in given] for kind, score in kinds.items()}
    both = ~np.isnan(np.array(table["auroc"], float))
    scores = {
        kind: float(np.mean(np.array(row)[both])) if both.any() else math.nan
        for kind, row in table.items()
    }
    scores["classes_scored"] = float(both.sum())
    for kind, row in table.items():
        scores |= {f"{kind}/{name}": value for name, value in zip(names, row, strict=True)}
    return scores
