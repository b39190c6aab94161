"""Traces, as a collector gets them from a real server."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving.observe.request_log import RequestLog
from serving.observe.tracing import EXPORT_TIMEOUT_S, Tracer
from tests.serving.server_process import ROOT, ServerProcess, wait_for
from xllm.client.assemble import Completion
from xllm.errors import ConfigError
from xllm.request import Request

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP/HTTP in and keeps the spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def flags(self) -> tuple[str, str]:
        """Of a server that is to send its traces here."""
        return "--otlp-traces-endpoint", f"http://127.0.0.1:{self.server_port}/v1/traces"

    def of(self, request_id: str) -> dict[str, Any]:
        """The spans of one request by name."""
        roots = [span for span in self.spans if attributes(span).get("gen_ai.request.id") == request_id]
        assert len(roots) == 1
        children = {span.name: span for span in self.spans if span.parent_span_id == roots[0].span_id}
        return {"llm_request": roots[0], **children}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/traces"
        for resource in body.resource_spans:
            self.server.resources.append(values(resource.resource.attributes))
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def values(attributes: Any) -> dict[str, Any]:
    found = {}
    for item in attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [entry.string_value for entry in value.values] if kind == "array_value" else value
    return found


def attributes(span: Any) -> dict[str, Any]:
    return values(span.attributes)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[ServerProcess]:
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with ServerProcess(tmp_path_factory.mktemp("traced") / "log.txt", "--otlp-traces-endpoint", endpoint) as running:
        yield running


def test_a_chat_is_one_trace_with_its_phases(traced: ServerProcess, collector: Collector) -> None:
    response = traced.http.post("/v1/chat/completions", json={
        "messages": [{"role": "user", "content": "a secret question"}], "max_tokens": 12, "temperature": 0.5,
        "top_p": 0.9, "seed": 3}, headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"})
    usage = response.json()["usage"]
    wait_for(lambda: len(collector.spans) >= 4, what="four spans")
    request_id = next(attributes(span)["gen_ai.request.id"] for span in collector.spans if span.name == "llm_request")
    assert request_id.startswith(response.json()["id"])
    spans = collector.of(request_id)
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
    root = spans["llm_request"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert root.parent_span_id.hex() == SPAN_ID and root.kind == root.SPAN_KIND_SERVER
    found = attributes(root)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "demo"
    assert found["gen_ai.usage.input_tokens"] == found["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.temperature"]) == (12, 0.5)
    assert (found["gen_ai.request.top_p"], found["gen_ai.request.seed"]) == (0.9, 3)
    assert found["gen_ai.response.finish_reasons"] == [response.json()["choices"][0]["finish_reason"]]
    assert "secret" not in str(collector.spans)
    assert collector.resources[0]["service.name"] == "xllm"


def test_the_phases_follow_each_other_and_fill_the_request(traced: ServerProcess, collector: Collector) -> None:
    body = traced.http.post("/v1/completions", json={"prompt": "def f():", "max_tokens": 9, "ignore_eos": True}).json()
    wait_for(lambda: any(attributes(span).get("gen_ai.request.id", "").startswith(body["id"])
                         for span in collector.spans), what="the trace")
    request_id = next(attributes(span)["gen_ai.request.id"] for span in collector.spans
                      if attributes(span).get("gen_ai.request.id", "").startswith(body["id"]))
    spans = collector.of(request_id)
    root = spans["llm_request"]
    assert root.parent_span_id == b""  # no caller's context: a trace of its own
    edges = [root.start_time_unix_nano]
    for name in ("queue", "prefill", "decode"):
        assert spans[name].start_time_unix_nano == pytest.approx(edges[-1], abs=1000)
        edges.append(spans[name].end_time_unix_nano)
    assert edges[-1] == root.end_time_unix_nano and edges == sorted(edges)
    found = attributes(root)
    whole_s = (root.end_time_unix_nano - root.start_time_unix_nano) / 1e9
    assert found["gen_ai.latency.e2e"] == pytest.approx(whole_s, abs=1e-5)
    assert found["gen_ai.latency.time_in_queue"] + found["gen_ai.latency.time_in_model_inference"] == pytest.approx(
        whole_s, abs=1e-5)
    assert found["gen_ai.latency.time_to_first_token"] == pytest.approx(
        found["gen_ai.latency.time_in_queue"] + found["gen_ai.latency.time_in_model_prefill"], abs=1e-5)
    assert found["gen_ai.operation.name"] == "text_completion"


def test_every_choice_and_an_abandoned_request_have_spans(traced: ServerProcess, collector: Collector) -> None:
    before = len(collector.spans)
    with traced.http.stream("POST", "/v1/completions", json={"prompt": "a", "n": 2, "max_tokens": 450, "stream": True,
                                                             "ignore_eos": True}) as response:
        next(response.iter_lines())
    wait_for(lambda: len(collector.spans) >= before + 8, what="two traces")
    roots = [attributes(span) for span in collector.spans[before:] if span.name == "llm_request"]
    assert [root["gen_ai.response.finish_reasons"] for root in roots] == [["abort"], ["abort"]]


def test_shutdown_sends_what_is_left(tmp_path: Path) -> None:
    collector = Collector()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with ServerProcess(tmp_path / "log.txt", "--otlp-traces-endpoint", endpoint) as server:
        server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert server.stop() == 0
    collector.shutdown()
    collector.server_close()
    assert [span.name for span in collector.spans if not span.parent_span_id] == ["llm_request"]


def test_a_missing_collector_harms_nobody() -> None:
    tracer = Tracer("http://127.0.0.1:9/v1/traces")
    request = Request(request_id="cmpl-1", prompt_token_ids=[1, 2], arrival_s=time.monotonic())
    log = RequestLog()
    log.on_end = tracer.record
    log.end(log.begin(Completion(0, request, None), {}), "abort")
    started_s = time.monotonic()
    tracer.shutdown()
    assert time.monotonic() - started_s < 5 * EXPORT_TIMEOUT_S


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://x/y", "http://"])
def test_wrong_endpoints_are_refused_at_once(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint must be an http\(s\) address"):
        Tracer(endpoint)


def test_off_means_not_even_imported() -> None:
    code = ("import sys, serving.commands.serve\n"
            "print(*[name for name in sys.modules if name.startswith('opentelemetry.')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not [name for name in loaded if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
