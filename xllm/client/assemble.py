"""Turns an engine's deltas into text: one `Completion` per sequence, whose new parts are `Piece`s.

Only here tokens become text, stop strings are found, and log-probabilities are cut to the tokens that count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from xllm.request import FinishReason, OutputDelta, Request, TokenLogprobs
from xllm.text.detokenizer import Detokenizer
from xllm.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Piece:
    """What is new in one completion. finish_reason: 'stop', 'length', 'abort' or 'error', on the last piece only.

    offsets: of each token the characters of the completion's text before it, with `logprobs`; none without a text.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    is_first: bool = False
    offsets: Sequence[int] = ()


class Completion:
    """One sequence as it grows. `finish_reason` is set once and ends it; with "error", `error` says why.

    Times are on the `time.monotonic()` clock. tokenizer: None leaves the text empty.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None):
        self.index, self.request = index, request
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.num_cached_tokens = self.num_preemptions = 0
        self.cached_by_tier: dict[str, int] | None = None
        self.embedding: list[float] | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.end_s: float | None = None
        wants_text = tokenizer is not None and request.sampling.detokenize
        self._detokenizer = (Detokenizer(tokenizer, request.sampling, request.prompt_token_ids)
                             if tokenizer and wants_text else None)

    @property
    def text(self) -> str:
        """All of its text so far."""
        return self._detokenizer.text if self._detokenizer else ""

    @property
    def offsets(self) -> Sequence[int]:
        """For each token the number of characters of `text` before it, if log-probabilities were asked for; else
        empty."""
        return (self._detokenizer.offsets or ()) if self._detokenizer else ()

    @property
    def num_replaced(self) -> int:
        """Characters at the end of the prompt's decoded text that `text` replaces, having completed them."""
        return self._detokenizer.num_replaced if self._detokenizer else 0

    def feed(self, delta: OutputDelta, now_s: float) -> Piece:
        """Take in a delta and return what it adds; not to be called after the end."""
        text, token_ids, logprobs, is_first = "", delta.token_ids, delta.logprobs, not self.token_ids
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason.value, delta.stop_reason
            self.error = delta.error
        if self._detokenizer is not None:
            text = self._detokenize(self._detokenizer, delta)
            token_ids = token_ids[: self._detokenizer.num_tokens - len(self.token_ids)]
        if logprobs:
            logprobs = logprobs[: len(token_ids)]
            self.logprobs += logprobs
        if token_ids:
            self.token_ids += token_ids
            self.first_token_s, self.last_token_s = self.first_token_s or now_s, now_s
        if self.finish_reason is not None:
            self.end_s = now_s
        self._collect(delta)
        offsets = self.offsets[len(self.token_ids) - len(token_ids):] if logprobs else ()
        return Piece(self.index, text, token_ids, logprobs, self.finish_reason, self.stop_reason, is_first, offsets)

    def _detokenize(self, detokenizer: Detokenizer, delta: OutputDelta) -> str:
        text = detokenizer.feed(delta.token_ids, hide_last=delta.finish_reason is FinishReason.STOP)
        if delta.finish_reason is not None:
            text += detokenizer.finish()
        if detokenizer.stopped is not None:
            self.finish_reason, self.stop_reason, self.error = FinishReason.STOP.value, detokenizer.stopped, None
        return text

    def _collect(self, delta: OutputDelta) -> None:
        if delta.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.num_preemptions > self.num_preemptions:
            self.num_preemptions = delta.num_preemptions
        if delta.prompt_logprobs:
            self.prompt_logprobs += delta.prompt_logprobs
        if delta.cached_by_tier is not None:
            self.cached_by_tier = delta.cached_by_tier
        if delta.embedding is not None:
            self.embedding = delta.embedding


class Assembly:
    """The completions of requests that were handed to an engine together.

    abort(request id): called for those that a stop string ended, of which the engine does not know.
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Tokenizer | None, abort: Callable[[str], None]):
        self.completions = [Completion(index, request, tokenizer) for index, request in enumerate(requests)]
        self._open = {completion.request.request_id: completion for completion in self.completions}
        self._abort = abort

    @property
    def open_ids(self) -> tuple[str, ...]:
        """The ids of the requests that have not ended."""
        return tuple(self._open)

    @property
    def finished(self) -> bool:
        """Whether every request has ended."""
        return not self._open

    def feed(self, deltas: Iterable[OutputDelta]) -> list[Piece]:
        """Take in deltas and return the pieces that they add, in order. Deltas of requests that have ended, or of
        others, are left out."""
        now_s = time.monotonic()
        pieces = []
        for delta in deltas:
            completion = self._open.get(delta.request_id)
            if completion is None:
                continue
            piece = completion.feed(delta, now_s)
            pieces.append(piece)
            if piece.finish_reason is not None:
                del self._open[delta.request_id]
                if delta.finish_reason is None:
                    self._abort(delta.request_id)
        return pieces
