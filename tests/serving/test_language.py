"""Reference: greedy with the cache is greedy without it. Invariance: rows are independent.

Round trip: a checkpoint loads as the model that was saved. All on tiny models, random weights.
"""

import copy
import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint.manager import disk_names
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.serving.language import _step

PROMPTS = ["def main(", "a", "Ünïcödé and a prompt that is quite a bit longer than the others"]


def uncached(lm, prompt, num_new):
    """Greedy without a cache: the whole row again for every token, padded to 96."""
    ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)]
    row = np.zeros((1, 96), np.int32)
    row[0, : len(ids)] = ids
    for end in range(len(ids), len(ids) + num_new):
        logits = lm.logits(row)[0, end - 1, : lm.tokenizer.vocab_size]
        row[0, end] = np.argmax(logits)
        if row[0, end] == lm.tokenizer.eos_id:
            break
    new = row[0, len(ids) : end + 1].tolist()
    new = new[: new.index(lm.tokenizer.eos_id)] if lm.tokenizer.eos_id in new else new
    return lm.tokenizer.decode_bytes(new).decode(errors="replace")


@pytest.mark.parametrize("name", ["gqa", "gqa window", "mla", "mla q_rank"])
def test_greedy_with_cache_is_greedy_without(tiny, name):
    lm = tiny(name)
    expected = [uncached(lm, prompt, 24) for prompt in PROMPTS]
    assert lm.generate(PROMPTS, max_new_tokens=24) == expected
    assert len(set(expected)) > 1


def test_long_prompts_enter_in_chunks(lm, monkeypatch):
    expected = lm.generate(PROMPTS, max_new_tokens=8)
    monkeypatch.setattr("deepseek_jax.serving.language.CHUNK", 16)
    assert lm.generate(PROMPTS, max_new_tokens=8) == expected


def test_a_row_does_not_depend_on_the_others(lm):
    settings = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
    together = lm.generate(PROMPTS, seed=7, **settings)
    assert lm.generate(PROMPTS[:1], seed=7, **settings) == together[:1]
    assert lm.generate([*PROMPTS[:2], "something else"], seed=7, **settings)[:2] == together[:2]
    assert lm.generate(PROMPTS, seed=8, **settings) != together


def test_rows_and_positions_draw_afresh(lm):
    """A model without preferences gives noise: the same key twice would repeat a token."""
    blank = dataclasses.replace(lm, params=jax.tree.map(jnp.zeros_like, lm.params))
    settings = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
    one, two, _ = blank.generate(["a", "a", "a"], **settings)
    assert one != two
    assert len(set(one)) > 4


def test_one_program_serves_many_lengths_and_settings(lm):
    lm.generate("ab", max_new_tokens=3, temperature=0.5, top_k=3)
    size = _step._cache_size()
    lm.generate("abcdefg", max_new_tokens=5, temperature=0.9, top_k=7, seed=1)
    assert _step._cache_size() == size


def test_top_k_of_one_and_tiny_temperatures_are_greedy(lm):
    greedy = lm.generate(PROMPTS, max_new_tokens=8)
    assert lm.generate(PROMPTS, max_new_tokens=8, temperature=1.0, top_k=1) == greedy
    assert lm.generate(PROMPTS, max_new_tokens=8, temperature=1e-5) == greedy
    assert lm.generate(PROMPTS, max_new_tokens=8, temperature=1e-300) == greedy
    assert lm.generate(PROMPTS, max_new_tokens=8, top_p=0.1, repetition_penalty=1.0) == greedy


def test_repetition_penalty_counts_prompt_and_completion(lm):
    """A huge penalty leaves tokens that are new to the row: none ever returns."""
    text = lm.generate("abcdefgh", max_new_tokens=20, repetition_penalty=1e9)[0]
    data = text.encode("utf-8", "replace").replace("\ufffd".encode(), b"")
    assert not set(data) & set(b"abcdefgh")
    assert len(set(data)) == len(data)


def test_stream_shows_what_is_returned(lm):
    shown = ["", "", ""]

    def show(row, text):
        assert text
        shown[row] += text

    assert lm.generate(PROMPTS, max_new_tokens=16, stream=show) == shown


def test_stop_texts_and_the_end_token_end_a_row(lm):
    full = lm.generate(PROMPTS, max_new_tokens=24)
    stop, end = full[0][4:6], next(c for c in full[2][1:] if c.isascii())
    cut = lm.generate(PROMPTS, max_new_tokens=24, stop=[stop, "never"])
    assert cut == [text.split(stop)[0] for text in full] != full
    ending = copy.copy(lm.tokenizer)
    ending.eos_id = ord(end)  # byte tokens: the model's own text now holds the end token
    ended = dataclasses.replace(lm, tokenizer=ending).generate(PROMPTS, max_new_tokens=24)
    assert ended == [text.split(end)[0] for text in full] != full


def test_logits(lm):
    tokens = [[1, 2, 3], [4, 5, 6]]
    for given in (tokens, np.array(tokens, np.uint8), jnp.array(tokens)):
        logits = lm.logits(given)
        assert logits.shape == (2, 3, lm.config.vocab_size)
        assert logits.dtype == jnp.float32
    np.testing.assert_allclose(lm.logits(tokens[1])[0], logits[1], atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "not empty"),
        ([[[1]]], "not empty"),
        ([[1, 2], [3]], "one length"),
        ([0.5], "integers"),
        (["a"], "integers"),
        ([-1, 2], "vocabulary"),
        ([10**6], "vocabulary"),
    ],
)
def test_bad_tokens_are_refused(lm, tokens, message):
    with pytest.raises(InputError, match=message):
        lm.logits(tokens)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "no prompt"),
        (["a", ""], {}, "prompt is empty"),
        ("\udcff", {}, "UTF-8"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"max_new_tokens": 2**20}, "make more than"),
        ("a", {"temperature": -0.1}, "temperature is -0.1"),
        ("a", {"temperature": float("nan")}, "temperature is nan"),
        ("a", {"temperature": float("inf")}, "temperature is inf"),
        ("a", {"top_k": 0}, "top_k is 0"),
        ("a", {"top_p": 0.0}, "top_p is 0.0"),
        ("a", {"top_p": 1.5}, "top_p is 1.5"),
        ("a", {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ("a", {"seed": -1}, "seed is -1"),
        ("a", {"stop": ["x", ""]}, "stop text is empty"),
    ],
)
def test_bad_requests_are_refused(lm, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        lm.generate(prompts, **settings)


def by_layer(lm):
    """The parameters under their names on disk, which know nothing of stacks."""
    found, layers = {}, layer_table(lm.config)
    for path, leaf in tree.flatten(lm.params).items():
        rows = disk_names(path, leaf.shape, layers)
        found |= dict(zip(rows, leaf, strict=True)) if rows else {path: leaf}
    return found


def test_a_checkpoint_loads_as_what_was_saved(lm, saved):
    loaded = deepseek_jax.load(saved)
    assert loaded.config == dataclasses.replace(lm.config, scan=False)
    ours, theirs = by_layer(lm), by_layer(loaded)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    assert loaded.generate(PROMPTS, max_new_tokens=8) == lm.generate(PROMPTS, max_new_tokens=8)


def test_importing_the_package_is_light():
    code = "import sys, deepseek_jax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        deepseek_jax.laod  # noqa: B018
