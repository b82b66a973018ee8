"""A language model that sees and may hear, to use: rows in which images, videos, sounds stand.

A row has as many of the image's tokens as an image takes (`VisionLanguage.layout`); a prompt has
one an image, which is repeated here. A video's frames are images. Images are prepared as the
published processors do.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from deepseek_jax.checkpoint import huggingface, manager
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.target import leave_absent_tpus
from deepseek_jax.data.conversations import MARKS, NOUNS
from deepseek_jax.data.tiles import TEXT, Grid
from deepseek_jax.data.tokenizer import INFO, Tokenizer, load_tokenizer
from deepseek_jax.models.ear import Ear
from deepseek_jax.models.vision_language import (
    VisionLanguage,
    VisionLanguageModel,
    build_vision_language,
)
from deepseek_jax.serving import chat, media
from deepseek_jax.serving.language import (
    LanguageModel,
    check_texts,
    precision_of_folder,
    precision_of_run,
)


@dataclasses.dataclass(frozen=True)
class SeeingModel(LanguageModel):
    """A vision-language model with its weights and its tokenizer.

    All that a `LanguageModel` does it does with images, videos and sounds among the tokens.
    """

    model: VisionLanguageModel
    config: VisionLanguage
    kind: str = ""
    """The folder's model_type; of an original Janus "janus"."""
    look: media.Look = media.Look("half")
    """How pictures are prepared."""
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the rows that are being completed: `features`, `sources`, perhaps `learned`, by row."""

    @property
    def image_id(self) -> int:
        """The token that stands for images. InputError where nothing says which it is."""
        return self._id("image", self.config.image_id)

    @property
    def ear(self) -> Ear:
        """What hears. InputError where the model has no ear."""
        if self.config.audio is None:
            raise InputError(
                "this model takes no audio: it has no ear (its config's audio is None)"
            )
        return self.config.audio

    @property
    def audio_id(self) -> int:
        """The token that stands for sounds. InputError without one, or an ear."""
        return self._id("audio", self.ear.audio_id)

    def _id(self, kind: str, known: int | None = None) -> int:
        if known is not None:
            return known
        mark = media.marks_of(self.tokenizer).get(kind)
        if self.tokenizer is None or mark is None:
            raise InputError(f"neither the config nor a tokenizer says which token is {kind}")
        found = self.tokenizer.token_id(mark)
        assert found is not None  # it has the mark
        return found

    def logits(
        self,
        tokens: Any,
        mask: Any = None,
        *,
        images: Any = None,
        grids: Sequence[Grid] | None = None,
        audio: Sequence[Any] | None = None,
        video: Sequence[Any] | None = None,
        asked: Sequence[int] | None = None,
    ) -> Float[Array, "B T V"]:
        """Next-token logits, float32, of rows [T] or [B, T] and their media, in the rows' order.

        `images` are views [N, C, H, W] as Hugging Face's processors make them. DeepSeek-VL2's are
        each image's whole and its tiles, and `grids` each image's (tiles_w, tiles_h); a NaFlex's
        are patches [N, T, X], and `grids` (patches_w, patches_h). Of a Hybrid's processor it is a
        dict of pixel_values and high_res_pixel_values. Instead `video` may be films,
        their frames being images; `audio` are sounds (see `media.opened`). `asked`: how many of
        each row's tokens are its question (config.prefix); None: all. Raises InputError where a
        row's tokens are not as many as its media take.
        """
        if images is None and audio is None and video is None:
            return super().logits(tokens, mask)
        if video is not None:
            if images is not None:
                raise InputError("logits takes images or video: give frames as images, with grids")
            films = [media.opened("video", film) for film in video]
            images, grids = media.views_of_films(self.config, self.look, films)
        tokens = self._checked(tokens)
        given = self.inputs(tokens, images, grids, audio)
        if mask is not None:
            mask = np.atleast_2d(np.asarray(mask, bool))
            if mask.shape != tokens.shape:
                raise InputError(f"mask has shape {mask.shape}, and tokens {tokens.shape}")
            given["segments"] = mask.astype(np.int32)
            given["positions"] = np.maximum(np.cumsum(mask, 1, dtype=np.int32) - 1, 0)
        if asked is not None:
            given["learned"] = media.answered(asked, tokens.shape, mask)
        return _logits(self.model, self.params, tokens, given)

    def inputs(
        self,
        tokens: np.ndarray,
        images: Any = None,
        grids: Sequence[Grid] | None = None,
        audio: Sequence[Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """What the model's calls take beside tokens: see `logits`."""
        slots, given = 0, {"sources": np.full(tokens.shape, TEXT, np.int32)}
        if images is not None:
            given = media.seen(self.config, tokens == self.image_id, images, grids)
            slots = len(given["images"][0]) * self.config.view_tokens
        if audio is not None:
            marked = tokens == self.audio_id
            given["sounds"], heard = media.heard(self.ear, marked, audio)
            given["sources"] = np.where(marked, heard + slots, given["sources"])
        return given

    def prepared(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, list[Grid]]:
        """Pictures uint8 [H, W, 3] of one prompt as views [N, ...], normalized, and grids."""
        return media.views_of_pictures(self.config, self.look, pictures)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        images: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
        video: Sequence[Any] | None = None,
        num_frames: int = media.FRAMES,
        **more: Any,
    ) -> list[str]:
        """Complete each prompt: `LanguageModel.generate`, with pictures, sounds and films.

        `images`, `audio` and `video` hold each prompt's list of them (or its one), as
        `media.opened` takes them; a prompt has one mark (such as <image_placeholder>) for each of a
        kind, or none: then they come before it. `num_frames` are taken of a film that is a file.
        Raises InputError for what does not fit.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        given = {"image": images, "video": video, "audio": audio}
        if all(x is None for x in given.values()) or self.tokenizer is None:
            return super().generate(prompts, **more)
        stop, stream = more.pop("stop", ()), more.pop("stream", None)
        stop = [stop] if isinstance(stop, str) else list(stop)
        check_texts(prompts, stop)
        lists = {k: media.by_prompt(k, x, len(prompts)) for k, x in given.items()}
        shown = [{kind: lists[kind][row] for kind in lists} for row in range(len(prompts))]
        bos = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        rows = []
        for prompt, own in zip(prompts, shown, strict=True):
            row = self._marked(self.tokenizer.encode_marked(prompt))
            before = [kind for kind in own if kind not in row for _ in own[kind]]
            rows.append([*bos, *before, *row])
        return self._told(rows, shown, num_frames, stop, stream, more)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        images: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
        video: Sequence[Any] | None = None,
        num_frames: int = media.FRAMES,
        **more: Any,
    ) -> str:
        """`LanguageModel.chat`, with a picture, film or sound for each of their marks.

        They may stand in the messages instead: content [{"type": "image", "image": picture},
        {"type": "text", "text": "what is it?"}]. Raises InputError for what does not fit.
        """
        given = {"image": images, "video": video, "audio": audio}
        messages, within = media.without_media(messages)
        for kind, found in within.items():
            if given[kind] is not None:
                raise InputError(f"give {NOUNS[kind]} in the messages or beside, not both")
            given[kind] = found
        if all(x is None for x in given.values()):
            return super().chat(messages, **more)
        stop, stream = more.pop("stop", ()), more.pop("stream", None)
        stop = [stop] if isinstance(stop, str) else list(stop)
        how = {name: more.pop(name) for name in ("tools", "thinking", "variables") if name in more}
        row = self._marked(self.chat_tokens(messages, **how))
        if self.config.prefix == "question" and (first := media.first_question(messages)):
            row = media.with_answer(row, self._marked(self.chat_tokens(first, **how)))
        shown = {kind: list(x or ()) for kind, x in given.items()}
        show = (lambda _, new: stream(new)) if stream else None
        return self._told([row], [shown], num_frames, stop, show, more)[0]

    def _marked(self, ids: list[int]) -> list[int | str]:
        """A prompt with each medium's mark as its kind."""
        ear, marks = self.config.audio, media.marks_of(self.tokenizer)
        known = {"image": self.config.image_id, "video": None}
        known |= {"audio": ear.audio_id} if ear else {}
        there = [kind for kind, number in known.items() if number is not None or kind in marks]
        kinds = {self._id(kind, known[kind]): kind for kind in there}
        return [kinds.get(number, number) for number in ids]

    def _told(
        self,
        rows: list[list[int | str]],
        shown: list[dict[str, list[Any]]],
        num_frames: int,
        stop: Sequence[str],
        stream: Callable[[int, str], None] | None,
        settings: dict[str, Any],
    ) -> list[str]:
        """Completions of rows with one mark a medium."""
        assert self.tokenizer is not None  # the callers have looked
        found, views, grids, waves, asked = [], [], [], [], []
        for row, own in zip(rows, shown, strict=True):
            full, question, seen, laid, heard = self._expanded(row, own, num_frames)
            found.append(full)
            asked.append(question)
            views += seen
            grids += laid
            waves += heard
        images = np.concatenate(views) if views else None
        given = found, images, grids or None, waves or None, asked
        looking = self.looking(*given) if views or waves else self
        return looking._completed(self.tokenizer, found, stop, stream, settings)

    def generate_tokens(
        self,
        rows: Sequence[Sequence[int]],
        *,
        images: Any = None,
        grids: Sequence[Grid] | None = None,
        audio: Sequence[Any] | None = None,
        **settings: Any,
    ) -> list[list[int]]:
        """`LanguageModel.generate_tokens`, of rows with all their media's tokens; see `logits`."""
        if images is None and audio is None:
            return super().generate_tokens(rows, **settings)
        rows = [self._checked(row)[0].tolist() for row in rows]
        return self.looking(rows, images, grids, audio).generate_tokens(rows, **settings)

    def looking(
        self,
        rows: Sequence[Sequence[int]],
        images: Any = None,
        grids: Sequence[Grid] | None = None,
        audio: Sequence[Any] | None = None,
        asked: Sequence[int] | None = None,
    ) -> "SeeingModel":
        """The model while it completes these rows: their media encoded; see `logits`."""
        tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        given = self.inputs(tokens, images, grids, audio)
        sources = given.pop("sources")
        if any(sources[number, len(row) - 1] != TEXT for number, row in enumerate(rows)):
            raise InputError("a prompt ends with an image or a sound; let text follow it")
        features = _features(self.model, self.params, given)
        seen = {"features": features, "sources": sources}
        if asked is not None:
            seen["learned"] = media.answered(asked, tokens.shape, tokens >= 0)
        return dataclasses.replace(self, seen=seen)

    def _expanded(
        self, row: list[int | str], own: Mapping[str, list[Any]], num_frames: int
    ) -> tuple[list[int], int, list[np.ndarray], list[Grid], list[np.ndarray]]:
        """A prompt with all its media's tokens, where its answer begins; views, grids, waves."""
        audio_id = self.audio_id if own["audio"] else -1  # who has no ear refuses first
        for kind, given in own.items():
            if (count := row.count(kind)) != len(given):
                raise InputError(
                    f"a prompt has {count} {kind} tokens ({' or '.join(MARKS[kind])}) and "
                    f"{len(given)} {NOUNS[kind]}"
                )
        there = {k: [media.opened(k, x, num_frames) for x in given] for k, given in own.items()}
        seen = self.prepared(there["image"]) if there["image"] else (np.empty(0), [])
        pictures = media.apart(self.config, *seen)
        look, sounds = self.look, iter(there["audio"])
        filmed = (media.views_of_films(self.config, look, [film]) for film in there["video"])
        films = (media.apart(self.config, *views) for views in filmed)
        first, last = media.around(self.kind, self.tokenizer)
        found, views, grids, answer = [], [], [], None
        for token in row:
            if not isinstance(token, str):
                found.append(token)
            elif token == media.ANSWER:
                answer = len(found)
            elif token == "audio":
                found += [audio_id] * len(self.ear.layout(len(next(sounds))))
            else:
                for some, grid in iter([next(pictures)]) if token == "image" else next(films):
                    views.append(some)
                    grids.append(grid)
                    layout = self.config.sight.layout(grid)
                    found += [*first, *[self.image_id] * len(layout), *last]
        return found, len(found) if answer is None else answer, views, grids, there["audio"]

    @property
    def _reading(self) -> tuple[int, int]:
        ways = {"images": (2**30, 1), "question": (2**30, 0)} if self.seen else {}
        return ways.get(self.config.prefix, super()._reading)

    def _beside(self, part: slice) -> dict[str, Any]:
        if not self.seen:
            return {}
        given = {"features": self.seen["features"]}
        for name in self.seen.keys() & {"sources", "learned"}:
            own = self.seen[name][:, part]
            missing = ((0, 0), (0, part.stop - part.start - own.shape[1]))
            given[name] = np.pad(own, missing, constant_values=TEXT if name == "sources" else True)
        return given


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: VisionLanguageModel, params: Any, tokens: Any, given: dict[str, Any]) -> Array:
    output = model.apply(params, tokens, **given, drop=False)
    return model.logits(params, output.hidden)


@functools.partial(jax.jit, static_argnums=0)
def _features(model: VisionLanguageModel, params: Any, given: dict[str, Any]) -> Array:
    return model.features(params, **given)


def load_seeing(path: str | pathlib.Path) -> SeeingModel:
    """The vision-language model of a Hugging Face folder, a run or a checkpoint.

    On a CPU it computes in float32. A run's views are as large as its last stage's. Raises
    InputError when its weights are not what its config says.
    """
    leave_absent_tpus()
    if not is_folder_of_tensors(path):
        directory = manager.resolve(path)
        recorded = manager.read_config(directory)
        config = from_dict(VisionLanguage, recorded["model"], "model")
        config = config.at_size(manager.last_stage(recorded).get("data", {}).get("size"))
        model = build_vision_language(_unrolled(config), precision_of_run(recorded))
        params = manager.load_params(directory, model.shapes, model.layers)
        beside = directory / huggingface.BESIDE
        tokenizer = huggingface.tokenizer_of(beside)
        if tokenizer is None and (directory / INFO).exists():
            tokenizer = load_tokenizer(directory)
        return _opened(model, params, recorded, beside, tokenizer)
    folder = huggingface.open_any(huggingface.fetched(path))
    folder = folder._replace(config=_unrolled(folder.config))
    precision = precision_of_folder(next(iter(folder.tensors.values())).dtype)
    model = build_vision_language(folder.config, precision)
    params = huggingface.load_any(folder, model, model.shapes)
    beside = folder.directory
    recorded = huggingface.recorded(folder, precision)
    return _opened(model, params, recorded, beside, huggingface.tokenizer_of(beside))


def _unrolled(config: VisionLanguage) -> VisionLanguage:
    """The config with the decoder's layers apart, which decodes faster."""
    return dataclasses.replace(config, language=dataclasses.replace(config.language, scan=False))


def _opened(
    model: VisionLanguageModel,
    params: Any,
    recorded: dict[str, Any],
    beside: pathlib.Path,
    tokenizer: Tokenizer | None,
) -> SeeingModel:
    """The model with what `beside`, a folder of Hugging Face's or what was kept of one, says."""
    original = huggingface.read_optional(beside, "config.json")
    own = manager.last_stage(recorded).get("data", {}).get("normalization")
    return SeeingModel(
        model,
        params,
        tokenizer,
        model.config,
        recorded,
        huggingface.end_ids(beside, tokenizer),
        chat.renderer(beside, media.marks_of(tokenizer)),
        "janus" if "gen_vision_config" in original else original.get("model_type", ""),
        media.Look(own) if own else media.look_of(beside, model.config),
    )
