"""`Detokenizer`: turns one request's tokens into text as they come.

What has been emitted never changes: a character is held back until all its bytes are there, and text that could turn
into a stop string until it does or does not. All deltas together are the text that the answer adds to its prompt
(`text_stream.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.request import SamplingParams
from xllm.text.stop_filter import StopFilter
from xllm.text.text_stream import text_stream
from xllm.text.token_text import hidden_tokens
from xllm.text.tokenizer import Tokenizer


class Detokenizer:
    """Text, stop strings and which tokens count, for one request.

    After a stop string `stopped` names it, and `feed` takes no more tokens. offsets: of each token that counts, the
    characters of the text before it; None where no log-probabilities were asked for. A token that does not show has
    those before its place. An offset within `text` stays; one beyond it falls back to the end if a stop string cuts
    the text there.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._stream = text_stream(tokenizer, prompt, sampling)
        self._hidden = hidden_tokens(tokenizer, sampling)
        self._include_stop = sampling.include_stop_str_in_output
        self._stops = (StopFilter(sampling.stop, tokenizer.special_token_texts, include_stop=self._include_stop)
                       if sampling.stop else None)
        self._reads_hidden = self._stops is not None and self._stops.reads_hidden
        self._min_tokens = sampling.min_tokens
        self._emitted: list[str] = []
        self._num_read = 0  # characters that the stream has given, where offsets are wanted
        self.num_tokens = 0  # tokens that belong to the output
        self.offsets: list[int] | None = None if sampling.logprobs is None else []
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """All that has been emitted."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    @property
    def num_replaced(self) -> int:
        """Characters at the end of the prompt's text that the answer's text replaces: those that it completes."""
        return self._stream.num_replaced

    def feed(self, token_ids: Sequence[int], *, hide_last: bool = False) -> str:
        """Read new tokens, return the new text. Stops at the token that completes a stop string.

        hide_last: the last token ended the request (eos, a stop token) and counts, but its text does not show.
        """
        assert self.stopped is None, "fed after a stop string"
        num_shown = len(token_ids) - 1 if hide_last and not self._include_stop else len(token_ids)
        if self._stops is None and self.offsets is None:
            self.num_tokens += len(token_ids)
            return self._emit("".join(map(self._stream.push, token_ids[:num_shown])))
        deltas: list[str] = []
        for index, token_id in enumerate(token_ids):
            self.num_tokens += 1
            if self.offsets is not None:
                self.offsets.append(self._num_read + self._stream.begins(token_id if index < num_shown else None))
            deltas.append(self._read(token_id, shown=index < num_shown))
            if self.stopped is not None:
                break
        return self._emit("".join(deltas))

    def _read(self, token_id: int, *, shown: bool) -> str:
        """The text that may be shown after one more token."""
        if self._reads_hidden and token_id in (self._hidden if shown else self._tokenizer.special_token_ids):
            delta = self._pass(self._stream.settle())
            return delta if self.stopped else delta + self._pass(self._tokenizer.token_text(token_id), shown=False)
        return self._pass(self._stream.push(token_id)) if shown else ""

    def _pass(self, text: str, *, shown: bool = True) -> str:
        """The part of a text that the stop strings let through."""
        if self.offsets is not None and shown:
            self._num_read += len(text)
        if self._stops is None:
            return text
        passed = self._stops.feed(text, shown=shown, may_stop=self.num_tokens > self._min_tokens)
        self.stopped = self._stops.stopped
        return passed

    def finish(self) -> str:
        """Return what was held back: there are no more tokens. It may still complete a stop string."""
        if self.stopped is not None:
            return ""
        delta = self._pass(self._stream.flush())
        if self.stopped is None and self._stops is not None:
            delta += self._stops.rest()
        return self._emit(delta)

    def _emit(self, delta: str) -> str:
        if delta:
            self._emitted.append(delta)
        if self.stopped is not None and self.offsets is not None:  # the stop string's own tokens point at the end
            end = len(self.text)
            self.offsets = [min(offset, end) for offset in self.offsets]
        return delta
