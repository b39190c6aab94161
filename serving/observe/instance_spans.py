"""`InstanceSpans`: a span of each try of a cluster's request at an instance, below the span of the request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.observe.tracing import Tracer, traceparent_of
from xllm.request import Request

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass(slots=True)
class _Tries:
    """number: how many there have been. cause: why the last one was over before the request was."""

    number: int = 0
    span: Span | None = None
    cause: str | None = None


class InstanceSpans:
    """A `CallWatcher`. What an instance gets has the context of the try, so that its own spans are below that."""

    def __init__(self, tracer: Tracer):
        self._tracer = tracer
        self._tries: dict[str, _Tries] = {}  # of open requests, by id

    def sent(self, request: Request, place: str, reason: str) -> Request:
        """See `CallWatcher`."""
        tries = self._tries.setdefault(request.request_id, _Tries())
        tries.number += 1
        found: dict[str, Any] = {"xllm.instance.name": place, "xllm.instance.try": tries.number,
                                 "xllm.instance.reason": reason}
        if tries.cause is not None:
            found["xllm.instance.after"] = tries.cause
        tries.span = span = self._tracer.child(request.traceparent, "instance", found)
        return request if span is None else dataclasses.replace(request, traceparent=traceparent_of(span))

    def lost(self, request_ids: Iterable[str], cause: str, error: str) -> None:
        """See `CallWatcher`."""
        from opentelemetry.trace import StatusCode

        for request_id in request_ids:
            if (tries := self._tries.get(request_id)) is None:
                continue
            tries.cause = cause
            if tries.span is not None:
                tries.span.set_attribute("xllm.instance.outcome", cause)
                if cause != "drained":  # that is as it should be
                    tries.span.set_status(StatusCode.ERROR, error or cause)
                tries.span.end()
                tries.span = None

    def left(self, request_ids: Iterable[str]) -> None:
        """See `CallWatcher`."""
        for request_id in request_ids:
            tries = self._tries.pop(request_id, None)
            if tries is not None and tries.span is not None:
                tries.span.end()
