"""`Generation`: the sequences of one call while the engine produces them, with their measurements and records."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence

from serving.api.errors import ApiError, invalid, unavailable
from serving.api.state import ServerState
from serving.observe.call import CALL
from serving.observe.metrics.refusals import OVERLOAD, QUEUE_FULL, UNAVAILABLE
from serving.observe.request_log import RequestRecord
from xllm.client.assemble import Assembly, Completion, Piece
from xllm.client.engine_client import EngineBusyError, Stream
from xllm.request import OWN_FAULTS, Request

# That are read before other calls have their turn. Chosen: a call of many sequences must not hold up the others.
DELTAS_AT_ONCE = 32


class Generation:
    """Reads the stream of a call's requests: in `async with`, which gives the pieces and closes it. Made by
    `begin_generation`. choices: one for each request, in their order."""

    def __init__(self, state: ServerState, requests: Sequence[Request], stream: Stream):
        self.state = state
        self._stream, self._is_closed = stream, False
        self._assembly = Assembly(requests, state.tokenizer, stream.abort)
        self.choices: list[Completion] = self._assembly.completions
        self._records = [state.requests.begin(choice, stream.scheduled_s, stream.engine, state.served_names[0])
                         for choice in self.choices]
        if (call := CALL.get()) is not None:
            call.note_sequences(requests, self._records)
        state.num_open += 1

    def close(self) -> None:
        """Abort what is still running. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stream.close()
        self.state.num_open -= 1
        for choice, record in zip(self.choices, self._records, strict=True):
            if record.end_s is None:
                self._end(record, choice.finish_reason or "abort")
        longest = max(len(choice.token_ids) for choice in self.choices)
        self.state.metrics[self._stream.engine].request_max_num_generation_tokens.observe(longest)

    async def __aenter__(self) -> AsyncGenerator[Piece, None]:
        """New pieces as they come, until every choice has its finish reason. Reading them raises ApiError or
        EngineDeadError."""
        self._pieces = self._read()
        return self._pieces

    async def __aexit__(self, *exception: object) -> None:
        self.close()
        await self._pieces.aclose()

    async def _read(self) -> AsyncGenerator[Piece, None]:
        try:
            while deltas := await self._stream.next():
                for start in range(0, len(deltas), DELTAS_AT_ONCE):
                    pieces = self._assembly.feed(deltas[start : start + DELTAS_AT_ONCE])
                    for piece in pieces:
                        self._note(piece)
                    for piece in pieces:
                        if piece.token_ids or piece.finish_reason is not None:  # else: a chunk of prompt_logprobs only
                            yield piece
                    if start + DELTAS_AT_ONCE < len(deltas):
                        await asyncio.sleep(0)
        except EngineBusyError:
            self.state.refusals.note(OVERLOAD)
            raise

    def _note(self, piece: Piece) -> None:
        """Record a piece. Raises ApiError for a sequence that did not end well."""
        choice, record = self.choices[piece.index], self._records[piece.index]
        if piece.finish_reason == "error":
            reason = choice.error or "unknown reason"
            raise ApiError(422 if reason.startswith(OWN_FAULTS) else 500, f"generation failed: {reason}")
        if piece.finish_reason == "abort":
            raise unavailable("the request was aborted by the server")
        if piece.token_ids and choice.last_token_s is not None:
            self.state.metrics[record.engine].note_tokens(record, len(piece.token_ids), choice.last_token_s)
        if piece.finish_reason is not None:
            self._end(record, piece.finish_reason)

    def _end(self, record: RequestRecord, reason: str) -> None:
        self.state.requests.end(record, reason)
        self.state.metrics[record.engine].note_end(record)

    def usage(self, n: int, *, hidden_tokens: int = 0) -> dict[str, object]:
        """OpenAI's usage object; every prompt counts once, however many choices it has."""
        prompts = self.choices[::n]
        num_prompt = sum(len(choice.request.prompt_token_ids) for choice in prompts)
        num_output = sum(max(0, len(choice.token_ids) - hidden_tokens) for choice in self.choices)
        details: dict[str, object] = {"cached_tokens": sum(choice.num_cached_tokens for choice in prompts)}
        if any(choice.cached_by_tier for choice in prompts):
            by_tier = Counter[str]()
            for choice in prompts:
                by_tier.update(choice.cached_by_tier or {})
            details["cached_tokens_by_tier"] = dict(by_tier)
        return {
            "prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": details,
        }


async def begin_generation(state: ServerState, requests: Sequence[Request],
                           timeout_s: float | None = None) -> Generation:
    """Submit a call's requests, which must be done within timeout_s (None: the server's own limit). The caller enters
    the generation or calls `close`. Raises ApiError, RequestError or EngineDeadError."""
    expires_s = expiry_s(timeout_s, state.config.resilience.request_timeout)
    tracer = state.tracer if state.cluster is not None else None  # instances make spans below those of their requests
    if tracer is not None:
        requests = tracer.begin(requests)
    try:
        stream = await state.admission.submit(requests)
    except BaseException as error:
        if tracer is not None:
            tracer.give_up(requests, "error" if isinstance(error, Exception) else "abort")
        if isinstance(error, EngineBusyError):
            state.refusals.note(UNAVAILABLE if state.engine.sleep_level else QUEUE_FULL)
        raise
    stream.expires_s = expires_s
    return Generation(state, requests, stream)


async def run_generation(state: ServerState, requests: Sequence[Request],
                         timeout_s: float | None = None) -> Generation:
    """Submit a call's requests and read them to their end, for what their choices then hold. Raises as
    `begin_generation` does, and as reading the pieces does."""
    generation = await begin_generation(state, requests, timeout_s)
    async with generation as pieces:
        async for _ in pieces:
            pass
    return generation


def expiry_s(wish_s: float | None, limit_s: float) -> float | None:
    """When a call expires, on the `time.monotonic()` clock: after the request's own limit or the server's. Raises
    ApiError for a limit that is no duration."""
    if wish_s is not None and not 0 < wish_s < math.inf:
        raise invalid("timeout_s must be a positive number", "timeout_s")
    given = [seconds for seconds in (wish_s, limit_s or None) if seconds is not None]
    return time.monotonic() + min(given) if given else None
