"""Tokenizers: round trips of any text, special tokens, files that are no good."""

import io

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.tokenizer import (
    BPE,
    Bytes,
    DeepSeek,
    SentencePiece,
    TokenizerFile,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)

TEXT = "the cat sat on the mat, 1234567 times;\n\tif x:\r\n        return 'naïve' 深度求索 🦊\n" * 3
BPE_300 = train_bpe(BPE(vocab_size=300), iter([TEXT]))
TRICKY = ["", " ", "\n\n  x", " a", "\ufeff<|eos|>", "\u2581x<0x41>", "e\u0301", "\x00", "🏳️‍🌈"]


def _sentencepiece(folder, **options) -> str:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path = folder / "spm.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.mark.parametrize("tokenizer", [open_tokenizer(Bytes()), BPE_300], ids=["bytes", "bpe"])
@given(text=st.one_of(st.text(), st.sampled_from(TRICKY)))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text.encode()
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_deepseek():
    tokenizer = open_tokenizer(DeepSeek())
    assert tokenizer.vocab_size == 129_280
    for text in [*TRICKY, TEXT]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    named = tokenizer.encode("<｜begin▁of▁sentence｜>")  # noqa: RUF001
    assert tokenizer.bos_id not in named
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


@pytest.mark.parametrize("dummy", [True, False])
def test_sentencepiece(tmp_path, dummy):
    path = _sentencepiece(tmp_path, add_dummy_prefix=dummy)
    tokenizer = open_tokenizer(SentencePiece(path=path))
    for text in ("the cat  sat", " a", "日本語 unseen ✓", "two\nlines"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("tokenizer", [open_tokenizer(Bytes()), BPE_300], ids=["bytes", "bpe"])
def test_save_and_load(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert again.files() == tokenizer.files()
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    ends = (again.vocab_size, again.bos_id, again.eos_id)
    assert ends == (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)


def test_bpe_is_trained_alike_twice_and_holds_its_size():
    assert train_bpe(BPE(vocab_size=300), iter([TEXT])).files() == BPE_300.files()


def test_chinese_characters_may_be_words_of_their_own():
    said = "面向右边的男人\uff0c较深肤色 and a dark one"
    lengths = []
    for split in (False, True):
        bpe = train_bpe(BPE(vocab_size=400, split_han=split), iter([said] * 9))
        ids = bpe.encode(said)
        assert bpe.decode(ids) == said
        lengths.append(len(ids))
        pieces = [bpe.decode([number]) for number in ids]
        han = [sum("\u4e00" <= letter <= "\u9fff" for letter in piece) for piece in pieces]
        assert max(han) == 1 if split else max(han) > 1
    assert lengths[0] < 8 < lengths[1]
    assert BPE_300.vocab_size == 300
    assert len(BPE_300.encode(TEXT)) < len(TEXT.encode()) / 1.3


def _word_level(path, *names: str) -> str:
    vocab = {name: i for i, name in enumerate([*names, "the", "[UNK]"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.enable_truncation(2)
    model.enable_padding(length=50)
    model.save(str(path))
    return str(path)


def test_a_file_with_one_end_token_uses_it_for_both_and_is_never_cut_or_padded(tmp_path):
    path = _word_level(tmp_path / "tokenizer.json", "a", "<|endoftext|>")
    tokenizer = open_tokenizer(TokenizerFile(path=str(tmp_path)))
    assert tokenizer.bos_id == tokenizer.eos_id == 1
    assert [len(ids) for ids in tokenizer.encode_batch(["the the the", "the"])] == [3, 1]
    named = open_tokenizer(TokenizerFile(path=path, bos="a"))
    assert (named.bos_id, named.eos_id) == (0, 1)
    named.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").bos_id == 0
    _word_level(tmp_path / "tokenizer.json", "a", "b")  # ends whose names only the config knows
    open_tokenizer(TokenizerFile(path=path, bos="a", eos="b")).save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == 1


def test_files_that_are_no_good_are_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "tokenizer_info.json").write_text("[]")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    plain = _word_level(tmp_path / "plain.json", "a")
    cases = {
        "nothing.json: No such file": TokenizerFile(path=str(tmp_path / "nothing.json")),
        "bad.json: not a tokenizer.json": TokenizerFile(path=str(tmp_path / "bad.json")),
        "bad.model: not a SentencePiece": SentencePiece(path=str(tmp_path / "bad.model")),
        "plain.json: none of its tokens": TokenizerFile(path=plain),
        "plain.json: has no token 'zz'": TokenizerFile(path=plain, eos="zz"),
    }
    for message, config in cases.items():
        with pytest.raises(InputError, match=message):
            open_tokenizer(config)
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="at least 258"):
        BPE(vocab_size=257)
