"""`TextStream`: decodes an answer's tokens to text one at a time, in the context of its prompt.

The text is what decoding prompt and answer together adds to the decoded prompt. Where the answer completes a character
that the prompt left unfinished, that character is the answer's: the prompt's last U+FFFD is replaced (`num_replaced`).
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from typing import Protocol

from xllm.request import SamplingParams
from xllm.text.token_text import context_tokens, hidden_tokens
from xllm.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# Four bytes make a character, at most a token each; what is still broken after twice that stays broken.
_MAX_HELD_TOKENS = 8
_UTF8 = codecs.getincrementaldecoder("utf-8")


class TextStream(Protocol):
    """Tokens in, complete characters out.

    num_replaced: characters at the end of the prompt's decoded text in whose place the answer's first ones stand.
    """

    num_replaced: int

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""

    def settle(self) -> str:
        """Return held text that is complete by itself: the next token is not part of it."""

    def flush(self) -> str:
        """Return what was held back: the stream is over."""

    def begins(self, token_id: int | None) -> int:
        """How many characters of text that is held back lie before a token that is not pushed yet; None: before the
        end."""


def text_stream(tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams) -> TextStream:
    """The fast stream if the tokenizer allows it (`ByteStream`), else `WindowStream`."""
    if tokenizer.is_byte_level:
        return ByteStream(tokenizer, prompt, sampling)
    return WindowStream(tokenizer, prompt, sampling)


class ByteStream:
    """For byte-level tokenizers, whose text is the tokens' bytes read as UTF-8. O(1) per token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams):
        self._token_bytes = tokenizer.token_bytes
        self._skipped = hidden_tokens(tokenizer, sampling)
        self._utf8 = _UTF8("replace")
        self.num_replaced = 0
        unfinished = _unfinished(self._tail(prompt))
        self._has_seam = bool(unfinished)  # the prompt's last character is not decided yet
        self._utf8.decode(unfinished)

    def _tail(self, prompt: Sequence[int]) -> bytes:
        """The prompt's last bytes, as many as a character may have."""
        data = b""
        for token_id in reversed(prompt):
            if token_id not in self._skipped:
                data = self._token_bytes(token_id) + data
                if len(data) >= 4:
                    break
        return data

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        text = self._utf8.decode(self._token_bytes(token_id))
        return self._past_seam(text) if self._has_seam and text else text

    def settle(self) -> str:
        return ""  # only an unfinished character is ever held back

    def flush(self) -> str:
        text = self._utf8.decode(b"", True)
        return self._past_seam(text) if self._has_seam and text else text

    def _past_seam(self, text: str) -> str:
        self._has_seam = False
        if text.startswith(_REPLACEMENT):  # which is how the prompt shows it
            return text[1:]
        self.num_replaced = 1
        return text

    def begins(self, token_id: int | None) -> int:
        held = self._utf8.getstate()[0]
        if not held or self._has_seam or token_id in self._skipped:
            return 0
        return int(token_id is None or not _may_be_text(held + self._token_bytes(token_id)[:1]))


class WindowStream:
    """For any tokenizer: decode a few tokens before the new ones with and without them; the difference is new.

    The earlier tokens, at first those of the prompt, give the decoder its context (whether a leading space belongs,
    which accents join).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams):
        self._tokenizer = tokenizer
        self._skipped = hidden_tokens(tokenizer, sampling)
        self._context = context_tokens(tokenizer, prompt, sampling)  # tokens whose text is out
        self._context_text = tokenizer.decode(self._context) if self._context else ""
        self._has_seam = bool(self._context)  # nothing is out of the answer yet
        self._held: list[int] = []  # tokens whose text is not out yet
        self.num_replaced = 0

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

    def settle(self) -> str:
        if not self._held:
            return ""
        text = self._tokenizer.decode(self._context + self._held)
        return "" if text.endswith(_REPLACEMENT) else self._emit(text)

    def flush(self) -> str:
        return self._emit(self._tokenizer.decode(self._context + self._held)) if self._held else ""

    def _emit(self, text: str) -> str:
        known = len(self._context_text)
        if self._has_seam:
            self._has_seam = False
            pairs = zip(self._context_text, text)
            known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            self.num_replaced = len(self._context_text) - known
        self._context, self._held = self._held, []
        self._context_text = self._tokenizer.decode(self._context)
        return text[known:]

    def begins(self, token_id: int | None) -> int:
        if not self._held:
            return 0
        tokenizer = self._tokenizer
        if not tokenizer.has_byte_fallback:
            text = tokenizer.decode(self._context + self._held)
            return max(0, len(text.rstrip(_REPLACEMENT)) - len(self._context_text))
        run = self._unfinished_prompt() + b"".join(map(tokenizer.token_bytes, self._held))
        if token_id is not None and tokenizer.is_byte_token(token_id):
            run += tokenizer.token_bytes(token_id)
            return sum(byte & 0xC0 != 0x80 for byte in run) - 1 if _may_be_text(run) else len(self._held)
        goes_on = token_id is not None and (token_id in self._skipped or not tokenizer.knows(token_id))
        if _may_be_text(run) and (goes_on or not _unfinished(run)):
            return len(run.decode(errors="ignore"))
        return len(self._held)

    def _unfinished_prompt(self) -> bytes:
        """Bytes of a character that the prompt ends within, while nothing is out of the answer."""
        if not self._has_seam:
            return b""
        tokenizer = self._tokenizer
        return _unfinished(b"".join(tokenizer.token_bytes(i) for i in self._context if tokenizer.is_byte_token(i)))


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end of `data` that begin a character."""
    decoder = _UTF8("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


def _may_be_text(data: bytes) -> bool:
    """Whether it is UTF-8, but for a character at its end of which bytes are missing."""
    try:
        _UTF8("strict").decode(data)
    except UnicodeDecodeError:
        return False
    return True
