"""Answers, scored by hand: right is what greedy decoding would say; by kind, beside majorities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.conversations import Talk
from deepseek_jax.evaluation import answers as scored

SAID = [("a", "x"), ("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")]


class Held:
    """Five rows of four tokens whose answers are two tokens, each."""

    class config:
        normalization = "half"

    def __init__(self, rows):
        self.rows, self.held = rows, [self]

    def held_rows(self):
        for (kind, answer), row in zip(SAID, self.rows, strict=True):
            turns = (("user", "?"), ("assistant", answer))
            yield Talk(turns, (), kind), row


class Model:
    """A model whose most likely next token is the one that `tokens` itself names."""

    class Output:
        def __init__(self, hidden):
            self.hidden = hidden

    def apply(self, params, tokens, **_):
        return self.Output(jax.nn.one_hot(tokens, 8) * 3)

    def head(self, params):
        return jnp.eye(8)

    def logits(self, params, hidden):
        return hidden


def test_all_tokens_of_an_answer_count_and_no_others():
    rng = np.random.default_rng(0)
    targets = rng.integers(1, 8, (5, 4))
    best = targets.copy()
    best[:, 0] = 0  # the question: never learned
    best[1, 2] = 0  # one token of an answer is wrong
    best[4, 3] = 0
    rows = [
        {"tokens": b.astype(np.int32), "targets": t[:, None].astype(np.int32),
         "weights": np.array([0, 0, 1, 1], np.float32)[:, None]}
        for b, t in zip(best, targets, strict=True)
    ]  # fmt: skip
    found = scored.answers(Model(), {}, Held(rows), 2)  # the last batch is filled up
    right = 3 - np.log(np.exp(3) + 7)
    wrong = 0 - np.log(np.exp(3) + 7)
    assert found["loss"] == pytest.approx(-(8 * right + 2 * wrong) / 10, rel=1e-5)
    assert found["tokens"] == 10
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["majority_accuracy"] == pytest.approx(3 / 5)  # x twice of a, z or w once of b
    assert found["a/accuracy"] == pytest.approx(2 / 3)
    assert found["a/majority_accuracy"] == pytest.approx(2 / 3)
    assert found["b/accuracy"] == found["b/majority_accuracy"] == 0.5


def test_nothing_held_out_is_refused():
    empty = Held([])
    empty.held_rows = lambda: iter(())
    with pytest.raises(InputError, match="nothing that was held out"):
        scored.answers(Model(), {}, empty, 2)
