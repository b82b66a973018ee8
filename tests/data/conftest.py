"""Small corpora; caches live in temporary folders."""

import pathlib

import hypothesis
import pytest

hypothesis.settings.register_profile("data", deadline=None)  # machines are shared
hypothesis.settings.load_profile("data")

WORDS = "the quick brown fox jumps over the lazy dog while 深度求索 learns; naïve café 🦊 x1 = 42\n"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Ten text files of different lengths, some of them shorter than any row."""
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"{i}: " + WORDS[: 7 * i + 3] * (3 * i + 1) + "\n")
    return tmp_path
