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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepseek_jax.checkpoint import manager
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.models.build import Model, build
from deepseek_jax.models.decoder import Decoder, layer_table
from deepseek_jax.ops.sampling import Sampling, draw, row_keys
from deepseek_jax.serving.completion import Completion

MAX_LENGTH = 2**20  # tokens of prompt and completion: past every model's training, a likely typo
CHUNK = 512  # prompt tokens that enter the cache in one call


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its weights and its tokenizer."""

    model: Model
    params: Any
    tokenizer: Tokenizer
    config: Decoder

    def logits(self, tokens: Any) -> Float[Array, "B T V"]:
        """Next-token logits, float32, of whole rows of tokens [T] or [B, T] (lists or arrays)."""
        return _logits(self.model, self.params, self._checked(tokens))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        stream: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Complete each prompt; the completions, without their prompts, in order.

        A completion ends at the tokenizer's end token, before the first of the `stop` texts, or
        after `max_new_tokens`. Temperature 0 takes the likeliest token. Every row draws from its
        own key of (seed, row, position), whatever else is in the batch.

        Args:
          prompts: one text or several.
          max_new_tokens: the most tokens to add to each prompt.
          temperature: what divides the logits.
          top_k: draw from this many likeliest tokens only.
          top_p: draw from the fewest likeliest tokens that hold this much probability.
          repetition_penalty: above 1, tokens of the prompt and the completion become less likely.
          seed: of the draws.
          stop: texts that end a completion; they are not part of it.
          stream: called with (row, new text) as text comes: whole characters, and nothing that
            may turn out to be part of a stop text.

        Raises InputError for what cannot be done.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        stop = [stop] if isinstance(stop, str) else list(stop)
        check_request(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        )
        sampling = _sampling(temperature, top_k, top_p, repetition_penalty)
        rows = [[self.tokenizer.bos_id, *ids] for ids in self.tokenizer.encode_batch(prompts)]
        longest = max(map(len, rows))
        if longest + max_new_tokens > MAX_LENGTH:
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} make more than "
                f"{MAX_LENGTH}: shorten one of them"
            )
        texts = [Completion(self.tokenizer, row[-1], stop) for row in rows]
        state = self._prefill(rows, longest + max_new_tokens, sampling)
        tokens = np.array([row[-1] for row in rows], np.int32)
        positions = np.array([len(row) - 1 for row in rows], np.int32)
        size = min(self.tokenizer.vocab_size, self.config.vocab_size)
        key = jax.random.key(seed)
        for _ in range(max_new_tokens):
            ended = np.array([text.ended for text in texts])
            if ended.all():
                break
            state, drawn = _step(
                self.model, size, self.params, state, tokens, np.where(ended, -1, positions),
                key, sampling,
            )  # fmt: skip
            tokens, positions = np.asarray(drawn), positions + 1
            for i, text in enumerate(texts):
                new = "" if text.ended else text.add(int(tokens[i]))
                if stream and new:
                    stream(i, new)
        for i, text in enumerate(texts):
            new = text.finish()
            if stream and new:
                stream(i, new)
        return [text.text for text in texts]

    def _prefill(self, rows: list[list[int]], length: int, sampling: Sampling) -> "_State":
        """The cache holding all but each row's last token, which the first step feeds."""
        width = max(len(row) for row in rows) - 1
        chunk = min(CHUNK, _rounded(width, 16))
        width = -(-width // chunk) * chunk
        tokens = np.zeros((len(rows), width), np.int32)
        positions = np.full((len(rows), width), -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row) - 1] = row[:-1]
            positions[i, : len(row) - 1] = np.arange(len(row) - 1)
        state = _State(self.model.init_cache(len(rows), _rounded(length, 128)), None)
        if sampling.repetition_penalty is not None:
            state = state._replace(seen=jnp.zeros((len(rows), self.config.vocab_size), bool))
        for start in range(0, width, chunk):
            part = slice(start, start + chunk)
            state = _prefill(self.model, self.params, state, tokens[:, part], positions[:, part])
        return state

    def _checked(self, tokens: Any) -> np.ndarray:
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise InputError("tokens must be rows of one length") from None
        if tokens.ndim not in (1, 2) or not tokens.size:
            raise InputError(f"tokens must be [T] or [B, T] and not empty, not {tokens.shape}")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens must be integers, not {tokens.dtype}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise InputError(
                f"tokens lie in {tokens.min()}..{tokens.max()}, outside this model's vocabulary "
                f"0..{self.config.vocab_size - 1}"
            )
        return np.atleast_2d(tokens).astype(np.int32)


def load(path: str | pathlib.Path) -> LanguageModel:
    """The language model of a run directory or a checkpoint (of a run: its newest good one).

    On a CPU, automatic precision is float32 here: converting every weight at every step would cost
    more than bfloat16 saves, and completions are then the same with and without a cache.
    Raises InputError when there is no such checkpoint, or it is not what its config says.
    """
    directory = manager.resolve(path)
    config = manager.read_config(directory)
    decoder = from_dict(Decoder, config["model"], "model")
    precision = from_dict(Precision, config["precision"], "precision")
    if precision.compute == "auto" and jax.default_backend() == "cpu":
        precision = dataclasses.replace(precision, compute="float32")
    model = build(decoder, precision)
    params = manager.load_params(directory, model.shapes, layer_table(decoder))
    return LanguageModel(model, params, load_tokenizer(directory), decoder)


class _State(NamedTuple):
    """What a batch of completions carries from step to step."""

    cache: tuple
    seen: Array | None  # [B, V]: the tokens of each row so far; only with a repetition penalty


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Any, tokens: Any) -> Array:
    return model.logits(params, model.apply(params, tokens, drop=False).hidden)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(model: Model, params: Any, state: _State, tokens: Any, positions: Any) -> _State:
    _, cache = model.decode(params, tokens, state.cache, positions)  # no logits are computed
    return _State(cache, _marked(state.seen, tokens, positions))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(
    model: Model,
    size: int,
    params: Any,
    state: _State,
    tokens: Any,
    positions: Any,
    key: Array,
    sampling: Sampling,
) -> tuple[_State, Array]:
    """Feed each row its newest token; draw its next among the first `size` of the vocabulary."""
    tokens, positions = tokens[:, None], positions[:, None]
    logits, cache = model.decode(params, tokens, state.cache, positions)
    seen = _marked(state.seen, tokens, positions)
    keys = row_keys(key, positions[:, 0] + 1)
    visible = None if seen is None else seen[:, :size]
    return _State(cache, seen), draw(logits[:, 0, :size], keys, sampling, visible)


def _marked(seen: Array | None, tokens: Array, positions: Array) -> Array | None:
    if seen is None:
        return None
    return seen.at[jnp.arange(len(seen))[:, None], tokens].max(positions >= 0)


def _rounded(number: int, least: int) -> int:
    """The next power of two, so that few shapes are ever compiled."""
    return max(least, 1 << (number - 1).bit_length())


def check_request(
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    seed: int,
    stop: Sequence[str],
) -> None:
    """Raise InputError unless these are arguments that `LanguageModel.generate` can take."""
    if not prompts:
        raise InputError("there is no prompt; give at least one")
    if not all(prompts):
        raise InputError("a prompt is empty; give it some text to go on from")
    for text in (*prompts, *stop):
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of a command line that were no UTF-8
            raise InputError(f"{text!r} is not valid UTF-8") from None
    if not all(stop):
        raise InputError("a stop text is empty: every completion would end at once")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; it must be 0 (the likeliest) or above")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise InputError(f"repetition_penalty is {repetition_penalty}; it must be above 0")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; it must be at least 0 and below 2**32")


def _sampling(
    temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float
) -> Sampling:
    penalty = None if repetition_penalty == 1 else repetition_penalty
    if temperature < 1e-6:  # dividing by less would overflow, and draw the likeliest anyway
        return Sampling(repetition_penalty=penalty)
    return Sampling(temperature, top_k and min(top_k, 2**30), top_p, penalty)
