"""`GatedCall`: a call that came through an instance's gate, and what is known of its requests in the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from xllm.client.engine_client import Stream
from xllm.request import OutputDelta, Request


@dataclass(slots=True)
class GatedRequest:
    """request: as the client sent it, under the client's id. Times are on the `time.monotonic()` clock. scheduled_s:
    when it left the queue. finish_reason: `abort` and `error` if it ended with its call."""

    request: Request
    scheduled_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    cached_by_tier: dict[str, int] | None = None
    num_preemptions: int = 0
    finish_reason: str | None = None

    def note(self, delta: OutputDelta, now_s: float) -> None:
        """Take in what is said of it."""
        if delta.token_ids:
            self.first_token_s = self.first_token_s or now_s
            self.num_output_tokens += len(delta.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.num_preemptions = max(self.num_preemptions, delta.num_preemptions)
        self.cached_by_tier = delta.cached_by_tier or self.cached_by_tier
        if delta.finish_reason is not None:
            self.end_s, self.finish_reason = now_s, delta.finish_reason.value


class GatedCall:
    """client: what the client calls itself. prefix: of its requests' ids in the engine. arrival_s: when the call came,
    on the `time.monotonic()` clock. num_admitted: how many requests the client knows to have left the queue."""

    def __init__(self, client: str, prefix: str, requests: Sequence[Request], stream: Stream):
        self.client, self.stream = client, stream
        self.arrival_s = time.monotonic()
        self.requests = {request.request_id: GatedRequest(request) for request in requests}
        self.is_taken = False
        self.num_admitted = 0
        self._prefix = prefix

    @property
    def request_ids(self) -> list[str]:
        """The client's."""
        return list(self.requests)

    def end(self, reason: str) -> None:
        """It is over. reason: of the requests that had not ended."""
        now_s = time.monotonic()
        for request_id, request in self.requests.items():
            request.scheduled_s = self.stream.scheduled_s.get(self._prefix + request_id)
            if request.end_s is None:
                request.end_s, request.finish_reason = now_s, reason
