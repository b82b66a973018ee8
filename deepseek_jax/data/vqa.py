"""Questions about digits, whose answers are classes: VQA without a download.

Who reads the question alone knows what is asked, and who sees the digit alone what it is: each can
be right in about one of three. Digits from five on are large.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from deepseek_jax.data.audiovisual import WORDS
from deepseek_jax.data.corpus import digest, key_hash
from deepseek_jax.data.digits import load_digits

Ask: TypeAlias = Literal["digit", "parity", "size"]

# The first way of asking is the one that is asked when a model is evaluated.
WAYS: dict[Ask, tuple[str, ...]] = {
    "digit": ("Which digit is this?", "What number do you see?"),
    "parity": ("Is it odd or even?", "Is this an even or an odd number?"),
    "size": ("Is it large or small?", "Is this a small or a large digit?"),
}
SAYS: dict[Ask, tuple[str, ...]] = {  # of each digit
    "digit": WORDS,
    "parity": ("even", "odd") * 5,
    "size": ("small",) * 5 + ("large",) * 5,
}
ANSWERS = (*WORDS, "odd", "even", "small", "large")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitQuestions:
    """Questions about scikit-learn's handwritten digits (extra `media`); `ANSWERS` are the classes.

    An example is a digit and one of what may be asked of it.
    """

    asks: tuple[Ask, ...] = tuple(WAYS)

    def __post_init__(self):
        if not self.asks:
            raise ValueError("data.source.asks must not be empty.")


class Shown(NamedTuple):
    """An example, undecoded."""

    name: str
    media: dict[str, Any]
    """By modality: a file's bytes (an image may be pixels), of text the texts."""
    labels: tuple[str, ...] | None
    """As the manifest has them; None: nothing is said."""


class DigitExamples:
    """The examples of a config: each digit with each of what is asked."""

    def __init__(self, source: DigitQuestions):
        self.source, count = source, len(load_digits().labels)
        self.pairs = [(number, ask) for number in range(count) for ask in source.asks]
        hashes = [key_hash(f"digit {number}") for number in range(count)]  # as data/digits splits
        self.hashes = np.repeat(np.array(hashes, np.uint64), len(source.asks))
        self.fingerprint = digest([repr(source), WAYS])

    def __reduce__(self):
        return DigitExamples, (self.source,)

    def example(self, number: int) -> Shown:
        """A digit, the ways of asking, the answer."""
        number, ask = self.pairs[number]
        digit, pixels = int(load_digits().labels[number]), load_digits().images[number]
        picture = np.repeat(pixels[:, :, None], 3, axis=2)
        return Shown(f"digit {number}", {"image": picture, "text": WAYS[ask]}, (SAYS[ask][digit],))
