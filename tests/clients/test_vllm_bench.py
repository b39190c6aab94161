"""`vllm bench serve` 0.33.0: vllm, openai-chat, openai-responses, openai-embeddings, vllm-pooling and vllm-rerank."""

from __future__ import annotations

import pytest

from tests.clients.replay import recorded
from tests.serving.server_process import ServerProcess

REQUESTS = recorded("vllm_bench")


def test_the_first_model_is_the_one_to_ask(server: ServerProcess) -> None:
    assert REQUESTS["models"].json(server)["data"][0]["id"] == REQUESTS["chat"].body["model"]


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_chunks_and_then_usage(server: ServerProcess, kind: str) -> None:
    """Each chunk with choices is a point in time, whatever its text; usage is looked for only where there are none."""
    request = REQUESTS[kind]
    *events, last = request.events(server)
    assert all(event["choices"] for event in events) and not last["choices"]
    assert last["usage"]["completion_tokens"] == 12 and last["usage"]["prompt_tokens"] > 10
    pieces = [event["choices"][0] for event in events]
    texts = [piece["text"] if kind == "completions" else piece["delta"].get("content") for piece in pieces]
    assert sum(map(bool, texts)) > 3
    assert request.headers["x-request-id"] in last["id"]


def test_responses(server: ServerProcess) -> None:
    events = REQUESTS["responses"].events(server)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) > 3 and not any(event.get("error") for event in events)
    assert events[-1]["type"] in ("response.completed", "response.incomplete", "response.failed")
    usage = events[-1]["response"]["usage"]
    assert usage["output_tokens"] == 12 and usage["input_tokens"] > 10
    assert server.http.get(f"/v1/responses/{events[-1]['response']['id']}").status_code == 404, "store was false"


@pytest.mark.parametrize(("field", "value"), [("top_k", -2), ("min_p", 2.0), ("repetition_penalty", 0.0),
                                              ("presence_penalty", 9.0), ("frequency_penalty", 9.0),
                                              ("min_tokens", 13), ("ignore_eos", "yes")])
def test_what_it_adds_to_responses_is_heeded(server: ServerProcess, field: str, value: object) -> None:
    """A wrong value is refused by name, so it went all the way."""
    answer = REQUESTS["responses"].send(server, stream=False, **{field: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field


@pytest.mark.parametrize("kind", ["embeddings", "pooling", "rerank"])
def test_vectors_and_scores(server: ServerProcess, kind: str) -> None:
    """Long texts are cut when asked for; what it counts is `usage.prompt_tokens`."""
    short = REQUESTS[kind].json(server)["usage"]["prompt_tokens"]
    field, long = ("documents", ["x = 1\n" * 1000]) if kind == "rerank" else ("input", "x = 1\n" * 1000)
    cut = REQUESTS[kind].json(server, **{field: long})["usage"]["prompt_tokens"]
    assert 10 < short < 511 <= cut < 2 * 512


def test_the_two_names_of_embedding_give_the_same(server: ServerProcess) -> None:
    item, = REQUESTS["pooling"].json(server)["data"]
    assert item["object"] == "pooling"
    assert item["data"] == pytest.approx(REQUESTS["embeddings"].json(server)["data"][0]["embedding"], abs=1e-5)


def test_speculation_is_read_from_the_metrics(server: ServerProcess) -> None:
    found = {}
    for line in REQUESTS["metrics"].send(server).text.splitlines():
        if line.startswith("vllm:spec_decode"):
            name, value = line.split(None, 1)
            found[name.split("{")[0]] = int(float(value.rpartition(" ")[2]))
    assert {"vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"} <= found.keys()
