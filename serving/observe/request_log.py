"""`RequestLog`: records the latest requests and their times, for `/v1/stats` and for traces."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, islice

from serving.security.caller import CALLER, TRACE_HEADERS
from xllm.client.assemble import Completion
from xllm.request import SamplingParams

MAX_FINISHED = 256  # requests that have ended and are still kept. Chosen: more than a view shows, and small


@dataclass(frozen=True, slots=True)
class RequestKind:
    """What a route calls the requests that it makes. operation: the `gen_ai.operation.name` of their spans."""

    name: str = "request"
    operation: str = "request"


PLAIN = RequestKind()
REQUEST_KIND: ContextVar[RequestKind] = ContextVar("request_kind", default=PLAIN)  # of the call at hand


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One sequence, from its arrival on. Times are on the `time.monotonic()` clock; None: not yet, or never.

    number: counts from 1. The caller's own id stays out of what others may see.
    """

    number: int
    request_id: str
    engine: int = 0  # the number of the one that has it
    arrival_s: float
    sampling: SamplingParams
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    cached_by_tier: dict[str, int] | None = None  # the cached tokens by where they were: l1 to l5
    num_preemptions: int = 0
    finish_reason: str | None = None
    trace_headers: dict[str, str] | None = None  # the caller's trace context
    traceparent: str | None = None  # the context of its own span, if that has begun before its end
    caller: str = ""  # whose it is, on a server with keys
    adapter: str = ""  # its name; "": the model itself
    model: str = ""  # the main name of the model that answers
    kind: RequestKind = PLAIN

    @property
    def decode_s(self) -> float | None:
        """From the first token to the last."""
        return None if self.first_token_s is None or self.end_s is None else self.end_s - self.first_token_s

    @property
    def queue_s(self) -> float | None:
        return None if self.scheduled_s is None else max(0.0, self.scheduled_s - self.arrival_s)

    @property
    def prefill_s(self) -> float | None:
        if self.scheduled_s is None or self.first_token_s is None:
            return None
        return max(0.0, self.first_token_s - self.scheduled_s)

    @property
    def inference_s(self) -> float | None:
        """From the queue's end to the last token."""
        return None if self.scheduled_s is None or self.end_s is None else max(0.0, self.end_s - self.scheduled_s)


class RequestLog:
    """Open requests and the last `MAX_FINISHED` that ended. The event loop owns it."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[RequestRecord, Completion, dict[str, float]]] = {}  # by number
        self._finished: deque[RequestRecord] = deque(maxlen=MAX_FINISHED)
        self._num_begun = 0
        self.on_end: Callable[[RequestRecord], None] = lambda record: None

    def begin(self, completion: Completion, scheduled_s: dict[str, float], engine: int = 0,
              model: str = "") -> RequestRecord:
        """Open a record of a sequence. It and `scheduled_s` (by request id) are read whenever somebody looks. engine:
        which one has it. model: the name of what that serves."""
        self._num_begun += 1
        request = completion.request
        record = RequestRecord(number=self._num_begun, request_id=request.request_id, arrival_s=request.arrival_s,
                               sampling=request.sampling, num_prompt_tokens=len(request.prompt_token_ids),
                               trace_headers=TRACE_HEADERS.get(), caller=CALLER.get().name, adapter=request.lora,
                               kind=REQUEST_KIND.get(), engine=engine, model=model, traceparent=request.traceparent)
        self._open[record.number] = record, completion, scheduled_s
        return record

    def end(self, record: RequestRecord, reason: str) -> None:
        """Close an open record."""
        self._refresh(*self._open.pop(record.number))
        record.end_s, record.finish_reason = time.monotonic(), reason
        self.on_end(record)
        record.sampling = record.sampling.without_collections()
        self._finished.append(record)

    def open_records(self) -> list[RequestRecord]:
        """Those that have not ended, oldest first."""
        return [self._refresh(*found) for found in self._open.values()]

    def latest(self, limit: int, wanted: Callable[[RequestRecord], bool] = lambda record: True) -> list[RequestRecord]:
        """Open ones and then the last that ended, newest first; of those that are wanted."""
        return list(islice(filter(wanted, chain(self.open_records()[::-1], reversed(self._finished))), limit))

    @staticmethod
    def _refresh(record: RequestRecord, completion: Completion, scheduled_s: dict[str, float]) -> RequestRecord:
        record.scheduled_s = scheduled_s.get(record.request_id)
        record.first_token_s, record.num_output_tokens = completion.first_token_s, len(completion.token_ids)
        record.num_cached_tokens, record.cached_by_tier = completion.num_cached_tokens, completion.cached_by_tier
        record.num_preemptions = completion.num_preemptions
        return record
