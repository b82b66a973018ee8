"""Spoken text from eSpeak NG (the extra `speech`): voices, speeds and pitches without a download.

A formant synthesizer: it sounds like a robot, but says any text in 100 languages in milliseconds.
The library is GPL-3, so it is never a hard dependency; nothing of it is copied here.
"""

import ctypes
import pathlib
import threading

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.audio import resampled

SYNCHRONOUS, UTF8, IN_CHARACTERS = 2, 1, 1  # what speak_lib.h calls these modes
SPEED, PITCH = 1, 3  # and these parameters
SPEEDS, PITCHES = (80, 450), (0, 99)
TAKE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_alone = threading.Lock()  # the library has global state


def spoken(
    text: str, voice: str = "en-us", speed: int = 175, pitch: int = 50, rate: int = 16_000
) -> np.ndarray:
    """The text as sound, float32 [T] at `rate`: the same for the same arguments, in any order.

    `voice` is a language (en-us, en-gb, cmn, fr, ...), after a plus sign whose: m1 to m8, f1 to
    f5, or a name in the package's voices/!v. `speed` is in words a minute, 80 to 450; `pitch` from
    0 to 99. InputError: no such voice, out of these ranges, or nothing to say.
    """
    for name, value, (low, high) in (("speed", speed, SPEEDS), ("pitch", pitch, PITCHES)):
        if not low <= value <= high:
            raise InputError(f"a {name} of {value}; give {low} to {high}")
    if "\0" in text or not text.strip():
        raise InputError(f"{text!r} cannot be spoken; give a text of some words")
    with _alone:
        wave, native = _synthesized(text, voice, speed, pitch)
    if not wave.any():
        raise InputError(f"{text!r} has nothing that the voice {voice!r} can say")
    return resampled(wave, native, rate)


def _synthesized(text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, int]:
    """The wave and its rate. Loads and unloads the library: what it spoke before has an effect."""
    loader = require("espeakng_loader")
    voices = pathlib.Path(loader.get_data_path(), "voices", "!v")
    _, plus, whose = voice.partition("+")
    if plus and whose not in {path.name for path in voices.iterdir()}:
        raise InputError(f"no voice {voice!r}: nobody in eSpeak NG is called {whose!r}")
    library, pieces = ctypes.CDLL(loader.get_library_path()), [np.zeros(0, np.int16)]

    @TAKE
    def take(samples, count, events):
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    try:
        data = str(loader.get_data_path()).encode()
        if (rate := library.espeak_Initialize(SYNCHRONOUS, 0, data, 0)) <= 0:
            raise InputError("eSpeak NG does not start: install the extra `speech` anew")
        library.espeak_SetSynthCallback(take)
        if library.espeak_SetVoiceByName(voice.encode()):
            raise InputError(f"no voice {voice!r}; give a language of eSpeak NG's, as en-us or cmn")
        library.espeak_SetParameter(SPEED, speed, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        content = text.encode(errors="replace") + b"\0"
        size = ctypes.c_size_t(len(content))
        if library.espeak_Synth(content, size, 0, IN_CHARACTERS, 0, UTF8, None, None):
            raise InputError(f"eSpeak NG cannot say {text!r:.60}")
        library.espeak_Synchronize()
    finally:
        library.espeak_Terminate()
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
    return np.concatenate(pieces).astype(np.float32) / 2**15, rate
