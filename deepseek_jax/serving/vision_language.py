"""A language model that sees, to use: score and complete rows in which images stand.

A row has as many of the image's tokens as an image takes (`VisionLanguage.layout`); a prompt has
one an image, which is repeated here. Images are prepared as the published processors do.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepseek_jax.checkpoint import huggingface, manager, vision_language
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.core.target import leave_absent_tpus
from deepseek_jax.data.tiles import tiled
from deepseek_jax.data.tokenizer import INFO, Tokenizer, load_tokenizer
from deepseek_jax.data.vision import (
    NORMALIZATIONS,
    ImageTransform,
    Normalization,
    channels_first,
    normalized,
    prepared,
)
from deepseek_jax.models.projectors import DownsampleProjector
from deepseek_jax.models.vision_language import (
    TEXT,
    VisionLanguage,
    VisionLanguageModel,
    build_vision_language,
)
from deepseek_jax.serving import chat
from deepseek_jax.serving.inputs import images_of
from deepseek_jax.serving.language import LanguageModel, check_texts

Grid = tuple[int, int]
MARKS = ("<image>", "<image_placeholder>")  # what tokenizers call the token that stands for images
AROUND = {"janus": ("<begin_of_image>", "<end_of_image>")}  # what a family puts around an image


@dataclasses.dataclass(frozen=True)
class SeeingModel(LanguageModel):
    """A vision-language model with its weights and its tokenizer.

    All that a `LanguageModel` does it does with images among the tokens.
    """

    model: VisionLanguageModel
    config: VisionLanguage
    kind: str = ""
    """The folder's model_type; of an original Janus "janus"."""
    normalization: Normalization = "half"
    """Of pictures: a key of data.vision.NORMALIZATIONS."""
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the rows that are being completed: `features`, and `sources` by row."""

    @property
    def image_id(self) -> int:
        """The token that stands for images. InputError where nothing says which it is."""
        if self.config.image_id is not None:
            return self.config.image_id
        found = [self.tokenizer.token_id(name) for name in MARKS] if self.tokenizer else []
        if not (found := [number for number in found if number is not None]):
            raise InputError("neither config.json nor a tokenizer says which token is an image's")
        return found[0]

    def logits(
        self,
        tokens: Any,
        mask: Any = None,
        *,
        images: Any = None,
        grids: Sequence[Grid] | None = None,
    ) -> Float[Array, "B T V"]:
        """Next-token logits, float32, of rows [T] or [B, T] and their images, in the rows' order.

        `images` are views [N, C, H, W] as Hugging Face's processors make them. DeepSeek-VL2's are
        each image's whole and its tiles, and `grids` each image's (tiles_w, tiles_h). Raises
        InputError where a row's image tokens are not as many as its images take.
        """
        if images is None:
            return super().logits(tokens, mask)
        tokens = self._checked(tokens)
        given = self.inputs(tokens, images, grids)
        if mask is not None:
            mask = np.atleast_2d(np.asarray(mask, bool))
            if mask.shape != tokens.shape:
                raise InputError(f"mask has shape {mask.shape}, and tokens {tokens.shape}")
            given["segments"] = mask.astype(np.int32)
            given["positions"] = np.maximum(np.cumsum(mask, 1, dtype=np.int32) - 1, 0)
        return _logits(self.model, self.params, tokens, given)

    def inputs(
        self, tokens: np.ndarray, images: Any, grids: Sequence[Grid] | None = None
    ) -> dict[str, np.ndarray]:
        """`images` [B, M, H, W, C] and `sources` [B, T] of the model's calls; see `logits`."""
        views = images_of(self.config.vision, images)["images"]
        if isinstance(self.config.projector, DownsampleProjector):
            if grids is None:
                raise InputError("this model's images come as tiles: give each one's grid, too")
            grids = [(int(wide), int(high)) for wide, high in grids]
        else:
            grids = [(1, 1)] * len(views)
        if sum(map(self.config.num_views, grids)) != len(views):
            raise InputError(f"the grids {grids} are not those of {len(views)} views")
        sources, by_row = _sources(self.config, tokens == self.image_id, grids)
        found = np.zeros((len(tokens), max(map(len, by_row)), *views.shape[1:]), views.dtype)
        for row, numbers in enumerate(by_row):
            found[row, : len(numbers)] = views[numbers]
        return {"images": found, "sources": sources}

    def prepared(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, list[Grid]]:
        """Pictures uint8 [H, W, 3] of one prompt as views [N, 3, H, W], normalized, and grids."""
        size, way = self.config.vision.image_size[0], self.normalization
        if not isinstance(self.config.projector, DownsampleProjector):
            transform = ImageTransform(size=size, fit="pad", normalization=way)
            return prepared(pictures, transform), [(1, 1)] * len(pictures)
        made = [
            tiled(picture, num_images=len(pictures), tile=size, normalization=way)
            for picture in pictures
        ]
        views = np.concatenate([one.views for one in made])
        return channels_first(normalized(views, way)), [one.grid for one in made]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        images: Sequence[Any] | None = None,
        **more: Any,
    ) -> list[str]:
        """Complete each prompt: `LanguageModel.generate`, with pictures uint8 [H, W, 3].

        `images` holds each prompt's list of them (or its one picture); a prompt has one image token
        (such as <image_placeholder>) for each, or none: then they come before it. Raises InputError
        for what does not fit.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if images is None or self.tokenizer is None:
            return super().generate(prompts, **more)
        stop, stream = more.pop("stop", ()), more.pop("stream", None)
        stop = [stop] if isinstance(stop, str) else list(stop)
        check_texts(prompts, stop)
        if len(images) != len(prompts):
            raise InputError(f"there are {len(prompts)} prompts and images for {len(images)}")
        bos = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        listed = [[x] if isinstance(x, np.ndarray) else list(x) for x in images]
        rows = []
        for prompt, own in zip(prompts, listed, strict=True):
            ids = self.tokenizer.encode_marked(prompt)
            before = [] if self.image_id in ids else [self.image_id] * len(own)
            rows.append([*bos, *before, *ids])
        return self._told(rows, listed, stop, stream, more)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        images: Sequence[np.ndarray] | None = None,
        **more: Any,
    ) -> str:
        """`LanguageModel.chat`, with a picture uint8 [H, W, 3] for each image token.

        Raises InputError for what does not fit.
        """
        if images is None:
            return super().chat(messages, **more)
        stop, stream = more.pop("stop", ()), more.pop("stream", None)
        stop = [stop] if isinstance(stop, str) else list(stop)
        how = {name: more.pop(name) for name in ("tools", "thinking", "variables") if name in more}
        row = self.chat_tokens(messages, **how)
        show = (lambda _, new: stream(new)) if stream else None
        return self._told([row], [list(images)], stop, show, more)[0]

    def _told(
        self,
        rows: list[list[int]],
        images: list[list[np.ndarray]],
        stop: Sequence[str],
        stream: Callable[[int, str], None] | None,
        settings: dict[str, Any],
    ) -> list[str]:
        """Completions of rows with one token an image."""
        assert self.tokenizer is not None  # the callers have looked
        pairs = [self._expanded(row, own) for row, own in zip(rows, images, strict=True)]
        rows = [row for row, *_ in pairs]
        views = [views for _, views, _ in pairs if len(views)]
        grids = [grid for *_, own in pairs for grid in own]
        looking = self.looking(rows, np.concatenate(views), grids) if views else self
        return looking._completed(self.tokenizer, rows, stop, stream, settings)

    def generate_tokens(
        self,
        rows: Sequence[Sequence[int]],
        *,
        images: Any = None,
        grids: Sequence[Grid] | None = None,
        **settings: Any,
    ) -> list[list[int]]:
        """`LanguageModel.generate_tokens`, of rows with all their image tokens; see `logits`."""
        if images is None:
            return super().generate_tokens(rows, **settings)
        rows = [self._checked(row)[0].tolist() for row in rows]
        return self.looking(rows, images, grids).generate_tokens(rows, **settings)

    def looking(
        self, rows: Sequence[Sequence[int]], images: Any, grids: Sequence[Grid] | None = None
    ) -> "SeeingModel":
        """The model while it completes these rows: their images encoded."""
        tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
            if row[-1] == self.image_id:
                raise InputError("a prompt ends with an image; let text follow it")
        given = self.inputs(tokens, images, grids)
        features = _features(self.model, self.params, given["images"])
        return dataclasses.replace(self, seen={"features": features, "sources": given["sources"]})

    def _expanded(
        self, row: list[int], pictures: Sequence[np.ndarray]
    ) -> tuple[list[int], np.ndarray, list[Grid]]:
        """A prompt with each image's tokens in the place of its one, its views and their grids."""
        assert self.tokenizer is not None
        if (count := row.count(self.image_id)) != len(pictures):
            raise InputError(
                f"a prompt has {count} image tokens (id {self.image_id}) and {len(pictures)} images"
            )
        if not pictures:
            return row, np.empty(0), []
        views, grids = self.prepared(pictures)
        names = AROUND.get(self.kind, ())
        known = [self.tokenizer.token_id(name) for name in names]
        around = [number for number in known if number is not None]
        if len(around) < len(names):
            raise InputError(f"the tokenizer has no {' or no '.join(names)}")
        first, last = around[:1], around[1:]
        found: list[int] = []
        left = iter(grids)
        for token in row:
            if token != self.image_id:
                found.append(token)
                continue
            found += [*first, *[token] * len(self.config.layout(next(left))), *last]
        return found, views, grids

    @property
    def _chunk(self) -> int:
        whole = self.config.whole_images and self.seen
        return 2**30 if whole else super()._chunk

    def _beside(self, part: slice) -> dict[str, Any]:
        if not self.seen:
            return {}
        sources = self.seen["sources"][:, part]
        missing = part.stop - part.start - sources.shape[1]
        sources = np.pad(sources, ((0, 0), (0, missing)), constant_values=TEXT)
        return {"features": self.seen["features"], "sources": sources}


def _sources(
    config: VisionLanguage, marked: np.ndarray, grids: Sequence[Grid]
) -> tuple[np.ndarray, list[list[int]]]:
    """Where each token's embedding comes from, [B, T], and each row's views, by their numbers."""
    sources = np.full(marked.shape, TEXT, np.int32)
    by_row: list[list[int]] = []
    left, first = list(grids), 0
    for row, its in enumerate(marked):
        needed, laid, own = int(its.sum()), [], 0
        while needed and left:
            layout = config.layout(left[0])
            if len(layout) > needed:
                break
            laid.append(np.where(layout >= 0, layout + own * config.view_tokens, layout))
            needed -= len(layout)
            own += config.num_views(left.pop(0))
        if needed:
            raise InputError(
                f"row {row} has {int(its.sum())} image tokens; {needed} of them are no image's"
            )
        if laid:
            sources[row, its] = np.concatenate(laid)
        by_row.append(list(range(first, first + own)))
        first += own
    if left:
        raise InputError(f"the rows have image tokens for all but {len(left)} images")
    return sources, by_row


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: VisionLanguageModel, params: Any, tokens: Any, given: dict[str, Any]) -> Array:
    output = model.apply(params, tokens, **given, drop=False)
    return model.logits(params, output.hidden)


@functools.partial(jax.jit, static_argnums=0)
def _features(model: VisionLanguageModel, params: Any, images: Any) -> Array:
    return model.features(params, images)


def is_seeing(path: str | pathlib.Path) -> bool:
    """Whether a path holds a vision-language model: a folder of Hugging Face's, or one of ours."""
    if not is_folder_of_tensors(path):
        recorded = manager.read_config(manager.resolve(path))
        return recorded["model"].get("type") == VisionLanguage.__name__
    original = huggingface.read_optional(pathlib.Path(path), "config.json")
    return vision_language.joined_of(original) is not None


def load_seeing(path: str | pathlib.Path) -> SeeingModel:
    """The vision-language model of a Hugging Face folder, a run or a checkpoint.

    On a CPU it computes in float32. Raises InputError when its weights are not what its config
    says.
    """
    leave_absent_tpus()
    if not is_folder_of_tensors(path):
        directory = manager.resolve(path)
        recorded = manager.read_config(directory)
        config = from_dict(VisionLanguage, recorded["model"], "model")
        precision = from_dict(Precision, recorded["precision"], "precision")
        if precision.compute == "auto" and jax.default_backend() == "cpu":
            precision = dataclasses.replace(precision, compute="float32")
        model = build_vision_language(_unrolled(config), precision)
        params = manager.load_params(directory, model.shapes, model.layers)
        beside = directory / huggingface.BESIDE
        tokenizer = huggingface.tokenizer_of(beside)
        if tokenizer is None and (directory / INFO).exists():
            tokenizer = load_tokenizer(directory)
        return _opened(model, params, recorded, beside, tokenizer)
    folder = huggingface.open_any(huggingface.fetched(path))
    folder = folder._replace(config=_unrolled(folder.config))
    dtype = next(iter(folder.tensors.values())).dtype
    precision = Precision(params="bfloat16" if dtype == jnp.bfloat16 else "float32")
    if jax.default_backend() == "cpu":
        precision = Precision(compute="float32")
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
    return SeeingModel(
        model,
        params,
        tokenizer,
        model.config,
        recorded,
        huggingface.end_ids(beside, tokenizer),
        chat.renderer(beside),
        "janus" if "gen_vision_config" in original else original.get("model_type", ""),
        normalization_of(beside),
    )


def normalization_of(path: pathlib.Path) -> Normalization:
    """How a folder's processor normalizes pictures, 0.5 and 0.5 where it does not say.

    Raises InputError for a way that has no name here.
    """
    found = huggingface.read_optional(path, "preprocessor_config.json", "processor_config.json")
    found |= found.get("image_processor") or {}
    mean, deviation = (found.get(f"image_{name}") or [0.5] * 3 for name in ("mean", "std"))
    for name, (known, other) in NORMALIZATIONS.items():
        if np.allclose(mean, known, atol=1e-6) and np.allclose(deviation, other, atol=1e-6):
            return name
    raise InputError(f"{path}: pictures of mean {mean} and deviation {deviation} are unknown here")
