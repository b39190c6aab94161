"""`TextContext`: gives a token's text at its place in a sequence.

A token has no text of its own. Decoders of sentencepiece models drop the blank of a text's first token, WordPiece puts
one before each word but the first, and a byte of a character shows only when the others are there. So an answer is read
behind the last tokens of its prompt: its text is what decoding the prompt with the answer adds to the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.request import SamplingParams
from xllm.text.tokenizer import Tokenizer

# Of a run of byte tokens; any other token is context enough by itself. Chosen: a word of such bytes is shorter.
MAX_CONTEXT_TOKENS = 64
_NONE: frozenset[int] = frozenset()


def hidden_tokens(tokenizer: Tokenizer, sampling: SamplingParams) -> frozenset[int]:
    """Ids of the tokens that `sampling` does not show."""
    return tokenizer.special_token_ids if sampling.skip_special_tokens else _NONE


def context_tokens(tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """The last tokens of a prompt, as many as decide how an answer reads; none: the answer is the beginning of a text.

    Hidden tokens are none to a decoder. A prescribed form is the exception: its grammar counts a first blank, so even a
    hidden token before it keeps that blank in the text.
    """
    hidden, found = hidden_tokens(tokenizer, sampling), list[int]()
    for token_id in reversed(prompt):
        if token_id in hidden or not tokenizer.knows(token_id):
            continue
        if len(found) >= MAX_CONTEXT_TOKENS and not _continues(tokenizer.token_bytes(found[-1])):
            break
        found.append(token_id)
        if not tokenizer.is_byte_token(token_id):
            break
    if not found and sampling.structured is not None:
        return list(prompt[-1:])
    return found[::-1]


def _continues(byte: bytes) -> bool:
    return 0x80 <= byte[0] < 0xC0


class TextContext:
    """The place behind some tokens, moved on token by token.

    sampling: says whether special tokens are hidden, and so no context for others.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], sampling: SamplingParams):
        self._tokenizer = tokenizer
        self._hidden = hidden_tokens(tokenizer, sampling)
        context = context_tokens(tokenizer, before, sampling)
        self._before = context[-1] if context else None

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token stands for here; a special token's name even where it is hidden."""
        tokenizer, within = self._tokenizer, self._tokenizer.token_bytes(token_id)
        if tokenizer.is_byte_level or (self._before is not None and tokenizer.has_fixed_bytes):
            return within
        if tokenizer.is_byte_token(token_id) and not within.isascii():
            return within  # part of a character
        return tokenizer.text_after(self._before, token_id).encode()

    def text_of(self, token_id: int) -> str:
        """`bytes_of` as text; part of a character shows as U+FFFD."""
        return self.bytes_of(token_id).decode(errors="replace")

    def move_past(self, token_id: int) -> None:
        """The token stands here; go behind it."""
        if token_id not in self._hidden and self._tokenizer.knows(token_id):
            self._before = token_id
