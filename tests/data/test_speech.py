"""Invariance: what was said before has no effect; digits can be told apart across voices."""

import numpy as np
import pytest
import scipy.signal

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.speech import spoken

pytest.importorskip("espeakng_loader", reason="the extra `speech` (GPL) is not installed")

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_sound_depends_on_the_arguments_alone():
    first = spoken("seven")
    assert first.dtype == np.float32 and first.ndim == 1 and 0.1 < np.abs(first).max() <= 1
    assert 0.2 < len(first) / 16_000 < 1
    others = [spoken("three"), spoken("seven", "en-us+f2"), spoken("seven", pitch=80),
              spoken("seven", speed=90), spoken("seven", rate=22_050)]  # fmt: skip
    np.testing.assert_array_equal(spoken("seven"), first)
    assert all(len(other) != len(first) or (other != first).any() for other in others)
    assert len(others[3]) > 1.5 * len(first)
    assert abs(len(others[4]) / len(first) - 22_050 / 16_000) < 1e-3
    assert len(spoken("七", "cmn")) > 2000


def test_digits_are_told_apart_across_voices():
    def heard(digit, voice):  # the spectrum in 8 stretches of time
        _, _, power = scipy.signal.spectrogram(spoken(digit, voice), 16_000, nperseg=400)
        parts = np.array_split(np.log(power[:100] + 1e-9), 8, axis=1)
        return np.stack([part.mean(1) for part in parts])

    known = np.stack([heard(d, f"en-us+{v}") for v in ("m1", "m3", "f2") for d in DIGITS])
    asked = np.stack([heard(d, f"en-us+{v}") for v in ("m2", "f4") for d in DIGITS])
    distance = np.abs(asked[:, None] - known[None]).mean((2, 3))
    right = distance.argmin(1) % 10 == np.arange(20) % 10
    assert right.mean() > 0.7, right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("seven", "klingonese"), "no voice 'klingonese'"),
        (("seven", "en-us+nobody"), "nobody in eSpeak NG is called 'nobody'"),
        (("seven", "en-us", 20), "a speed of 20; give 80 to 450"),
        (("seven", "en-us", 175, 100), "a pitch of 100; give 0 to 99"),
        (("  ",), "cannot be spoken"),
        (("...",), "has nothing that the voice 'en-us' can say"),
        (("one\0two",), "cannot be spoken"),
    ],
)
def test_what_cannot_be_said_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        spoken(*arguments)
    assert len(spoken("one"))  # the library is left as it was found
