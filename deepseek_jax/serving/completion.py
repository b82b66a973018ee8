"""A completion's text as its tokens come: whole characters only, cut before the first stop text."""

import codecs
from collections.abc import Sequence

from deepseek_jax.data.tokenizer import Tokenizer


class Completion:
    """One row's growing text. What `add` and `finish` return, joined, is `text`."""

    def __init__(self, tokenizer: Tokenizer, last: int, stop: Sequence[str] = ()):
        """Start after the prompt's token `last`."""
        self.text = ""
        self.ended = False
        self._tokenizer, self._last, self._stop = tokenizer, last, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may turn out to be the beginning of a stop text

    def add(self, token: int) -> str:
        """Take the next token; the text that it lets through."""
        if token == self._tokenizer.eos_id:
            return self.finish()
        # A token's bytes can depend on the one before it (SentencePiece's leading space).
        before = self._tokenizer.decode_bytes([self._last])
        both = self._tokenizer.decode_bytes([self._last, token])
        self._last = token
        return self._let_through(self._decoder.decode(both[len(before) :]))

    def finish(self) -> str:
        """No more tokens: the text that was held back (bytes of no character become U+FFFD)."""
        if self.ended:
            return ""
        return self._let_through(self._decoder.decode(b"", final=True), last=True)

    def _let_through(self, text: str, last: bool = False) -> str:
        held = self._held + text
        found = [held.find(stop) for stop in self._stop if stop in held]
        # The longest end that begins a stop text waits for what follows.
        starts = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        waiting = max((len(start) for start in starts if held.endswith(start)), default=0)
        self.ended = last or bool(found)
        shown = min(found, default=len(held) - (0 if last else waiting))
        self._held = held[shown:]
        self.text += held[:shown]
        return held[:shown]
