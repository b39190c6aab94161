"""Writes random texts of a grammar to see what its masks cost and whether it has dead ends."""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from xllm.structured.ecma import rust_pattern
from xllm.structured.grammar import GrammarError, build_matcher, check_matcher, schema_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_STEP_CPU_S = 0.1  # for one mask. Chosen: every running request waits for the slowest mask of a step
# Texts and their tokens. Chosen: enough to leave the grammar's beginning, at some ms for a usual grammar.
# Texts and their tokens. Chosen: enough to leave the grammar's beginning, few enough to cost little.
NUM_WALKS, WALK_TOKENS = 2, 24
# Texts, their bytes, and the time for all of them. Chosen: within it dead ends near a grammar's beginning are met.
NUM_BYTE_WALKS, WALK_BYTES, BYTE_WALKS_CPU_S = 32, 300, 0.03
_STRUCTURE, _BLANKS = b'"{}[],:', b" \t\r\n"
_SHOWN_BYTES = 80  # of a text that has come to a dead end, in the message


def probe_cost(matcher: LLMatcher, vocabulary: LLTokenizer) -> None:
    """Write a few random texts of the grammar to see what its masks cost.

    Raises GrammarError if one takes more than MAX_STEP_CPU_S, or ends where a limit is met.
    """
    chooser = random.Random(0)
    for _ in range(NUM_WALKS):
        _walk(matcher.deep_copy(), vocabulary, chooser)


def _walk(matcher: LLMatcher, vocabulary: LLTokenizer, chooser: random.Random) -> None:
    for _ in range(WALK_TOKENS):
        began_s = time.thread_time()
        allowed = _allowed(matcher)
        token_id = int(allowed[chooser.randrange(len(allowed))]) if len(allowed) else vocabulary.eos_token
        ended = token_id in vocabulary.eos_tokens or not matcher.consume_token(token_id)
        if (spent_s := time.thread_time() - began_s) > MAX_STEP_CPU_S:
            raise GrammarError(f"it is too complex: {spent_s:.1f} s for one token")
        check_matcher(matcher)
        if ended or matcher.is_stopped():
            return


def _allowed(matcher: LLMatcher) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))


class DeadEnds:
    """Looks for texts that a grammar allows to begin and not to end, byte by byte: no tokenizer has a part in that."""

    def __init__(self) -> None:
        from llguidance import LLTokenizer

        self._bytes = LLTokenizer("byte")

    def look(self, text: str, share: float = 1.0) -> None:
        """Write texts of the grammar `text`, for `share` of BYTE_WALKS_CPU_S. Raises GrammarError at a dead end."""
        start, chooser = build_matcher(self._bytes, text), random.Random(0)
        expires_s = time.thread_time() + share * BYTE_WALKS_CPU_S
        for _ in range(NUM_BYTE_WALKS):
            self._walk(start.deep_copy(), chooser, expires_s)
            if time.thread_time() > expires_s:
                return

    def _walk(self, matcher: LLMatcher, chooser: random.Random, expires_s: float) -> None:
        written = bytearray()
        while len(written) < WALK_BYTES and not matcher.is_stopped():
            allowed = [int(byte) for byte in _allowed(matcher) if byte < 256]
            if matcher.is_error():
                self._fail(matcher, bytes(written))
            if not allowed or time.thread_time() > expires_s:
                return
            byte = _choose(allowed, chooser)
            matcher.consume_token(byte)
            written.append(byte)

    def _fail(self, matcher: LLMatcher, written: bytes) -> None:
        if not matcher.get_error().startswith("NoExtension"):
            return  # a limit, which `probe_cost` and the masks themselves look after
        shown = written.rstrip(_BLANKS)[-_SHOWN_BYTES:].decode(errors="replace")
        raise GrammarError(f"it has a dead end: behind {shown!r}, which it allows, nothing can follow")

    def has_more_names(self, names: list[str], patterns: list[str]) -> bool:
        """Whether an object that has all the names, and may have those of the patterns besides, has room for one more.
        Where llguidance cannot say, it is taken to have."""
        nought: dict[str, Any] = {"const": 0}
        schema = {"type": "object", "properties": dict.fromkeys(names, nought), "required": names,
                  "patternProperties": {rust_pattern(pattern): nought for pattern in patterns},
                  "additionalProperties": False}
        try:
            matcher = build_matcher(self._bytes, schema_grammar(json.dumps(schema)))
        except ValueError:
            return True
        whole = json.dumps(dict.fromkeys(names, 0), separators=(",", ":"), ensure_ascii=False)
        if not matcher.consume_tokens(list(whole[:-1].encode())):
            return True
        return matcher.consume_token(ord(",")) and any(int(byte) not in _BLANKS for byte in _allowed(matcher))


def _choose(allowed: list[int], chooser: random.Random) -> int:
    """What closes and opens rather than what goes on, so that short texts see many places; blanks at the last."""
    structure = [byte for byte in allowed if byte in _STRUCTURE]
    others = [byte for byte in allowed if byte not in _BLANKS and byte not in _STRUCTURE]
    if structure and (not others or chooser.random() < 0.7):
        return chooser.choice(structure)
    return chooser.choice(others or allowed)
