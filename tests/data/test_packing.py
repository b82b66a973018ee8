"""Packing: invariance (every token a target once; order free of workers, processes, batch size).

Mixtures: shares follow the weights, counts stay exact, and rows depend on their number only.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.corpus import Corpus, held_out
from deepseek_jax.data.packing import CHUNK, Mixed, Rows, drawn_bits, drawn_order
from deepseek_jax.data.sources import Mixture, Part, StandardLibrary

LIBRARY = StandardLibrary()


class Made:
    """A corpus in memory; document d's tokens are 1000 * d, 1000 * d + 1, ..."""

    document = Corpus.document
    documents = Corpus.documents

    def __init__(self, lengths):
        self.lengths = np.array(lengths)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.tokens = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(lengths)])
        self.num_bytes = self.lengths * 3
        self.hashes = drawn_bits(np.arange(len(lengths)), 7)


corpora = st.lists(st.integers(2, 40), min_size=2, max_size=12).map(Made)
drawn = given(
    corpus=corpora,
    length=st.integers(2, 17),
    targets=st.integers(1, 3),
    seed=st.integers(0, 99),
)


def _check_row(row: dict, length: int, num_targets: int) -> None:
    """What one row says agrees with the documents' ids, in plain loops."""
    segment, place = 0, 0
    for t in range(length):
        token = row["tokens"][t]
        if row["segments"][t] == 0:
            assert token == 0
            assert not row["weights"][t:].any()
            assert not row["segments"][t:].any()
            return
        new = t == 0 or token // 1000 != row["tokens"][t - 1] // 1000
        segment, place = (segment + 1, 0) if new else (segment, place + 1)
        assert (row["segments"][t], row["positions"][t]) == (segment, place)
        for ahead in range(num_targets):
            if row["weights"][t, ahead]:
                assert row["targets"][t, ahead] == token + 1 + ahead  # the same document's
            else:
                assert row["targets"][t, ahead] == 0


@drawn
def test_an_epoch_has_every_token_once_and_every_target_once(corpus, length, targets, seed):
    rows = Rows(corpus, 0.3, length, targets, seed)
    for epoch in (0, 1):
        batch = rows.batch(np.arange(rows.num_rows) + epoch * rows.num_rows)
        for b in range(rows.num_rows):
            _check_row({k: v[b] for k, v in batch.items()}, length, targets)
        ids = np.concatenate([corpus.document(d).tokens for d in rows.documents])
        assert sorted(batch["tokens"][batch["segments"] > 0]) == sorted(ids)
        for ahead in range(targets):
            kept = batch["targets"][..., ahead][batch["weights"][..., ahead] > 0]
            assert sorted(kept) == sorted(i for i in ids if i % 1000 > ahead)


@drawn
def test_sides_share_no_document_and_the_held_out_one_is_in_order(corpus, length, targets, seed):
    train, held = Rows(corpus, 0.3, length, targets, seed), Rows(corpus, 0.3, length, targets, None)
    assert sorted([*train.documents, *held.documents]) == list(range(len(corpus.lengths)))
    batch = held.batch(np.arange(held.num_rows + 3))
    ids = np.concatenate([corpus.document(d).tokens for d in held.documents])
    np.testing.assert_array_equal(batch["tokens"][batch["segments"] > 0], ids)
    assert batch["weights"][..., 0].sum() == (corpus.lengths[held.documents] - 1).sum()
    assert not batch["segments"][-3:].any()


@drawn
@settings(max_examples=30)
def test_a_row_depends_on_its_number_only(corpus, length, targets, seed):
    rows = Rows(corpus, 0.3, length, targets, seed)
    numbers = np.arange(3 * rows.num_rows)
    whole = rows.batch(numbers)
    for number in reversed(numbers):
        one = Rows(corpus, 0.3, length, targets, seed).batch(np.array([number]))
        for name, values in one.items():
            np.testing.assert_array_equal(values[0], whole[name][number])


def test_epochs_and_seeds_draw_other_orders():
    corpus = Made([9] * 40)
    first = [Rows(corpus, 0.2, 8, 1, seed).batch(np.arange(10))["tokens"] for seed in (0, 1)]
    assert (first[0] != first[1]).any()
    rows = Rows(corpus, 0.2, 8, 1, 0)
    assert (rows.batch(np.arange(10) + rows.num_rows)["tokens"] != first[0]).any()


def test_rows_of_one_long_document_do_not_follow_each_other():
    first = Rows(Made([900] * 3), 1e-9, 8, 1, 0).batch(np.arange(200))["tokens"][:, 0]
    assert np.mean(np.diff(first) == 8) < 0.1


def test_shapes_and_dtypes_are_the_contract():
    batch = Rows(Made([9] * 40), 0.2, 8, 3, 0).batch(np.arange(5))
    want = {
        "tokens": ((5, 8), "int32"),
        "targets": ((5, 8, 3), "int32"),
        "weights": ((5, 8, 3), "float32"),
        "segments": ((5, 8), "int32"),
        "positions": ((5, 8), "int32"),
    }
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == want


def test_the_draw_is_pinned():
    """Another draw would change every run's data: runs could not be resumed or repeated."""
    assert drawn_order(8, 3, 5).tolist() == [3, 6, 0, 2, 1, 5, 4, 7]


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_is_empty(fraction):
    hashes = drawn_bits(np.arange(2), 1)
    assert 0 < held_out(hashes, fraction).sum() < 2
    same = np.zeros(3, np.uint64)  # the pieces of one file
    assert 0 < held_out(same, fraction).sum() < 3


def _mixed(*parts: Part, seed: int = 0) -> Mixed:
    return Mixed([None] * len(parts), parts, seed)


def test_shares_follow_the_weights():
    mixed = _mixed(*(Part(source=LIBRARY, weight=w) for w in (1, 0, 3)))
    part, _ = mixed.origin(np.arange(40_000))
    shares = np.bincount(part, minlength=3) / len(part)
    np.testing.assert_allclose(shares, [0.25, 0, 0.75], atol=0.01)


def test_shares_follow_a_schedule():
    moving = Part(source=LIBRARY, schedule=((10_000, 0.0), (30_000, 1.0)))
    part, _ = _mixed(moving, Part(source=LIBRARY, schedule=((0, 1.0),))).origin(np.arange(60_000))
    assert (part[:10_000] == 1).all()
    middle = np.mean(part[19_000:21_000] == 0)  # weights 0.5 and 1
    assert abs(middle - 1 / 3) < 0.04
    assert abs(np.mean(part[30_000:] == 0) - 0.5) < 0.02


def test_a_part_gives_its_rows_in_order_across_chunks():
    mixed = _mixed(Part(source=LIBRARY, weight=2), Part(source=LIBRARY))
    numbers = np.arange(2 * CHUNK + 100)
    part, row = mixed.origin(numbers)
    for which in (0, 1):
        np.testing.assert_array_equal(row[part == which], np.arange(np.sum(part == which)))
    late = np.array([CHUNK - 1, CHUNK, 2 * CHUNK + 7])
    fresh = _mixed(Part(source=LIBRARY, weight=2), Part(source=LIBRARY)).origin(late)
    np.testing.assert_array_equal(fresh, (part[late], row[late]))


def test_seeds_draw_differently():
    parts = (Part(source=LIBRARY), Part(source=LIBRARY))
    draws = [_mixed(*parts, seed=seed).origin(np.arange(100))[0] for seed in (0, 1)]
    assert (draws[0] != draws[1]).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mixture(parts=()),
        lambda: Mixture(parts=(Part(source=LIBRARY, weight=0.0),)),
        lambda: Mixture(parts=(Part(source=LIBRARY, schedule=((0, 1.0), (9, 0.0))),)),
        lambda: Part(source=LIBRARY, weight=-1.0),
        lambda: Part(source=LIBRARY, weight=float("nan")),
        lambda: Part(source=LIBRARY, schedule=((5, 1.0), (5, 2.0))),
    ],
)
def test_impossible_weights_are_refused(make):
    with pytest.raises(ValueError, match=r"weights|ascend"):
        make()
