"""guidellm 0.8.1: streams with usage on every chunk, responses, embeddings."""

from __future__ import annotations

import pytest

from tests.clients.replay import recorded
from tests.serving.server_process import ServerProcess

REQUESTS = recorded("guidellm")


def test_health(server: ServerProcess) -> None:
    assert REQUESTS["health"].send(server).status_code == 200


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_every_chunk_says_how_many_tokens_there_were(server: ServerProcess, kind: str) -> None:
    *events, last = REQUESTS[kind].events(server)
    assert len({event["id"] for event in (*events, last)}) == 1
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 16
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 16
    assert last["usage"]["prompt_tokens"] == events[0]["usage"]["prompt_tokens"] > 20
    text = "".join(part.get("text") or part.get("delta", {}).get("content") or ""
                   for event in events for part in event["choices"])
    assert len(text) > 16


def test_responses(server: ServerProcess) -> None:
    events = REQUESTS["responses"].events(server)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert deltas and all(isinstance(delta, str) for delta in deltas)
    last = events[-1]
    assert last["type"] in ("response.completed", "response.incomplete")
    assert last["response"]["usage"]["output_tokens"] == 16
    assert last["response"]["usage"]["input_tokens"] > 20
    assert last["response"]["id"] == events[0]["response"]["id"]


def test_embeddings(server: ServerProcess) -> None:
    answer = REQUESTS["embeddings"].json(server)
    assert answer["object"] == "list" and len(answer["data"][0]["embedding"]) == 256
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 10
