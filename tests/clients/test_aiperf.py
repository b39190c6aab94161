"""aiperf 0.13.0: streams whose chunks are told apart by `object`, and what it scrapes from `/metrics`."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.clients.replay import recorded
from tests.serving.server_process import ServerProcess

REQUESTS = recorded("aiperf")
KINDS = {"chat": "chat.completion.chunk", "completions": "text_completion"}


@pytest.mark.parametrize("kind", KINDS)
def test_chunks(server: ServerProcess, kind: str) -> None:
    request = REQUESTS[kind]
    *events, last = request.events(server, temperature=0)
    assert {event["object"] for event in (*events, last)} == {KINDS[kind]}
    assert request.headers["x-request-id"] in last["id"]
    texts = [event["choices"][0].get("text") or event["choices"][0].get("delta", {}).get("content") or ""
             for event in events]
    assert sum(map(bool, texts)) > 3, "tokens come one by one, or their latency cannot be measured"
    assert not last["choices"] and 1 <= last["usage"]["completion_tokens"] <= 12
    assert last["usage"]["prompt_tokens"] > 10
    assert all(event.get("usage") is None for event in events)


def test_what_it_scrapes_is_prometheus_text(server: ServerProcess) -> None:
    answer = REQUESTS["metrics"].send(server)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert {"vllm:num_requests_running", "vllm:generation_tokens", "vllm:time_to_first_token_seconds"} <= names


def test_the_probe_is_answered_without_a_body(server: ServerProcess) -> None:
    """It asks HEAD first and takes 405 for: there, ask with GET."""
    answer = REQUESTS["metrics_probe"].send(server)
    assert answer.status_code in (200, 405) and answer.content == b""


def test_responses(server: ServerProcess) -> None:
    events = REQUESTS["responses"].events(server)
    assert sum(event["type"] == "response.output_text.delta" for event in events) > 3
    assert events[-1]["response"]["usage"]["output_tokens"] == 12


def test_embeddings(server: ServerProcess) -> None:
    answer = REQUESTS["embeddings"].json(server)
    assert [item["object"] for item in answer["data"]] == ["embedding"]
    assert len(answer["data"][0]["embedding"]) == 256
