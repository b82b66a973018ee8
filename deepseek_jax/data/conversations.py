"""Conversations about pictures, and how they become tokens of which the answers are learned.

Questions about OpenMoji's drawings (which group an emoji belongs to: PyPI `emojis`, from GitHub's
gemoji; its name: data/emoji), and the messages that files bring: {"messages": [{"role": "user",
"content": "<image> What is this?"}, {"role": "assistant", "content": "A cat"}]}.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data import emoji, media
from deepseek_jax.data.corpus import digest, key_hash
from deepseek_jax.data.tiles import TEXT, Sight
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.vision import decode_image

MARK = "<image>"  # where a picture stands in a message
MARKS = (MARK, "<image_placeholder>")  # what tokenizers call the token that stands for images
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


class Talk(NamedTuple):
    """A conversation about pictures."""

    turns: tuple[tuple[str, str], ...]
    """(role, text), a MARK in the text for each picture in order."""
    images: tuple[Callable[[], np.ndarray], ...]
    """Each uint8 [H, W, 3], decoded when it is called; InputError where it is damaged."""
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
            turns = ("user", f"{MARK}\n{question}"), ("assistant", answer)
            image = functools.partial(self._image, chosen)
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
    """Conversations of files; what is damaged raises InputError when it is used."""

    def __init__(self, source: Files):
        read = dataclasses.replace(source, texts=("messages",))
        self.given, self.media = source, media.Media(read)
        self.hashes, self.fingerprint = self.media.hashes, self.media.fingerprint

    def __reduce__(self):
        return FileTalks, (self.given,)

    def talks(self, number: int, draw: np.random.Generator | None) -> list[Talk]:
        """The example's conversation. InputError where its messages are not as they should be."""
        del draw
        found = self.media.example(number)
        turns = tuple(_turn(each, found.name) for each in found.captions.get("messages", ()))
        pictures = {kind: data for kind, data in found.media.items() if kind.startswith("image")}
        if not any(role == "assistant" for role, _ in turns):
            raise InputError(f"{found.name}: its messages have no answer of an assistant")
        images = tuple(
            functools.partial(decode_image, data, f"{found.name}, {kind}")
            for kind, data in pictures.items()
        )
        marks = sum(text.count(MARK) for _, text in turns)
        if marks != len(images):
            raise InputError(f"{found.name}: {marks} times {MARK}, and {len(images)} images")
        return [Talk(turns, images, "answers", found.name)]


def _turn(message: str, where: str) -> tuple[str, str]:
    try:
        said = json.loads(message)
        role, content = said["role"], said["content"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where}: not a message with role and content: {message:.60}") from None
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise InputError(f"{where}: a message's role is {role!r:.20}, its content {content!r:.40}")
    if role == "assistant" and MARK in content:
        raise InputError(f"{where}: an answer holds {MARK}; pictures stand in questions")
    return role, content


class Written(NamedTuple):
    """A conversation as tokens, n of everything."""

    ids: list[int]
    sources: list[int]
    """Where each embedding comes from: data/tiles."""
    answers: list[bool]
    """What is learned: answers' tokens and the end token of each."""


def written(
    talk: Talk,
    dialog: Dialog,
    tokenizer: Tokenizer,
    image_id: int,
    sight: Sight,
    grids: list[tuple[int, int]],
) -> Written:
    """[bos] and the turns of a conversation whose images have these grids."""
    found = Written([tokenizer.bos_id], [TEXT], [False])
    left, views = iter(grids), 0

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
        first, *others = f"{text}{dialog.end}".split(MARK)
        add(tokenizer.encode(first))
        for other in others:
            grid = next(left)
            layout = sight.layout(grid)
            found.ids.extend([image_id] * len(layout))
            moved = np.where(layout >= 0, layout + views * sight.tokens, layout)
            found.sources.extend(moved.tolist())
            found.answers.extend([False] * len(layout))
            views += sight.num_views(grid)
            add(tokenizer.encode(other))
    return found
