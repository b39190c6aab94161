"""`Detokenizer`: one request's tokens to text, as they come.

What has been emitted never changes: a character is held back until all its bytes are there, and text
that could turn into a stop string until it does or does not. All deltas together are the decoded text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from xllm.request import SamplingParams
from xllm.stop_strings import StopMatcher
from xllm.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 8  # four bytes make a character; what is still broken after twice that stays broken


class TextStream(Protocol):
    """Tokens in, complete characters out."""

    def push(self, token_id: int) -> str:
        """The text that this token completes, maybe none."""

    def flush(self) -> str:
        """What was held back; the stream is over."""


class ByteStream:
    """For byte-level tokenizers, whose text is the tokens' bytes read as UTF-8. O(1) per token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class WindowStream:
    """For any tokenizer: decode a few tokens before the new ones with and without them; the difference is new.

    The earlier tokens give the decoder its context (whether a leading space belongs, which accents join).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._context: list[int] = []  # tokens whose text is out
        self._context_text = ""
        self._held: list[int] = []  # tokens whose text is not out yet

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or not self._tokenizer.knows(token_id):
            return ""  # the decoder leaves both out, so neither is context for what follows
        self._held.append(token_id)
        if self._tokenizer.has_byte_fallback:
            # A run of byte tokens is read as a whole by the decoder: good only when all of it is valid.
            if self._tokenizer.is_byte_token(token_id):
                return ""
            return self._emit(self._tokenizer.decode(self._context + self._held))
        text = self._tokenizer.decode(self._context + self._held)
        if text.endswith(_REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._tokenizer.decode(self._context + self._held)) if self._held else ""

    def _emit(self, text: str) -> str:
        delta = text[len(self._context_text):]
        self._context, self._held = self._held, []
        self._context_text = self._tokenizer.decode(self._context)
        return delta


class Detokenizer:
    """Text, stop strings and which tokens count, for one request.

    After a stop string `stopped` names it, and `feed` takes no more tokens.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams):
        stream = ByteStream if tokenizer.is_byte_level else WindowStream
        self._stream: TextStream = stream(tokenizer, sampling.skip_special_tokens)
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._emitted: list[str] = []
        self._held = ""  # decoded, not emitted: it may become a stop string
        self.num_tokens = 0  # tokens that belong to the output
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """All that has been emitted."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    def feed(self, token_ids: Sequence[int], *, hide_last: bool = False) -> str:
        """Read new tokens, return the new text. Stops at the token that completes a stop string.

        hide_last: the last token ended the request (eos, a stop token) and counts, but its text does not show.
        """
        assert self.stopped is None, "fed after a stop string"
        num_shown = len(token_ids) - 1 if hide_last and not self._include_stop else len(token_ids)
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return self._emit("".join(map(self._stream.push, token_ids[:num_shown])))
        deltas: list[str] = []
        for index, token_id in enumerate(token_ids):
            self.num_tokens += 1
            if index < num_shown:
                deltas.append(self._take(self._stream.push(token_id), self._matcher))
                if self.stopped is not None:
                    break
        return self._emit("".join(deltas))

    def finish(self) -> str:
        """No more tokens: return what was held back. A stop string can still be completed by it."""
        if self.stopped is not None:
            return ""
        delta = self._stream.flush()
        if self._matcher is not None:
            delta = self._take(delta, self._matcher)
        if self.stopped is None:
            delta, self._held = delta + self._held, ""
        return self._emit(delta)

    def _emit(self, delta: str) -> str:
        if delta:
            self._emitted.append(delta)
        return delta

    def _take(self, piece: str, matcher: StopMatcher) -> str:
        """Pass `piece` through the stop strings; return what may be shown now."""
        if not piece:
            return ""
        match = None
        if self.num_tokens > self._min_tokens:
            match = matcher.feed(piece)
        else:
            matcher.skip(piece)
        text = self._held + piece
        if match is not None:
            self.stopped = match.stop
            end = len(self._held) + match.end
            self._held = ""
            return text[:end] if self._include_stop else text[: end - len(match.stop)]
        cut = len(text) if self._include_stop else len(text) - matcher.num_held
        self._held = text[cut:]
        return text[:cut]
