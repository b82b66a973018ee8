"""Conversations about media, and how they become tokens of which the answers are learned.

Questions about OpenMoji's drawings (which group an emoji belongs to: PyPI `emojis`, from GitHub's
gemoji; its name: data/emoji), and the messages that files bring: {"messages": [{"role": "user",
"content": "<image> What is this?"}, {"role": "assistant", "content": "A cat"}]}. A mark stands for
each picture, sound or film, the marks of a kind in the order of its files.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data import emoji, media
from deepseek_jax.data.audio import decoded_wave
from deepseek_jax.data.corpus import digest, key_hash
from deepseek_jax.data.tiles import TEXT
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.video import film_frames
from deepseek_jax.data.vision import decode_image

Kind: TypeAlias = str  # of a medium: "image", "video" or "audio"
MARKS: dict[Kind, tuple[str, ...]] = {  # what tokenizers call the token that stands for a medium
    "image": ("<image>", "<image_placeholder>"),
    "video": ("<video>",),
    "audio": ("<audio>",),
}
NOUNS: dict[Kind, str] = {"image": "images", "video": "videos", "audio": "sounds"}
KINDS = {names[0]: kind for kind, names in MARKS.items()}  # by the mark that stands in a message
MARKED = re.compile(f"({'|'.join(KINDS)})")
Ask: TypeAlias = Literal["group", "name"]
Language: TypeAlias = Literal["en", "zh"]

# The first way of asking is the one that is asked when the model is evaluated.
QUESTIONS: dict[Ask, dict[Language, tuple[str, ...]]] = {
    "group": {"en": ("What is this?", "What kind of thing is this?"), "zh": ("这是什么\uff1f",)},
    "name": {"en": ("Describe the picture.", "Write a caption."), "zh": ("描述这张图。",)},
}
GROUPS = {  # as Unicode calls them -> the answers
    "Smileys & Emotion": {"en": "a face", "zh": "表情"},
    "People & Body": {"en": "people", "zh": "人物"},
    "Animals & Nature": {"en": "nature", "zh": "自然"},
    "Food & Drink": {"en": "food", "zh": "食物"},
    "Travel & Places": {"en": "travel", "zh": "旅行"},
    "Activities": {"en": "an activity", "zh": "活动"},
    "Objects": {"en": "an object", "zh": "物品"},
    "Symbols": {"en": "a symbol", "zh": "符号"},
    "Flags": {"en": "a flag", "zh": "旗帜"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmojiQuestions:
    """Questions about OpenMoji's drawings (extra `media`): needs no download.

    An example is a concept; which of its variants is shown is drawn, and held out is its first.
    """

    asks: tuple[Ask, ...] = ("group",)
    """What is asked: what kind of thing it is, or its name."""
    languages: tuple[Language, ...] = ("en", "zh")

    def __post_init__(self):
        if not (self.asks and self.languages):
            raise ValueError("A source of emoji must have asks and languages.")


Files: TypeAlias = media.MediaFolder | media.MediaShards | media.MediaParquet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialog:
    """How turns are written; special tokens by their names. The published DeepSeek-V2's words."""

    user: str = "User:"
    assistant: str = "Assistant:"
    end: str = "\n\n"
    """Behind what is no answer; an answer ends with the tokenizer's end token."""


class Medium(NamedTuple):
    """A picture, a film or a sound of a conversation."""

    kind: Kind
    read: Callable[[], np.ndarray]
    """uint8 [H, W, 3], uint8 [T, H, W, 3] or a wave [T], decoded when it is called; InputError
    where it is damaged."""


class Talk(NamedTuple):
    """A conversation about media."""

    turns: tuple[tuple[str, str], ...]
    """(role, text), in the text a mark for each medium."""
    media: tuple[Medium, ...]
    """In the order of their marks."""
    kind: str
    """What is asked: conversations of one kind are scored together."""
    name: str = "a conversation"
    """For messages."""

    @property
    def answer(self) -> str:
        """The answers, for people to read."""
        return " / ".join(text for role, text in self.turns if role == "assistant")


class EmojiTalks:
    """What is asked of each concept."""

    def __init__(self, source: EmojiQuestions, size: int, cache: pathlib.Path):
        self.given = source, size, cache
        self.source, self.found = source, emoji.open_emoji(size, cache)
        members: dict[str, list[int]] = {}
        names = self.found.names
        for number in sorted(range(len(names)), key=lambda n: (len(names[n]), names[n])):
            if self._said(number):  # the plainest comes first
                members.setdefault(self.found.groups[number], []).append(number)
        self.members = [*members.values()]
        self.hashes = np.array([*map(key_hash, members)], np.uint64)
        said = [self._said(number) for numbers in self.members for number in numbers]
        self.fingerprint = digest([self.found.names, said, size, QUESTIONS])

    def __reduce__(self):
        return EmojiTalks, self.given

    def talks(self, number: int, draw: np.random.Generator | None) -> list[Talk]:
        """What may be asked of a concept, of one of its variants; without a draw of the first."""
        variants = self.members[number]
        chosen = variants[draw.integers(len(variants)) if draw else 0]
        found = []
        for ask, language, answer in self._said(chosen):
            ways = QUESTIONS[ask][language]
            question = ways[draw.integers(len(ways)) if draw else 0]
            turns = ("user", f"<image>\n{question}"), ("assistant", answer)
            image = Medium("image", functools.partial(self._image, chosen))
            found.append(Talk(turns, (image,), f"{ask}/{language}"))
        return found

    def _image(self, number: int) -> np.ndarray:
        return np.asarray(self.found.images[number])

    def _said(self, number: int) -> list[tuple[Ask, Language, str]]:
        group = GROUPS.get(group_of(self.found.names[number], self.found.groups[number]), {})
        answers = {"group": group, "name": self.found.captions[number]}
        return [
            (ask, language, answers[ask][language])
            for ask in self.source.asks
            for language in self.source.languages
            if language in answers[ask]
        ]


@functools.cache
def _groups() -> dict[str, str]:
    """Unicode's group of each emoji, without joiners and form selectors."""
    return {_bare(x.emoji): x.category for x in require("emojis.db.db").EMOJI_DB}


def _bare(text: str) -> str:
    return text.replace(emoji.EMOJI_FORM, "").replace(emoji.JOINER, "")


def group_of(name: str, base: str) -> str:
    """Unicode's group of the drawing `name`, or of its `base` (data/emoji); "" where unknown."""
    if base == "flags":
        return "Flags"
    texts = [_bare(emoji.characters(each)) for each in (name, base)]
    return next((_groups()[text] for text in texts if text in _groups()), "")


class FileTalks:
    """Conversations of files; what is damaged raises InputError when it is used.

    Films give `frames` frames, sounds are resampled to `rate`.
    """

    def __init__(self, source: Files, frames: int, rate: int):
        read = dataclasses.replace(source, texts=("messages",))
        self.given, self.media = (source, frames, rate), media.Media(read)
        self.hashes, self.fingerprint = self.media.hashes, self.media.fingerprint

    def __reduce__(self):
        return FileTalks, self.given

    def talks(self, number: int, draw: np.random.Generator | None) -> list[Talk]:
        """The example's conversation; with a draw, films' frames are drawn.

        InputError where its messages are not as they should be.
        """
        found = self.media.example(number)
        turns = tuple(_turn(each, found.name) for each in found.captions.get("messages", ()))
        if not any(role == "assistant" for role, _ in turns):
            raise InputError(f"{found.name}: its messages have no answer of an assistant")
        _, frames, rate = self.given
        options: dict[Kind, tuple] = {"image": (), "video": (frames, draw), "audio": (rate,)}
        held: dict[Kind, list[Medium]] = {kind: [] for kind in KINDS.values()}
        for key, data in found.media.items():
            name, kind = f"{found.name}, {key}", KINDS[f"<{key.split()[0]}>"]
            read = functools.partial(DECODED[kind], data, name, *options[kind])
            held[kind].append(Medium(kind, read))
        marks = [KINDS[mark] for _, text in turns for mark in MARKED.findall(text)]
        for mark, kind in KINDS.items():
            if (count := marks.count(kind)) != len(held[kind]):
                many = f"{len(held[kind])} {NOUNS[kind]}"
                raise InputError(f"{found.name}: {count} times {mark}, and {many}")
        left = {kind: iter(own) for kind, own in held.items()}
        media_of = tuple(next(left[kind]) for kind in marks)
        return [Talk(turns, media_of, "answers", found.name)]


DECODED: dict[Kind, Callable[..., np.ndarray]] = {
    "image": decode_image,
    "video": film_frames,
    "audio": decoded_wave,
}


def _turn(message: str, where: str) -> tuple[str, str]:
    try:
        said = json.loads(message)
        role, content = said["role"], said["content"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where}: not a message with role and content: {message:.60}") from None
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise InputError(f"{where}: a message's role is {role!r:.20}, its content {content!r:.40}")
    if role == "assistant" and (mark := MARKED.search(content)):
        raise InputError(f"{where}: an answer holds {mark[0]}; media stand in questions")
    return role, content


def medium_token(kind: Kind, tokenizer: Tokenizer | None, known: int | None) -> int:
    """The token that stands for media of a kind: as the model says, or by its usual names."""
    if known is not None:
        return known
    found = [tokenizer.token_id(name) for name in MARKS[kind]] if tokenizer else []
    if not (there := [number for number in found if number is not None]):
        noun = {"audio": "a sound", "image": "an image", "video": "a film"}[kind]
        raise InputError(f"neither the model's config nor a tokenizer says which token is {noun}'s")
    return there[0]


class Written(NamedTuple):
    """A conversation as tokens, n of everything."""

    ids: list[int]
    sources: list[int]
    """Where each embedding comes from: data/tiles."""
    answers: list[bool]
    """What is learned: answers' tokens and the end token of each."""


class Place(NamedTuple):
    """What stands in a mark's place."""

    token: int
    """As often as the medium needs it."""
    sources: np.ndarray
    """Where each one's embedding comes from."""


def written(talk: Talk, dialog: Dialog, tokenizer: Tokenizer, places: Sequence[Place]) -> Written:
    """[bos] and the turns of a conversation whose media take these places."""
    found = Written([tokenizer.bos_id], [TEXT], [False])
    left = iter(places)

    def add(ids: list[int], answer: bool = False) -> None:
        found.ids.extend(ids)
        found.sources.extend([TEXT] * len(ids))
        found.answers.extend([answer] * len(ids))

    for role, text in talk.turns:
        if role == "assistant":
            add(tokenizer.encode_marked(dialog.assistant))
            add([*tokenizer.encode(f" {text}"), tokenizer.eos_id], answer=True)
            continue
        if role == "user":
            add(tokenizer.encode_marked(dialog.user))
            text = f" {text}"
        first, *others = MARKED.split(f"{text}{dialog.end}")[::2]
        add(tokenizer.encode(first))
        for other in others:
            token, sources = next(left)
            found.ids.extend([token] * len(sources))
            found.sources.extend(sources.tolist())
            found.answers.extend([False] * len(sources))
            add(tokenizer.encode(other))
    return found


def said(talk: Talk, dialog: Dialog) -> Iterator[str]:
    """The texts that a tokenizer reads of a conversation."""
    before = {"user": dialog.user, "assistant": dialog.assistant}
    for role, text in talk.turns:
        behind = "" if role == "assistant" else dialog.end
        yield from MARKED.split(f"{before.get(role, '')} {text}{behind}")[::2]
