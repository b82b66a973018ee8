"""A language model to use: load a run or checkpoint, score tokens, complete prompts.

Completion keeps an explicit cache: prompts of unequal length enter it right-padded, a chunk at a
time, then every step feeds each row its newest token and draws the next. Both are one call of
`Model.decode`, with shapes rounded up so that few programs are ever compiled. Continuous batching
and paged caches belong to the serving engine, not here.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepseek_jax.checkpoint import huggingface, manager
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.core.target import leave_absent_tpus
from deepseek_jax.data.tokenizer import INFO, Tokenizer, load_tokenizer
from deepseek_jax.models.build import Model, build
from deepseek_jax.models.decoder import Decoder, layer_table
from deepseek_jax.models.vision_language import VisionLanguage, VisionLanguageModel
from deepseek_jax.ops.sampling import Sampling, draw, row_keys
from deepseek_jax.serving import chat
from deepseek_jax.serving.completion import Completion

MAX_LENGTH = 2**20  # tokens of prompt and completion: past every model's training, a likely typo
CHUNK = 512  # prompt tokens that enter the cache in one call

State = tuple[tuple, Array]  # of a batch: the cache, and [B, V] bool: the tokens seen in each row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How long completions get and how their tokens are drawn; InputError for what cannot be."""

    max_new_tokens: int = 128
    """The most tokens to add to each prompt."""
    temperature: float = 0.0
    """What divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that hold this much probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that already stand in the text become less likely."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self):
        k, p = self.top_k, self.top_p
        for name, fits, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest) or above"),
            ("top_k", k is None or k >= 1, "at least 1"),
            ("top_p", p is None or 0 < p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
        ):
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {rule}")

    def sampling(self) -> Sampling:
        """The same for `ops.sampling.draw`; what has no effect is left out of the program."""
        penalty = None if self.repetition_penalty == 1 else self.repetition_penalty
        if self.temperature < 1e-6:  # dividing by less would overflow, and draw the likeliest
            return Sampling(repetition_penalty=penalty)
        top_k = self.top_k and min(self.top_k, 2**30)
        return Sampling(self.temperature, top_k, self.top_p, penalty)


def check_texts(prompts: Sequence[str], stop: Sequence[str]) -> None:
    """Raise InputError unless these are prompts and stop texts for `LanguageModel.generate`."""
    if not prompts:
        raise InputError("there is no prompt; give at least one")
    if not all(prompts):
        raise InputError("a prompt is empty; give it some text to go on from")
    _check_stop(stop)
    _check_utf8(prompts)


def _check_stop(stop: Sequence[str]) -> None:
    if not all(stop):
        raise InputError("a stop text is empty: every completion would end at once")
    _check_utf8(stop)


def _check_utf8(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of a command line that were no UTF-8
            raise InputError(f"{text!r} is not valid UTF-8") from None


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its weights and its tokenizer."""

    model: Model | VisionLanguageModel
    params: Any
    tokenizer: Tokenizer | None
    config: Decoder | VisionLanguage
    recorded: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The whole config of the run that it comes from, as JSON data."""
    ends: tuple[int, ...] = ()
    """Tokens that end a text, beside the tokenizer's own."""
    renderer: chat.Renderer | None = None
    """What writes messages as the text that the model was taught to answer."""

    def logits(self, tokens: Any, mask: Any = None) -> Float[Array, "B T V"]:
        """Next-token logits, float32, of whole rows of tokens [T] or [B, T] (lists or arrays).

        `mask` of the same shape is true where a token is real; padding (left or right) is seen by
        none, and its own logits mean nothing.
        """
        tokens = self._checked(tokens)
        if mask is None:
            return _logits(self.model, self.params, tokens)
        mask = np.atleast_2d(np.asarray(mask, bool))
        if mask.shape != tokens.shape:
            raise InputError(f"mask has shape {mask.shape}, and tokens {tokens.shape}")
        return _logits(self.model, self.params, tokens, mask.astype(np.int32))

    def _checked(self, tokens: Any) -> np.ndarray:
        """Rows of tokens [B, T], or an InputError."""
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise InputError("tokens must be rows of one length") from None
        if tokens.ndim not in (1, 2) or not tokens.size:
            raise InputError(f"tokens must be [T] or [B, T] and not empty, not {tokens.shape}")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens must be integers, not {tokens.dtype}")
        least, most, last = tokens.min(), tokens.max(), self.config.vocab_size - 1
        if least < 0 or most > last:
            found = f"tokens lie in {least}..{most}"
            raise InputError(f"{found}, outside this model's vocabulary 0..{last}")
        return np.atleast_2d(tokens).astype(np.int32)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        stop: str | Sequence[str] = (),
        stream: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Complete each prompt; the completions, without their prompts, in order.

        A completion ends at the tokenizer's end token, before the first of the `stop` texts, or
        after `max_new_tokens`; `settings` are the fields of `Settings`. Whether a prompt begins
        with BOS is the tokenizer's own rule (`Tokenizer.adds_bos`). Every row draws from its
        own key of (seed, row, position), whatever else is in the batch. `stream` is called with
        (row, new text) as text comes: whole characters, and nothing that may turn out to be part of
        a stop text. Raises InputError for what cannot be done.
        """
        prompts, stop = ([x] if isinstance(x, str) else list(x) for x in (prompts, stop))
        check_texts(prompts, stop)
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: give tokens to generate_tokens")
        bos = [self.tokenizer.bos_id]
        first = bos if self.tokenizer.adds_bos else []
        rows = [[*first, *ids] or bos for ids in self.tokenizer.encode_batch(prompts)]
        return self._completed(self.tokenizer, rows, stop, stream, settings)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
        stop: str | Sequence[str] = (),
        stream: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> str:
        """The model's answer to messages [{"role": "user", "content": "Hello"}, ...].

        The messages are written as the checkpoint's chat template does; see `chat_tokens`. The
        answer ends as a completion of `generate` does, and keeps marks as </think> and those of
        tool calls. `stream` is called with new text as it comes.
        """
        stop = [stop] if isinstance(stop, str) else list(stop)
        _check_stop(stop)
        row = self.chat_tokens(messages, tools=tools, thinking=thinking, variables=variables)
        show = (lambda _, new: stream(new)) if stream else None
        assert self.tokenizer is not None  # chat_tokens has looked
        return self._completed(self.tokenizer, [row], stop, show, settings)[0]

    def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens that `chat` answers.

        A message has a role (system, developer, user, assistant, tool) and content; an assistant's
        may have `tool_calls`, and whatever else the checkpoint's template reads. `tools` are JSON
        schemas. `thinking` switches reasoning on or off in models that leave the choice (for
        templates: `thinking` and `enable_thinking`); None leaves it to the template. `variables`
        are more of the template's, such as add_generation_prompt=False. Raises InputError for
        messages that are not well formed, and when the checkpoint does not say how it chats.
        """
        if self.tokenizer is None or self.renderer is None:
            missing = "tokenizer" if self.tokenizer is None else "chat template"
            raise InputError(f"this checkpoint has no {missing}: it cannot chat, use generate")
        known = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        text = self.renderer(*chat.checked(messages, tools), known | dict(variables or {}))
        _check_utf8([text])
        if not (row := self.tokenizer.encode_marked(text)):
            raise InputError("the chat template gives no text for these messages; correct it")
        return row

    def _completed(
        self,
        tokenizer: Tokenizer,
        rows: list[list[int]],
        stop: Sequence[str],
        stream: Callable[[int, str], None] | None,
        settings: dict[str, Any],
    ) -> list[str]:
        texts = [Completion(tokenizer, row[-1], stop) for row in rows]

        def show(row: int, new: str) -> None:
            if stream and new:
                stream(row, new)

        for row, token in self._drawn(rows, Settings(**settings), lambda row: texts[row].ended):
            text = texts[row]
            show(row, text.finish() if token in self.ends else text.add(token))
        for row, text in enumerate(texts):
            show(row, text.finish())
        return [text.text for text in texts]

    def generate_tokens(self, rows: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
        """Go on from rows of tokens, as they are; each row's new tokens, its end token included.

        `settings` are the fields of `Settings`. Raises InputError for what cannot be done.
        """
        if not rows:
            raise InputError("there is no row of tokens to go on from; give at least one")
        ends = {*self.ends, *([self.tokenizer.eos_id] if self.tokenizer else [])}
        found: list[list[int]] = [[] for _ in rows]
        drawn = self._drawn(
            [self._checked(row)[0].tolist() for row in rows],
            Settings(**settings),
            lambda row: bool(found[row]) and found[row][-1] in ends,
        )
        for row, token in drawn:
            found[row].append(token)
        return found

    def _drawn(
        self, rows: list[list[int]], chosen: Settings, ended: Callable[[int], bool]
    ) -> Iterator[tuple[int, int]]:
        """(row, its next token) of the rows that have not ended, one step after another."""
        longest = max(map(len, rows), default=0)
        if longest + chosen.max_new_tokens > MAX_LENGTH:
            both = f"a prompt of {longest} tokens and max_new_tokens {chosen.max_new_tokens}"
            raise InputError(f"{both} make more than {MAX_LENGTH}: shorten one of them")
        state = self._prefilled(rows, longest + chosen.max_new_tokens)
        tokens = np.array([row[-1] for row in rows], np.int32)
        positions = np.array([len(row) - 1 for row in rows], np.int32)
        size = self.config.vocab_size
        size = min(self.tokenizer.vocab_size, size) if self.tokenizer else size
        key, sampling = jax.random.key(chosen.seed), chosen.sampling()
        for _ in range(chosen.max_new_tokens):
            over = np.array([ended(row) for row in range(len(rows))])
            if over.all():
                return
            state, drawn = _step(
                self.model, size, self.params, state, tokens, np.where(over, -1, positions),
                key, sampling,
            )  # fmt: skip
            tokens, positions = np.asarray(drawn), positions + 1
            yield from ((int(row), int(tokens[row])) for row in np.flatnonzero(~over))

    def _prefilled(self, rows: list[list[int]], length: int) -> State:
        """What has read all but each row's last token, or all; the first step feeds the last."""
        most, last = self._reading
        rows = [row[: len(row) - last] for row in rows]
        chunk = min(most, _rounded(width := max(map(len, rows)), 16))
        width = -(-width // chunk) * chunk
        tokens = np.zeros((len(rows), width), np.int32)
        positions = np.full((len(rows), width), -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], positions[i, : len(row)] = row, np.arange(len(row))
        cache = self.model.init_cache(len(rows), _rounded(length, 128))
        state = cache, jnp.zeros((len(rows), self.config.vocab_size), bool)
        for start in range(0, width, chunk):
            part = slice(start, start + chunk)
            now = tokens[:, part], positions[:, part], self._beside(part)
            state = _prefill(self.model, self.params, state, *now)
        return state

    @property
    def _reading(self) -> tuple[int, int]:
        """The most prompt tokens that one call reads, and how many are left to the first step."""
        return CHUNK, 1

    def _beside(self, part: slice) -> dict[str, Any]:
        """What the model's `decode` is given beside the tokens of these places of the prompts."""
        del part
        return {}


def load(path: str | pathlib.Path) -> LanguageModel:
    """The language model of a run, a checkpoint (of a run: its newest good one), or an HF folder.

    On a CPU, automatic precision is float32 here: converting every weight at every step would cost
    more than bfloat16 saves, and completions are then the same with and without a cache.
    Raises InputError when there is no such checkpoint, or it is not what its config says.
    """
    leave_absent_tpus()
    if is_folder_of_tensors(path):
        return _load_folder(huggingface.fetched(path))
    directory = manager.resolve(path)
    config = manager.read_config(directory)
    if (kind := config["model"].get("type")) != Decoder.__name__:
        raise InputError(f"{path}: holds a {kind}, and this is for language models")
    decoder = dataclasses.replace(from_dict(Decoder, config["model"], "model"), scan=False)
    model = build(decoder, precision_of_run(config))
    params = manager.load_params(directory, model.shapes, layer_table(decoder))
    kept = directory / huggingface.BESIDE  # of a checkpoint that was converted
    tokenizer = huggingface.tokenizer_of(kept)
    if tokenizer is None and (directory / INFO).exists():
        tokenizer = load_tokenizer(directory)
    ends, renderer = huggingface.end_ids(kept, tokenizer), chat.renderer(kept)
    return LanguageModel(model, params, tokenizer, decoder, config, ends, renderer)


def precision_of_run(recorded: Mapping[str, Any]) -> Precision:
    """How the weights of a run are used here; automatic precision is float32 on a CPU."""
    precision = from_dict(Precision, recorded["precision"], "precision")
    if precision.compute == "auto" and jax.default_backend() == "cpu":
        return dataclasses.replace(precision, compute="float32")
    return precision


def precision_of_folder(stored: np.dtype) -> Precision:
    """The same of a Hugging Face folder whose weights are stored so."""
    if jax.default_backend() == "cpu":
        return Precision(compute="float32")
    return Precision(params="bfloat16" if stored == jnp.bfloat16 else "float32")


def _load_folder(path: pathlib.Path) -> LanguageModel:
    folder = huggingface.open_folder(path)
    folder = folder._replace(config=dataclasses.replace(folder.config, scan=False))
    precision = precision_of_folder(folder.tensors["model.embed_tokens.weight"].dtype)
    model = build(folder.config, precision)
    params = huggingface.load_params(folder, model, model.shapes)
    recorded = huggingface.recorded(folder, precision)
    tokenizer = huggingface.tokenizer_of(path)
    ends, renderer = huggingface.end_ids(path, tokenizer), chat.renderer(path)
    return LanguageModel(model, params, tokenizer, folder.config, recorded, ends, renderer)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Any, tokens: Any, mask: Any = None) -> Array:
    positions = None if mask is None else jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    output = model.apply(params, tokens, segments=mask, positions=positions, drop=False)
    return model.logits(params, output.hidden)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(model, params, state: State, tokens, positions, beside: dict[str, Any]) -> State:
    _, cache = model.decode(params, tokens, state[0], positions, **beside)  # logits go nowhere
    return cache, _marked(state[1], tokens, positions)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(model, size, params, state, tokens, positions, key, sampling) -> tuple[State, Array]:
    """Feed each row its newest token; draw its next among the first `size` of the vocabulary."""
    tokens, positions = tokens[:, None], positions[:, None]
    logits, cache = model.decode(params, tokens, state[0], positions)
    seen = _marked(state[1], tokens, positions)
    keys = row_keys(key, positions[:, 0] + 1)
    return (cache, seen), draw(logits[:, 0, :size], keys, sampling, seen[:, :size])


def _marked(seen: Array, tokens: Array, positions: Array) -> Array:
    return seen.at[jnp.arange(len(seen))[:, None], tokens].max(positions >= 0)


def _rounded(number: int, least: int) -> int:
    """The next power of two, so that few shapes are ever compiled."""
    return max(least, 1 << (number - 1).bit_length())
