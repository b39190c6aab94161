"""OpenTelemetry traces of requests over OTLP/HTTP, with `--otlp-traces-endpoint`; nothing is imported without it.

Attributes have the names of the generative-AI semantic conventions, and vLLM's `gen_ai.latency.*` beside them. No text
of a prompt or an answer is ever in a span. What the OpenTelemetry SDK reads from the environment (`OTEL_SERVICE_NAME`,
`OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_TRACES_SAMPLER`) works as it documents.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.observe.request_log import REQUEST_KIND, RequestRecord
from serving.security.caller import TRACE_HEADERS
from xllm.errors import ConfigError
from xllm.request import Request

if TYPE_CHECKING:
    from opentelemetry.trace import Span

HEADERS = (b"traceparent", b"tracestate")
MAX_HEADER_CHARS = 1024  # of a trace header that is kept; W3C asks that 512 of `tracestate` are passed on at least
EXPORT_TIMEOUT_S = 3.0  # for one export. Chosen: the shutdown waits for the last one
EXPORT_INTERVAL_MS = 1000  # chosen: spans show soon; the SDK's default is 5000


class TraceContext:
    """ASGI middleware: keeps the caller's W3C trace context for the spans of its requests."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]
                     if name in HEADERS and len(value) <= MAX_HEADER_CHARS}
            TRACE_HEADERS.set(found)
        await self.app(scope, receive, send)


class Tracer:
    """Makes a span of each request that ended, with its phases as children; a thread of the SDK sends them.

    A span whose context others are told begins before that (`begin`). Of the event loop.

    Raises ConfigError if the packages are missing or the endpoint is no http(s) address.
    """

    def __init__(self, endpoint: str):
        if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
            raise ConfigError(f"otlp_traces_endpoint must be an http(s) address such as "
                              f"http://127.0.0.1:4318/v1/traces, got {endpoint!r}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(f"otlp_traces_endpoint needs the packages of the extra: pip install 'xllm-engine[otel]' "
                              f"({error.name} is missing)") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "xllm"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_INTERVAL_MS))
        self._tracer = self._provider.get_tracer("xllm")
        self._begun: dict[str, tuple[Span, int]] = {}  # by their contexts; and our clock behind the world's, ns

    def begin(self, requests: Sequence[Request]) -> list[Request]:
        """Begin the spans of requests. Each comes back with the context of its span, which `record` or `give_up`
        ends."""
        return [self._begin(request) for request in requests]

    def _begin(self, request: Request) -> Request:
        offset_ns = _clock_offset_ns()
        span = self._start(TRACE_HEADERS.get(), request.arrival_s, offset_ns, {})
        if (traceparent := traceparent_of(span)) is None:
            return request  # the SDK is switched off
        self._begun[traceparent] = span, offset_ns
        return dataclasses.replace(request, traceparent=traceparent)

    def give_up(self, requests: Sequence[Request], reason: str) -> None:
        """End the spans of requests that have begun and that no engine has taken. reason: "error" or "abort"."""
        for request in requests:
            if request.traceparent is not None:
                self.record(RequestRecord(
                    number=0, request_id=request.request_id, arrival_s=request.arrival_s, sampling=request.sampling,
                    end_s=time.monotonic(), num_prompt_tokens=len(request.prompt_token_ids), finish_reason=reason,
                    traceparent=request.traceparent, kind=REQUEST_KIND.get()))

    def child(self, traceparent: str | None, name: str, attributes: dict[str, Any]) -> Span | None:
        """Begin a span (of kind `CLIENT`) below one of `begin`. None: there is none of this context."""
        from opentelemetry import trace

        if traceparent is None or (found := self._begun.get(traceparent)) is None:
            return None
        return self._tracer.start_span(name, trace.set_span_in_context(found[0]), kind=trace.SpanKind.CLIENT,
                                       attributes=attributes)

    def _start(self, headers: dict[str, str] | None, arrival_s: float, offset_ns: int, attributes: dict[str, Any]
               ) -> Span:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers or {})
        return self._tracer.start_span("llm_request", parent, kind=trace.SpanKind.SERVER, attributes=attributes,
                                       start_time=int(arrival_s * 1e9) + offset_ns)

    def record(self, record: RequestRecord) -> None:
        """Write the spans of a request that has just ended."""
        from opentelemetry import trace

        assert record.end_s is not None
        if (begun := self._begun.pop(record.traceparent or "", None)) is not None:
            span, offset_ns = begun
            span.set_attributes(self._attributes(record))
        else:
            offset_ns = _clock_offset_ns()
            span = self._start(record.trace_headers, record.arrival_s, offset_ns, self._attributes(record))

        def wall_ns(seconds: float) -> int:
            return int(seconds * 1e9) + offset_ns

        if record.finish_reason == "error":
            span.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(span)
        starts = (record.arrival_s, record.scheduled_s, record.first_token_s)
        ends = (record.scheduled_s, record.first_token_s, record.end_s)
        for name, start_s, end_s in zip(("queue", "prefill", "decode"), starts, ends, strict=True):
            if start_s is not None:
                end_s = record.end_s if end_s is None else end_s
                self._tracer.start_span(name, inside, start_time=wall_ns(start_s)).end(wall_ns(max(start_s, end_s)))
        span.end(wall_ns(record.end_s))

    def _attributes(self, record: RequestRecord) -> dict[str, Any]:
        sampling = record.sampling
        assert record.end_s is not None
        found: dict[str, Any] = {
            "gen_ai.provider.name": "xllm", "gen_ai.operation.name": record.kind.operation,
            "gen_ai.request.id": record.request_id, "gen_ai.response.id": record.request_id,
            "gen_ai.request.model": record.model, "gen_ai.response.model": record.model,
            "gen_ai.request.max_tokens": sampling.max_tokens, "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p, "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.prompt_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_output_tokens,
            "gen_ai.usage.completion_tokens": record.num_output_tokens,
            "gen_ai.usage.cached_tokens": record.num_cached_tokens,
            "gen_ai.response.finish_reasons": [record.finish_reason or "error"],
            "gen_ai.latency.time_in_queue": record.queue_s,
            "gen_ai.latency.time_to_first_token": _span_s(record.arrival_s, record.first_token_s),
            "gen_ai.latency.e2e": record.end_s - record.arrival_s,
            "gen_ai.latency.time_in_model_prefill": record.prefill_s,
            "gen_ai.latency.time_in_model_decode": _span_s(record.first_token_s, record.end_s),
            "gen_ai.latency.time_in_model_inference": record.inference_s,
            "xllm.num_preemptions": record.num_preemptions,
        }
        return {name: value for name, value in found.items() if value is not None}

    def shutdown(self) -> None:
        """Send what is left, within the time of one export. Blocks."""
        self._provider.shutdown()


def traceparent_of(span: Span) -> str | None:
    """The context of a span, as W3C writes it in a `traceparent`; None: it has none."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers, trace.set_span_in_context(span))
    return headers.get("traceparent")


def _clock_offset_ns() -> int:
    """What is to be added to a time on the `time.monotonic()` clock."""
    return time.time_ns() - time.monotonic_ns()


def _span_s(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
