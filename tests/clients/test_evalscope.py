"""evalscope 1.14.1, perf: streams with the usage in the end, from which it counts tokens."""

from __future__ import annotations

import pytest

from tests.clients.replay import recorded
from tests.serving.server_process import ServerProcess

REQUESTS = recorded("evalscope")


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_usage_and_texts(server: ServerProcess, kind: str) -> None:
    events = REQUESTS[kind].events(server)
    usage = events[-1]["usage"]
    assert 1 <= usage["completion_tokens"] <= 12 and usage["prompt_tokens"] > 10
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    assert [choice["finish_reason"] for event in events for choice in event["choices"]][-1] in ("stop", "length")
    is_text = [event["object"] == "text_completion" for event in events]
    assert is_text == [kind == "completions"] * len(events)
    texts = [part["text"] if kind == "completions" else part["delta"].get("content") or ""
             for event in events for part in event["choices"]]
    assert "".join(texts)


def test_no_answer_is_shorter_than_asked_for(server: ServerProcess) -> None:
    """A prompt whose greedy answer is short; with `min_tokens` it is not."""
    messages = [{"role": "user", "content": "Hello"}]
    for wish in (4, 12):
        events = REQUESTS["chat"].events(server, messages=messages, min_tokens=wish)
        assert wish <= events[-1]["usage"]["completion_tokens"] <= 12


def test_what_was_sent_before_comes_from_the_cache(server: ServerProcess) -> None:
    request = REQUESTS["completions"]
    prompt = "evalscope asks for this twice, and the second time most of it is in the prefix cache of the server"
    cached = [request.events(server, prompt=prompt)[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
              for _ in range(2)]
    assert cached[0] < 16 <= cached[1]


def test_responses(server: ServerProcess) -> None:
    events = REQUESTS["responses"].events(server)
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    usage = events[-1]["response"]["usage"]
    assert 1 <= usage["output_tokens"] <= 12 and usage["input_tokens"] > 10


def test_embeddings(server: ServerProcess) -> None:
    answer = REQUESTS["embeddings"].json(server)
    assert len(answer["data"][0]["embedding"]) == 256 and answer["usage"]["prompt_tokens"] > 10
