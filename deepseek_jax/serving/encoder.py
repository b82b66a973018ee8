"""An encoder to use: a Hugging Face folder's, fed with arrays in Hugging Face's own layout."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepseek_jax.checkpoint import encoders, huggingface, manager
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.target import leave_absent_tpus
from deepseek_jax.data.pairs import Pairs, text_row
from deepseek_jax.data.tokenizer import Characters, Tokenizer, load_tokenizer
from deepseek_jax.data.utterances import Utterances, standardized
from deepseek_jax.data.vision import prepared
from deepseek_jax.layers.encoder import Encoded
from deepseek_jax.models.audio import CTC, Wav2Vec2
from deepseek_jax.models.encoder import Encoder, EncoderConfig, build_encoder
from deepseek_jax.models.fusion import Fused
from deepseek_jax.models.speech import transcribed
from deepseek_jax.models.two_tower import Towers, TwoTower, build_towers
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.serving import classifier, language, vision_language
from deepseek_jax.serving.inputs import INPUTS, images_of, texts_of


@dataclasses.dataclass(frozen=True)
class EncoderModel:
    """An encoder with its weights."""

    encoder: Encoder
    params: Any
    config: EncoderConfig
    original: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The config.json that it comes from."""

    def encode(self, inputs: Any, **more: Any) -> Float[Array, "B T D"]:
        """The last hidden state, float32, of a batch as Hugging Face's processors make it.

        Pixels [B, C, H, W] or frames [B, T, C, H, W], normalized; of a ViT of any size with
        `interpolate_pos_encoding`, some hidden with `bool_masked_pos`. NaFlex: patches [B, T, X]
        with `pixel_attention_mask` and `spatial_shapes`. Whisper's mel [B, M, frames]; waves
        [B, T], normalized, or token ids [B, T], with `attention_mask` where rows are padded.
        Raises InputError for another shape.
        """
        return self.encoded(inputs, **more).hidden.astype(jnp.float32)

    def encoded(self, inputs: Any, *, keep: bool = False, **more: Any) -> Encoded:
        """The same with what else there is: a pooled vector, a mask, with `keep` all layers."""
        given = INPUTS[type(self.config)](self.config, inputs, **more)
        return _apply(self.encoder, self.params, given, keep)


@dataclasses.dataclass(frozen=True)
class SpeechModel(EncoderModel):
    """A wav2vec 2.0 with its weights; where its head is CTC, it writes down what it hears."""

    config: Wav2Vec2
    tokenizer: Tokenizer | None = None
    """What the head's characters are; None where a folder has no vocab.json."""
    normalize: bool = True
    """Whether a wave is to have mean 0 and deviation 1."""
    data: Utterances | None = None
    """Of a run: what it was trained on."""
    length: int = 0
    """Of a run: samples of its rows, to which waves are padded here too."""

    def prepared(self, waves: Any) -> dict[str, np.ndarray]:
        """What `encode` takes of one wave [T] or several, as they are: padded, with a mask."""
        rows = [np.asarray(wave, np.float32) for wave in waves]
        if rows and not any(row.ndim for row in rows):
            rows = [np.asarray(waves, np.float32)]  # one wave
        if not rows or any(row.ndim != 1 or not row.size for row in rows):
            shapes = [row.shape for row in rows]
            raise InputError(f"waves have shapes {shapes}; give one wave [T] or a list of such")
        counts = np.array([len(row) for row in rows])
        length = max(self.length, counts.max())
        rows = [standardized(row) if self.normalize else row for row in rows]
        padded = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
        return {"inputs": padded, "attention_mask": np.arange(length) < counts[:, None]}

    def transcribe(self, waves: Any) -> list[str]:
        """What is said in one wave [T], or in each of several: floats as they were recorded, one
        channel, at the model's rate.

        Of each frame the likeliest character, repetitions and blanks taken out. InputError for a
        model without a CTC head or vocabulary, and for waves too short for one frame.
        """
        if not isinstance(self.config.head, CTC):
            raise InputError(f"this model's head is {self.config.head}; a CTC head transcribes")
        if self.tokenizer is None:
            raise InputError("this model brings no vocab.json, so nothing says its characters")
        found = self.prepared(waves)
        given = INPUTS[type(self.config)](self.config, found.pop("inputs"), **found)
        ids = np.asarray(_transcribed(self.encoder, self.params, given))
        return [self.tokenizer.decode(row) for row in ids]


@functools.partial(jax.jit, static_argnums=0)
def _transcribed(encoder: Encoder, params: Any, given: dict[str, Any]) -> Array:
    return transcribed(encoder, params, **given)[0]


@dataclasses.dataclass(frozen=True)
class TwoTowerModel:
    """Two towers with their weights."""

    towers: Towers
    params: Any
    config: TwoTower
    original: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The config.json that it comes from; of a run, nothing."""
    tokenizer: Tokenizer | None = None
    """Of a run: what its captions were read with."""
    data: Pairs | None = None
    """Of a run: what it was trained on, and how its images became the tower's input."""
    length: int = 0
    """Of a run: tokens that its captions were cut to."""

    def embed_image(self, pixels: Any) -> Float[Array, "B E"]:
        """Normalized vectors, float32, of pixels [B, C, H, W] as HF's processors make them."""
        return _embed(self.towers, "embed_image", self.params, images_of(self.config.image, pixels))

    def embed_pictures(self, pictures: Sequence[np.ndarray]) -> Float[Array, "B E"]:
        """The same of pictures as they are: uint8 [H, W, 3], of any sizes (data/vision reads them).

        Of a run, whose way with images is known; raises InputError for a folder.
        """
        if self.data is None:
            raise InputError("this model does not say how pictures are prepared: give embed_image")
        return self.embed_image(prepared(pictures, self.data.image))

    def embed_texts(self, texts: Sequence[str]) -> Float[Array, "B E"]:
        """The same of texts, cut as the captions were.

        Of a run, whose tokenizer is known; raises InputError for a folder.
        """
        if self.tokenizer is None:
            raise InputError("this model brings no tokenizer: give tokens to embed_text")
        rows = np.stack([text_row(self.tokenizer, x, self.length) for x in texts])
        return self.embed_text(np.maximum(rows, 0), rows >= 0)

    def embed_text(self, tokens: Any, attention_mask: Any = None) -> Float[Array, "B E"]:
        """Normalized vectors, float32, of rows of token ids [B, T]."""
        given = texts_of(self.config.text, tokens, attention_mask)
        return _embed(self.towers, "embed_text", self.params, given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(towers: Towers, method: str, params: Any, inputs: dict[str, Any]) -> Array:
    return getattr(towers, method)(params, **inputs)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(encoder: Encoder, params: Any, inputs: dict[str, Any], keep: bool) -> Encoded:
    return encoder.apply(params, keep=keep, **inputs)


def load_encoder(path: str | pathlib.Path) -> EncoderModel | TwoTowerModel:
    """The encoder, or the two towers, of a Hugging Face folder.

    On a CPU it computes in float32. Raises InputError when it is no encoder that is known here, or
    its tensors are not what its config says.
    """
    leave_absent_tpus()
    folder = huggingface.open_any(path)
    if encoders.family_of(folder.original) is None:
        raise InputError(f"{path}: model_type {folder.original.get('model_type')!r} is no encoder")
    precision = language.precision_of_folder(next(iter(folder.tensors.values())).dtype)
    if isinstance(folder.config, TwoTower):
        towers = build_towers(folder.config, precision)
        params = huggingface.load_encoder(folder, towers, towers.shapes)
        return TwoTowerModel(towers, params, folder.config, folder.original)
    encoder = build_encoder(folder.config, precision)
    params = huggingface.load_encoder(folder, encoder, encoder.shapes)
    given = encoder, params, folder.config, folder.original
    if isinstance(folder.config, Wav2Vec2):
        return SpeechModel(*given, *_hearing(folder.directory, folder.config))
    return EncoderModel(*given)


def _hearing(folder: pathlib.Path, config: Wav2Vec2) -> tuple[Tokenizer | None, bool]:
    """The characters of a wav2vec 2.0's folder, if it has them, and whether waves are normalized.

    InputError for a vocabulary that is read in another way than wav2vec 2.0's own.
    """
    normalize = huggingface.read_optional(folder, "preprocessor_config.json").get("do_normalize")
    file = folder / Characters.file
    if not (isinstance(config.head, CTC) and file.exists()):
        return None, normalize is not False
    names = huggingface.token_names(folder)
    rules = huggingface.read_optional(folder, "tokenizer_config.json")
    delimiter, lower = names.get("word_delimiter_token", "|"), rules.get("do_lower_case")
    if delimiter != "|" or lower:
        raise InputError(
            f"{folder}: its tokenizer separates words by {delimiter!r} and has do_lower_case "
            f"{lower}; known here are '|' and false"
        )
    characters = Characters(file.read_bytes(), str(file))
    characters.bos_id = characters.eos_id = config.head.blank_id
    return characters, normalize is not False


def load_towers(path: str | pathlib.Path) -> TwoTowerModel:
    """The two towers of a run or of a checkpoint of ours, for images as its last stage saw them.

    On a CPU they compute in float32. Raises InputError when there is none, or it is not what its
    config says.
    """
    leave_absent_tpus()
    directory = manager.resolve(path)
    recorded = manager.read_config(directory)
    last = manager.last_stage(recorded)
    data = from_dict(Pairs, last["data"], "data")
    config = from_dict(TwoTower, recorded["model"], "model").at_size(data.image.size)
    towers = build_towers(config, language.precision_of_run(recorded))
    params = manager.load_params(directory, towers.shapes, towers.layers)
    more = load_tokenizer(directory), data, last["sequence_length"]
    return TwoTowerModel(towers, params, config, {}, *more)


def load_speech(path: str | pathlib.Path) -> SpeechModel:
    """The wav2vec 2.0 of a run or of a checkpoint of ours, as `load_towers` has two towers."""
    leave_absent_tpus()
    directory = manager.resolve(path)
    recorded = manager.read_config(directory)
    config = from_dict(Wav2Vec2, recorded["model"], "model")
    encoder = build_encoder(config, language.precision_of_run(recorded))
    params = manager.load_params(directory, encoder.shapes, encoder.layers)
    last = manager.last_stage(recorded)
    data = from_dict(Utterances, last["data"], "data")
    more = load_tokenizer(directory), data.normalize, data, last["sequence_length"]
    return SpeechModel(encoder, params, config, {}, *more)


LOADS: dict[str, Callable[[Any], Any]] = {
    TwoTower.__name__: load_towers,
    Fused.__name__: classifier.load_classifier,
    Wav2Vec2.__name__: load_speech,
    VisionLanguage.__name__: vision_language.load_seeing,
}


def load(path: str | pathlib.Path) -> EncoderModel | TwoTowerModel | language.LanguageModel:
    """What a path holds, to use: an encoder, two towers, else a language model that may see.

    See `load_encoder`, `load_towers`, `load_speech`, `classifier.load_classifier`,
    `vision_language.load_seeing` and `serving.language.load`.
    """
    if is_folder_of_tensors(path):
        folder = huggingface.fetched(path)
        if huggingface.is_seeing(folder):
            return vision_language.load_seeing(folder)
        known = encoders.family_of(huggingface.read_optional(folder, "config.json"))
        return load_encoder(folder) if known else language.load(folder)
    kind = manager.read_config(manager.resolve(path))["model"].get("type")
    return LOADS.get(kind, language.load)(path)
