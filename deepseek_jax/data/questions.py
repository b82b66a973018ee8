"""Questions about what is made on the spot: words that are spoken, digits that move. No download.

Neither a speaker (a voice with a pitch and a speed; data/speech) nor a handwritten digit
(data/digits) stands on both sides.
"""

import dataclasses
import functools
import itertools
from typing import Literal, TypeAlias

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.conversations import Medium, Talk
from deepseek_jax.data.corpus import digest, key_hash
from deepseek_jax.data.digits import load_digits, moving_digit
from deepseek_jax.data.speech import PITCHES, SPEEDS, spoken
from deepseek_jax.data.utterances import DIGITS

Ask: TypeAlias = Literal["digit", "direction"]
SPOKEN = "<audio>\nWhat is said?"
MOVING: dict[Ask, str] = {
    "digit": "<video>\nWhich digit moves?",
    "direction": "<video>\nWhere does it move?",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpokenQuestions:
    """What eSpeak NG says (extra `speech`), a word by a speaker each."""

    words: tuple[str, ...] = DIGITS
    voices: tuple[str, ...] = (
        "en-us+m1",
        "en-us+m3",
        "en-us+m5",
        "en-us+f1",
        "en-us+f2",
        "en-us+f4",
    )
    pitches: tuple[int, ...] = (30, 50, 70)
    speeds: tuple[int, ...] = (160, 190, 220)
    """Words a minute."""

    def __post_init__(self):
        for name, (low, high) in {"pitches": PITCHES, "speeds": SPEEDS}.items():
            if not all(low <= value <= high for value in getattr(self, name)):
                raise ValueError(f"A source's {name} {getattr(self, name)} lie in {low}..{high}.")
        if not self.words or len(self.speakers) < 2:
            raise ValueError("A source of spoken words has words, and two speakers or more.")

    @property
    def speakers(self) -> list[tuple[str, int, int]]:
        """Voice, speed and pitch of each."""
        return [*itertools.product(self.voices, self.speeds, self.pitches)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingQuestions:
    """Which handwritten digit moves through a film, and where (extra `media`)."""

    asks: tuple[Ask, ...] = ("digit", "direction")

    def __post_init__(self):
        if not self.asks:
            raise ValueError("A source of moving digits must have asks.")


class SpokenTalks:
    """What is asked of each word of each speaker."""

    def __init__(self, source: SpokenQuestions, rate: int):
        self.given = source, rate
        self.examples = [*itertools.product(source.speakers, source.words)]
        names = [f"speaker {voice, pitch, speed}" for (voice, speed, pitch), _ in self.examples]
        self.hashes = np.array([*map(key_hash, names)], np.uint64)
        self.fingerprint = digest([repr(source), rate, SPOKEN])

    def __reduce__(self):
        return SpokenTalks, self.given

    def talks(self, number: int, draw: np.random.Generator | None) -> list[Talk]:
        """The one question; nothing is drawn."""
        del draw
        speaker, word = self.examples[number]
        sound = Medium("audio", functools.partial(_wave, word, *speaker, self.given[1]))
        return [Talk((("user", SPOKEN), ("assistant", word)), (sound,), "spoken")]


@functools.lru_cache(2048)  # about 40 KB each
def _wave(*said) -> np.ndarray:
    wave = spoken(*said)
    wave.flags.writeable = False
    return wave


class MovingTalks:
    """What is asked of each handwritten digit, which moves anew whenever it is drawn."""

    def __init__(self, source: MovingQuestions, frames: int, size: int):
        self.given = source, frames, size
        if size // 2 < max(1, frames - 1):
            raise InputError(
                f"a digit of {size // 2} pixels has no room to move in {frames} frames of {size}: "
                "take fewer frames or larger views"
            )
        self.labels = load_digits().labels
        names = (f"digit {number}" for number in range(len(self.labels)))
        self.hashes = np.array([*map(key_hash, names)], np.uint64)
        self.fingerprint = digest([repr(source), frames, size, MOVING])

    def __reduce__(self):
        return MovingTalks, self.given

    def talks(self, number: int, draw: np.random.Generator | None) -> list[Talk]:
        """All that may be asked of the digit's film; without a draw always of the same."""
        source, frames, size = self.given
        key = (int(draw.integers(1 << 31)), 0) if draw else (0, number)
        clip = moving_digit(*key, np.array([number]), frames=frames, size=size, digit=size // 2)
        film = Medium("video", lambda: np.repeat(clip.frames[..., None], 3, axis=-1))
        answers = {"digit": DIGITS[clip.label], "direction": clip.direction}
        return [
            Talk((("user", MOVING[ask]), ("assistant", answers[ask])), (film,), ask)
            for ask in source.asks
        ]
