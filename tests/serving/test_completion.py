"""Invariance: a completion's text does not depend on how bytes were cut into tokens."""

import hypothesis
from hypothesis import strategies as st

from deepseek_jax.serving.completion import Completion


class Pieces:
    """A tokenizer whose token i is the i-th piece of bytes; 0 ends."""

    eos_id = 0

    def __init__(self, pieces):
        self.pieces = [b"", *pieces]

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)


def complete(pieces, stop=(), eos=True):
    completion = Completion(Pieces(pieces), 0, stop)
    shown = []
    for token in [*range(1, len(pieces) + 1), *([0] if eos else [])]:
        if completion.ended:
            break
        shown.append(completion.add(token))
    shown.append(completion.finish())
    assert "".join(shown) == completion.text
    assert completion.ended
    return completion.text, shown


@st.composite
def cut_texts(draw, alphabet):
    data = draw(st.text(alphabet, max_size=12)).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return data, [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@hypothesis.given(cut_texts("aé字🙂"))
def test_characters_come_whole(case):
    data, pieces = case
    text, shown = complete(pieces)
    assert text == data.decode()
    assert not any("\ufffd" in part for part in shown)


@hypothesis.given(cut_texts("abé"), st.text("abé", min_size=1, max_size=4))
def test_text_ends_before_the_stop_text(case, stop):
    data, pieces = case
    assert complete(pieces, [stop])[0] == data.decode().split(stop)[0]


@hypothesis.given(
    cut_texts("abc"), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3)
)
def test_no_stop_text_is_ever_shown(case, stop):
    text, _ = complete(case[1], stop)
    assert not any(s in text for s in stop)
    assert case[0].decode().startswith(text)


def test_bytes_of_no_character_become_one_replacement():
    assert complete([b"a", b"\xf0\x9f"])[0] == "a\ufffd"
    assert complete([b"a", b"\xf0\x9f"], eos=False)[0] == "a\ufffd"
    assert complete([b"\xff", b"b"])[0] == "\ufffdb"


def test_text_is_shown_as_soon_as_it_may_be():
    _, shown = complete([b"one", b" st", b"ep", b" st", b"op", b" two"], [" stop"])
    assert shown == ["one", "", " step", "", "", ""]


def test_end_token_ends():
    completion = Completion(Pieces([b"a", b"b"]), 0)
    assert [completion.add(t) for t in (1, 0)] == ["a", ""]
    assert completion.ended
    assert completion.finish() == ""
