"""Chats through the real OpenAI client."""

from __future__ import annotations

import json
import time

import openai
import pytest

from tests.serving.server_process import ServerProcess

MESSAGES = [{"role": "user", "content": "How do I read a file?"}]
GREEDY = {"model": "demo", "messages": MESSAGES, "temperature": 0}


def test_answer_has_the_shape_that_clients_read(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, max_tokens=4)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_stream_arrives_piece_by_piece_and_equals_the_whole(client: openai.OpenAI) -> None:
    wish = {**GREEDY, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**wish)
    times, text, roles, reasons = [time.monotonic()], "", [], []
    for chunk in client.chat.completions.create(**wish, stream=True):
        times.append(time.monotonic())
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        roles.append(choice.delta.role)
        reasons.append(choice.finish_reason)
    assert text == whole.choices[0].message.content
    assert roles[0] == "assistant"
    assert set(roles[1:]) == {None}
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert len(roles) > 100
    assert times[1] - times[0] < (times[-1] - times[0]) / 2, "the chunks came all at once, at the end"


@pytest.mark.parametrize("usage", [False, True], ids=["no-usage", "usage"])
def test_raw_stream_ends_with_usage_and_done(server: ServerProcess, usage: bool) -> None:
    body = {**GREEDY, "max_completion_tokens": 4, "stream": True, "stream_options": {"include_usage": usage}}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    if usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 4
        assert "cached_tokens" in chunks[-1]["usage"]["prompt_tokens_details"]
        chunks.pop()
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, max_tokens=5, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy: the best one
        assert entry.logprob <= 0
    text = b"".join(bytes(entry.bytes) for entry in content).decode()
    assert text == answer.choices[0].message.content
    streamed = [entry for chunk in client.chat.completions.create(**GREEDY, max_tokens=5, logprobs=True, top_logprobs=3,
                                                                  stream=True)
                if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_n_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.chat.completions.create(model="demo", messages=MESSAGES, n=4, seed=7, temperature=1.5,
                                                max_tokens=12)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.completion_tokens <= 48
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_n_choices_stream_with_their_index(client: openai.OpenAI) -> None:
    texts = ["", "", ""]
    finished = []
    for chunk in client.chat.completions.create(**GREEDY, n=3, max_tokens=6, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finished.append(choice.index)
    assert sorted(finished) == [0, 1, 2]
    assert texts[0]
    assert texts[0] == texts[1] == texts[2]  # greedy


def test_return_token_ids_and_detokenize_agree(server: ServerProcess) -> None:
    answer = server.http.post("/v1/chat/completions", json={**GREEDY, "max_tokens": 6, "return_token_ids": True}).json()
    rendered = server.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert answer["prompt_token_ids"] == rendered["tokens"]
    assert rendered["count"] == answer["usage"]["prompt_tokens"]
    assert rendered["max_model_len"] == 512
    text = server.http.post("/detokenize", json={"tokens": answer["choices"][0]["token_ids"]}).json()["prompt"]
    assert text == answer["choices"][0]["message"]["content"]


def test_max_tokens_defaults_to_what_fits(server: ServerProcess) -> None:
    body = {"messages": MESSAGES, "temperature": 1, "ignore_eos": True, "seed": 1}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_text_parts_and_harmless_fields(client: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "How do I read a file?"}]}]
    answer = client.chat.completions.create(model="demo", messages=parts, temperature=0, max_tokens=4, user="me",
                                            metadata={"a": "b"}, store=False, tool_choice="none",
                                            response_format={"type": "text"})
    assert answer.choices[0].message.content == client.chat.completions.create(
        **GREEDY, max_tokens=4).choices[0].message.content


def test_repeated_prompt_is_cached(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "a distinct beginning " * 20}], "max_tokens": 1}
    first, second = (server.http.post("/v1/chat/completions", json=body).json()["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] > first["prompt_tokens_details"]["cached_tokens"]


def test_what_was_found_on_the_device_is_named_without_tiers_below_it(server: ServerProcess) -> None:
    """In the usage of every API, in /metrics and in /v1/stats, which console and `xllm top` show."""
    text = "a beginning that others do not have " * 20
    for _ in range(2):
        details = [
            server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}],
                             "max_tokens": 1}).json()["usage"]["prompt_tokens_details"],
            server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 1, "n": 2})
            .json()["usage"]["prompt_tokens_details"],
            server.http.post("/v1/responses", json={"input": text, "max_output_tokens": 16, "store": False})
            .json()["usage"]["input_tokens_details"]]
    for found in details:
        assert found["cached_tokens"] > 0
        assert found["cached_tokens_by_tier"] == {"l1": 0, "l2": found["cached_tokens"], "l3": 0, "l4": 0,
                                                  "l5": 0}
    server.wait_idle()
    engine = server.http.get("/v1/stats").json()["engine"]
    assert engine["cached_tokens_by_tier"]["l2"] == engine["prompt_tokens_cached"] > 0
    assert (f'xllm:kv_tier_hit_tokens_total{{engine="0",model_name="demo",tier="l2"}} '
            f'{float(engine["prompt_tokens_cached"])}') in server.http.get("/metrics").text


def test_cache_salt_separates(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "a salted beginning " * 20}], "max_tokens": 1, "cache_salt": "one"}
    server.http.post("/v1/chat/completions", json=body)
    other = server.http.post("/v1/chat/completions", json={**body, "cache_salt": "two"}).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    same = server.http.post("/v1/chat/completions", json=body).json()
    assert same["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
