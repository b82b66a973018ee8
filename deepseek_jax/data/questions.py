"""Questions about digits, whose answers are classes: VQA without a download.

A question is answered by who sees the digit and reads the question, and by neither alone: half of
all digits are odd, even, larger and smaller, and every digit is two of the four.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from deepseek_jax.data.audiovisual import WORDS
from deepseek_jax.data.corpus import digest, key_hash
from deepseek_jax.data.digits import load_digits

Ask: TypeAlias = Literal["digit", "odd", "even", "larger", "smaller"]

# The first way of asking is the one that is asked when a model is evaluated.
WAYS: dict[Ask, tuple[str, ...]] = {
    "digit": ("Which digit is this?", "What number do you see?"),
    "odd": ("Is it odd?", "Is this an odd number?"),
    "even": ("Is it even?", "Is this an even number?"),
    "larger": ("Is it larger than four?", "Is this more than four?"),
    "smaller": ("Is it smaller than five?", "Is this less than five?"),
}
HOLDS: dict[Ask, Callable[[int], bool]] = {
    "odd": lambda digit: digit % 2 == 1,
    "even": lambda digit: digit % 2 == 0,
    "larger": lambda digit: digit > 4,
    "smaller": lambda digit: digit < 5,
}
ANSWERS = (*WORDS, "yes", "no")


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
        said = WORDS[digit] if ask == "digit" else "yes" if HOLDS[ask](digit) else "no"
        picture = np.repeat(pixels[:, :, None], 3, axis=2)
        return Shown(f"digit {number}", {"image": picture, "text": WAYS[ask]}, (said,))
