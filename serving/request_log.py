"""`RequestLog`: what became of the latest requests and when, for `/v1/stats` and for traces."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from serving.security.caller import CALLER
from serving.tracing import TRACE_HEADERS

if TYPE_CHECKING:
    from serving.api.generation import Choice

MAX_FINISHED = 256
KINDS = {"chatcmpl": "chat", "cmpl": "completion", "resp": "response", "msg": "message"}  # by the id's prefix


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One sequence, from its arrival on. Times are on the `time.monotonic()` clock; None: not yet, or never.

    number: counts from 1. The caller's own id stays out of what others may see.
    """

    number: int
    request_id: str
    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    max_tokens: int | None = None
    num_preemptions: int = 0
    finish_reason: str | None = None
    trace_headers: dict[str, str] | None = None  # the caller's trace context
    caller: str = ""  # whose it is, on a server with keys
    adapter: str = ""  # its name; "": the model itself

    @property
    def kind(self) -> str:
        return KINDS.get(self.request_id.partition("-")[0], "request")

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
        self._open: dict[str, tuple[RequestRecord, Choice, dict[str, float]]] = {}
        self._finished: deque[RequestRecord] = deque(maxlen=MAX_FINISHED)
        self._num_begun = 0
        self.on_end: Callable[[RequestRecord, Choice], None] = lambda record, choice: None

    def begin(self, choice: Choice, scheduled_s: dict[str, float]) -> None:
        """Open a record. `choice` and `scheduled_s` (by request id) are read whenever somebody looks."""
        self._num_begun += 1
        request = choice.request
        record = RequestRecord(number=self._num_begun, request_id=request.request_id, arrival_s=request.arrival_s,
                               num_prompt_tokens=len(request.prompt_token_ids), max_tokens=request.sampling.max_tokens,
                               trace_headers=TRACE_HEADERS.get(), caller=CALLER.get().name, adapter=request.lora)
        self._open[request.request_id] = (record, choice, scheduled_s)

    def end(self, choice: Choice, reason: str) -> RequestRecord | None:
        """Close the record of a request; None if it is closed already."""
        found = self._open.pop(choice.request.request_id, None)
        if found is None:
            return None
        record = self._refresh(*found)
        record.end_s, record.finish_reason = time.monotonic(), reason
        self._finished.append(record)
        self.on_end(record, choice)
        return record

    def open_records(self) -> list[RequestRecord]:
        """Those that have not ended, oldest first."""
        return [self._refresh(*found) for found in self._open.values()]

    def latest(self, limit: int, wanted: Callable[[RequestRecord], bool] = lambda record: True) -> list[RequestRecord]:
        """Open ones and then the last that ended, newest first; of those that are wanted."""
        return list(islice(filter(wanted, chain(self.open_records()[::-1], reversed(self._finished))), limit))

    @staticmethod
    def _refresh(record: RequestRecord, choice: Choice, scheduled_s: dict[str, float]) -> RequestRecord:
        record.scheduled_s = scheduled_s.get(record.request_id)
        record.first_token_s, record.num_output_tokens = choice.first_token_s, len(choice.token_ids)
        record.num_cached_tokens, record.num_preemptions = choice.num_cached_tokens, choice.num_preemptions
        return record
