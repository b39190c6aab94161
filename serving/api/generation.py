"""From the engine's deltas to text: one `Choice` per sequence, its new parts as `Piece`s."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from serving.api.errors import ApiError, invalid, unavailable
from serving.metrics.refusals import OVERLOAD, QUEUE_FULL, UNAVAILABLE
from serving.state import ServerState
from serving.stream import EngineBusyError, Stream
from xllm.detokenizer import Detokenizer
from xllm.request import FinishReason, OutputDelta, Request, TokenLogprobs


@dataclass(slots=True)
class Piece:
    """What is new in one choice. `finish_reason` is OpenAI's word, on the last piece only."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    is_first: bool = False


@dataclass
class Choice:
    """One sequence of a call: its request and all that it has produced."""

    index: int
    request: Request
    detokenizer: Detokenizer | None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    num_preemptions: int = 0
    embedding: list[float] | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0

    def feed(self, delta: OutputDelta) -> Piece:
        """Take a delta in. Raises ApiError if the engine ended the request with an error."""
        if delta.finish_reason is FinishReason.ERROR:
            self.finish_reason = "error"
            raise ApiError(500, f"generation failed: {delta.error or 'unknown reason'}")
        if delta.finish_reason is FinishReason.ABORT:
            raise unavailable("the request was aborted by the server")
        token_ids, text = delta.token_ids, ""
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason.value, delta.stop_reason
        if self.detokenizer is not None:
            text = self._detokenize(self.detokenizer, delta)
            token_ids = token_ids[: self.detokenizer.num_tokens - len(self.token_ids)]
        logprobs = delta.logprobs[: len(token_ids)] if delta.logprobs else None
        piece = Piece(self.index, text, token_ids, logprobs, self.finish_reason, self.stop_reason,
                      is_first=not self.token_ids)
        self._collect(delta, piece)
        return piece

    def _detokenize(self, detokenizer: Detokenizer, delta: OutputDelta) -> str:
        stopped_by_token = delta.finish_reason is FinishReason.STOP
        text = detokenizer.feed(delta.token_ids, hide_last=stopped_by_token)
        if detokenizer.stopped is None and delta.finish_reason is not None:
            text += detokenizer.finish()
        if detokenizer.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", detokenizer.stopped
        return text

    def _collect(self, delta: OutputDelta, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs or ()
        self.prompt_logprobs += delta.prompt_logprobs or ()
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.cached_by_tier = delta.cached_by_tier or self.cached_by_tier
        self.embedding = delta.embedding or self.embedding
        self.num_preemptions = max(self.num_preemptions, delta.num_preemptions)


class Generation:
    """The choices of one call while the engine produces them."""

    def __init__(self, state: ServerState, requests: Sequence[Request], stream: Stream):
        self.state = state
        self.choices = [Choice(index, request, make_detokenizer(state, request))
                        for index, request in enumerate(requests)]
        self._by_id = {choice.request.request_id: choice for choice in self.choices}
        self._stream = stream
        self._closed = False
        for choice in self.choices:
            state.requests.begin(choice, stream.scheduled_s)

    @classmethod
    async def start(cls, state: ServerState, requests: Sequence[Request], timeout_s: float | None = None) -> Generation:
        """Submit the requests; the caller runs `pieces` or `close`. timeout_s: in which they must be done; None: the
        server's own limit. Raises RequestError or EngineDeadError."""
        expires_s = expiry_s(timeout_s, state.config.resilience.request_timeout)
        try:
            stream = await state.engine.submit(requests)
        except EngineBusyError:
            state.refusals.note(UNAVAILABLE if state.engine.sleep_level else QUEUE_FULL)
            raise
        stream.expires_s = expires_s
        state.num_open += 1
        return cls(state, requests, stream)

    def close(self) -> None:
        """Abort what is still running. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._stream.close()
        self.state.num_open -= 1
        for choice in self.choices:
            if choice.finish_reason in (None, "error"):  # the good ends are counted as they come
                self.state.metrics.request_success[choice.finish_reason or "abort"] += 1
            self.state.requests.end(choice, choice.finish_reason or "abort")
        self.state.metrics.request_max_num_generation_tokens.observe(max(len(c.token_ids) for c in self.choices))

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """New pieces as they come, until every choice has its finish reason. Raises ApiError or EngineDeadError."""
        while deltas := await self._next():
            now = time.monotonic()
            found = []
            for delta in deltas:
                choice = self._by_id[delta.request_id]
                if choice.finish_reason is not None:
                    continue
                piece = choice.feed(delta)
                if piece.finish_reason is not None and delta.finish_reason is None:
                    self._stream.abort(delta.request_id)  # a stop string, which the engine cannot see
                self._measure(choice, piece, now)
                if piece.token_ids or piece.finish_reason is not None:  # else: a chunk of prompt_logprobs only
                    found.append(piece)
            if found:
                yield found

    async def _next(self) -> list[OutputDelta]:
        try:
            return await self._stream.next()
        except EngineBusyError:
            self.state.refusals.note(OVERLOAD)
            raise

    async def run(self) -> None:
        """Run to the end without looking at the pieces, then close."""
        try:
            async for _ in self.pieces():
                pass
        finally:
            self.close()

    def _measure(self, choice: Choice, piece: Piece, now: float) -> None:
        metrics, request = self.state.metrics, choice.request
        num_new = len(piece.token_ids)
        if num_new and choice.first_token_s is None:
            choice.first_token_s = choice.last_token_s = now
            metrics.time_to_first_token_seconds.observe(now - request.arrival_s)
            num_new -= 1
        for _ in range(num_new):
            metrics.inter_token_latency_seconds.observe((now - choice.last_token_s) / num_new)
        choice.last_token_s = now
        if piece.finish_reason is None:
            return
        num_tokens = len(choice.token_ids)
        metrics.request_success[piece.finish_reason] += 1
        metrics.e2e_request_latency_seconds.observe(now - request.arrival_s)
        metrics.request_prompt_tokens.observe(len(request.prompt_token_ids))
        metrics.request_generation_tokens.observe(num_tokens)
        metrics.request_params_max_tokens.observe(request.sampling.max_tokens or 0)
        metrics.request_num_preemptions.observe(choice.num_preemptions)
        if (record := self.state.requests.end(choice, piece.finish_reason)) is not None:
            metrics.observe_phases(record, choice.cached_by_tier)
        if choice.first_token_s is not None:
            metrics.request_decode_time_seconds.observe(now - choice.first_token_s)
        if num_tokens > 1 and choice.first_token_s is not None:
            metrics.request_time_per_output_token_seconds.observe((now - choice.first_token_s) / (num_tokens - 1))

    def usage(self, n: int, *, hidden_tokens: int = 0) -> dict[str, object]:
        """OpenAI's usage object; every prompt counts once, however many choices it has."""
        prompts = self.choices[::n]
        num_prompt = sum(len(choice.request.prompt_token_ids) for choice in prompts)
        num_output = sum(max(0, len(choice.token_ids) - hidden_tokens) for choice in self.choices)
        details: dict[str, object] = {"cached_tokens": sum(choice.num_cached_tokens for choice in prompts)}
        by_tier = Counter[str]()
        for choice in prompts:
            by_tier.update(choice.cached_by_tier)
        if by_tier:
            details["cached_tokens_by_tier"] = dict(by_tier)
        return {
            "prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": details,
        }


def expiry_s(wish_s: float | None, limit_s: float) -> float | None:
    """On the `time.monotonic()` clock. Raises ApiError for a wish that is no duration."""
    if wish_s is not None and not 0 < wish_s < math.inf:
        raise invalid("timeout_s must be a positive number", "timeout_s")
    given = [seconds for seconds in (wish_s, limit_s or None) if seconds is not None]
    return time.monotonic() + min(given) if given else None


def make_detokenizer(state: ServerState, request: Request) -> Detokenizer | None:
    return None if state.tokenizer is None else Detokenizer(state.tokenizer, request.sampling)
