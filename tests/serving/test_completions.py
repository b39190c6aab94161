"""Completions: every prompt shape, echo, logprobs, stops, and the exact calls of lm-eval and `vllm bench`."""

from __future__ import annotations

import json

import openai
import pytest

from tests.serving.server_process import ServerProcess

PROMPT = "def read_file(path):"
GREEDY = {"model": "demo", "temperature": 0}


def ids_of(server: ServerProcess, text: str) -> list[int]:
    tokens: list[int] = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


def test_defaults_to_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(**GREEDY, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    assert answer.object == "text_completion"


def test_token_ids_and_text_prompts_agree(server: ServerProcess, client: openai.OpenAI) -> None:
    text = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=8).choices[0].text
    ids = client.completions.create(**GREEDY, prompt=ids_of(server, PROMPT), max_tokens=8).choices[0].text
    assert text == ids


@pytest.mark.parametrize("as_ids", [False, True], ids=["texts", "token-ids"])
def test_many_prompts_answer_in_order(server: ServerProcess, client: openai.OpenAI, as_ids: bool) -> None:
    texts = ["import os", "def main():", "class Node:", "x = [1, 2,"]
    alone = [client.completions.create(**GREEDY, prompt=text, max_tokens=6).choices[0].text for text in texts]
    prompts = [ids_of(server, text) for text in texts] if as_ids else texts
    answer = client.completions.create(**GREEDY, prompt=prompts, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == alone


def test_stream_equals_whole_for_many_prompts(client: openai.OpenAI) -> None:
    prompts = ["import os", "def main():"]
    whole = client.completions.create(**GREEDY, prompt=prompts, n=2, max_tokens=10, echo=True)
    texts = [""] * 4
    for chunk in client.completions.create(**GREEDY, prompt=prompts, n=2, max_tokens=10, echo=True, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[2].startswith("def main():")


def test_stop_string_ends_the_text_before_it(server: ServerProcess, client: openai.OpenAI) -> None:
    free = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=30).choices[0].text
    stop = free[10:13]
    answer = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=30, stop=[stop, "never there"])
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop
    assert answer.usage.completion_tokens < 30
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(
        **GREEDY, prompt=PROMPT, max_tokens=30, stop=stop, stream=True))
    assert streamed == answer.choices[0].text
    kept = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=30, stop=stop,
                                     extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == free[: free.index(stop) + len(stop)]


def test_stop_token_id(server: ServerProcess) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 20, "return_token_ids": True}
    free = server.http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
    stopped = server.http.post("/v1/completions", json={**body, "stop_token_ids": [free[5]]}).json()["choices"][0]
    assert stopped["token_ids"] == free[: free.index(free[5]) + 1]
    assert stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == free[5]


def test_sampling_fields_reach_the_engine(server: ServerProcess) -> None:
    def first_token(**extra: object) -> int:
        body = {**GREEDY, "prompt": PROMPT, "max_tokens": 1, "return_token_ids": True, **extra}
        response = server.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        token: int = response.json()["choices"][0]["token_ids"][0]
        return token

    best = first_token()
    assert first_token(logit_bias={"77": 100}) == 77
    assert first_token(allowed_token_ids=[55, 66]) in (55, 66)
    assert first_token(logit_bias={str(best): -100}) != best
    assert first_token(temperature=5.0, top_k=1, seed=3) == best
    assert first_token(temperature=5.0, top_p=1e-6, seed=3) == best
    assert first_token(temperature=5.0, min_p=1.0, seed=3) == best
    assert first_token(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, min_tokens=1, priority=5,
                       offline=True, skip_special_tokens=False, ttlt_slo_ms=60000.0, request_id="mine") >= 0


def test_bad_words_do_not_appear(server: ServerProcess) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 20}
    text = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    word = max(text.split(), key=len)
    again = server.http.post("/v1/completions", json={**body, "bad_words": [word]}).json()["choices"][0]["text"]
    assert again != text


def test_return_token_ids_streams_them(server: ServerProcess) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 6, "return_token_ids": True}
    whole = server.http.post("/v1/completions", json=body).json()["choices"][0]
    assert whole["prompt_token_ids"] == ids_of(server, PROMPT)
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [t for chunk in chunks for t in chunk["choices"][0]["token_ids"]] == whole["token_ids"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_lm_eval_shape(server: ServerProcess, max_tokens: int) -> None:
    """`local-completions` scores prompts: token ids in, echoed log-probabilities out, choices in order."""
    prompts = [ids_of(server, text) for text in ("import os\nimport sys", "def main():\n    return 0", "x")]
    body = {"model": "demo", "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens,
            "temperature": 0, "seed": 1234}
    answer = server.http.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        size = len(prompt) + max_tokens
        assert {len(values) for values in logprobs.values()} == {size}
        assert logprobs["token_logprobs"][0] is None
        for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert value <= max(top.values()) <= 0
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3 * max_tokens


def test_echoed_logprobs_are_those_of_generation(server: ServerProcess) -> None:
    """Scoring a greedy continuation gives the log-probabilities that generating it gave."""
    made = server.http.post("/v1/completions", json={**GREEDY, "prompt": PROMPT, "max_tokens": 8, "logprobs": 0,
                                                     "return_token_ids": True}).json()["choices"][0]
    full = made["prompt_token_ids"] + made["token_ids"]
    scored = server.http.post("/v1/completions", json={**GREEDY, "prompt": full, "max_tokens": 0, "echo": True,
                                                       "logprobs": 0}).json()["choices"][0]
    assert scored["logprobs"]["token_logprobs"][-8:] == pytest.approx(made["logprobs"]["token_logprobs"], abs=2e-3)


def test_prompt_logprobs(server: ServerProcess) -> None:
    ids = ids_of(server, PROMPT)
    answer = server.http.post("/v1/completions", json={**GREEDY, "prompt": ids, "max_tokens": 1,
                                                       "prompt_logprobs": 2}).json()
    entries = answer["choices"][0]["prompt_logprobs"]
    assert len(entries) == len(ids)
    assert entries[0] is None
    for token_id, entry in zip(ids[1:], entries[1:], strict=True):
        assert str(token_id) in entry
        assert 2 <= len(entry) <= 3
        assert entry[str(token_id)]["rank"] >= 1


def test_vllm_bench_shape(server: ServerProcess) -> None:
    """What `vllm bench serve` sends, and what it reads."""
    body = {"model": "demo", "prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": 5, "logprobs": None,
            "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert chunks[0]["choices"], "time to first token is read from a chunk with choices"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "demo"


def test_continuous_usage(server: ServerProcess) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 3, "stream": True, "ignore_eos": True, "return_token_ids": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 3
