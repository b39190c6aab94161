"""Every bad request gets its 4xx with the field's name, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.serving.server_process import ServerProcess

OK: dict[str, Any] = {"prompt": "hi", "max_tokens": 1, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def check(response: httpx.Response, status: int, param: str | None, says: str = "") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["code"] == status
    assert says in error["message"]


@pytest.mark.parametrize(("extra", "param"), [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [5], "add_special_tokens": True}, "add_special_tokens"),
    ({"prompt": [[5], [6]], "add_special_tokens": True}, "add_special_tokens"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [5] * 512}, "prompt"),
    ({"prompt": "word " * 2000}, "prompt"),
    ({"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
    ({"prompt": "\ud800 lone"}, "prompt"),
    ({"stop": ["\udfff"]}, "stop"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": "7"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": float("nan")}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 10**9}, "n"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": True}, "n"),
    ({"prompt": ["a"] * 100, "n": 100}, "n"),
    ({"prompt": ["a"] * 2000}, "prompt"),
    ({"seed": 2**70}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"top_k": 10**400}, "top_k"),
    ({"n": 10**400}, "n"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"temperature": 10**400}, "temperature"),
    ({"priority": 10**400}, "priority"),
    ({"logit_bias": {"1" + "0" * 400: 1}}, "logit_bias"),
    ({"seed": "x"}, "seed"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"logprobs": 10**6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 1000}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [10**7]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1000}}, "logit_bias"),
    ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [10**7]}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": ["a"] * 100_000}, "bad_words"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"structured_outputs": {"regx": "a"}}, "structured_outputs"),
    ({"guided_json": {}}, "guided_json"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"temprature": 1}, "temprature"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"priority": 2**40}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 5000}, "cache_salt"),
    ({"request_id": "a b"}, "request_id"),
    ({"ttlt_slo_ms": -1.0}, "ttlt_slo_ms"),
    ({"logit_bias": {str(i): [[[[[]]]]] for i in range(3)}}, "logit_bias"),
], ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None)
def test_completion_field_is_named(server: ServerProcess, extra: dict[str, Any], param: str) -> None:
    response = server.http.post("/v1/completions", content=json.dumps({**OK, **extra}),
                                headers={"Content-Type": "application/json"})
    check(response, 400, param)


@pytest.mark.parametrize(("extra", "param"), [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"prompt": "hi"}, "prompt"),
], ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None)
def test_chat_field_is_named(server: ServerProcess, extra: dict[str, Any], param: str) -> None:
    content = json.dumps({**CHAT, **extra})
    check(server.http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}),
          400, param)


@pytest.mark.parametrize(("body", "says"), [
    (b"", "JSON"), (b"{", "JSON"), (b"[]", "object"), (b'"x"', "object"), (b"\xff\xfe{", "JSON"),
    (b'{"prompt": ' + b"9" * 10_000 + b"}", "JSON"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    (b"[" * 100_000, "nested"),
    (b'{"a":' * 100_000, "nested"),
    (b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
], ids=["empty", "cut", "list", "string", "not-utf8", "huge-int", "deep", "deep-open", "deep-objects", "depth-200"])
def test_bodies_that_are_no_request(server: ServerProcess, body: bytes, says: str) -> None:
    response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]["message"]


def test_duplicate_keys_are_fine(server: ServerProcess) -> None:
    body = b'{"prompt": "a", "prompt": "b", "max_tokens": 1}'
    assert server.http.post("/v1/completions", content=body,
                            headers={"Content-Type": "application/json"}).status_code == 200


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_too_large(server: ServerProcess, declared: bool) -> None:
    body = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    content: Any = body if declared else (body[start:start + 65536] for start in range(0, len(body), 65536))
    response = server.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    check(response, 413, None, "larger")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_wrong_content_type(server: ServerProcess, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    check(server.http.post("/v1/completions", content=json.dumps(OK), headers=headers), 415, None)


def test_unknown_model(server: ServerProcess, client: openai.OpenAI) -> None:
    check(server.http.post("/v1/completions", json={**OK, "model": "gpt-none"}), 404, "model", "gpt-none")
    check(server.http.get("/v1/models/other"), 404, "model")
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="gpt-none"):
        client.chat.completions.create(model="gpt-none", messages=CHAT["messages"])


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/web", 404), ("GET", "/v1/nothing", 404), ("POST", "/v1/nothing", 404), ("GET", "/docs", 404),
    ("GET", "/redoc", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405),
    ("GET", "/v1/completions/", 404), ("GET", "/..%2f..%2fetc/passwd", 404),
])
def test_wrong_routes(server: ServerProcess, method: str, path: str, status: int) -> None:
    check(server.http.request(method, path), status, None)


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"), ("/detokenize", {"tokens": [10**7]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"), ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ("/detokenize", {}, "tokens"), ("/tokenize", {"prompt": "a", "tools": [{}]}, "tools"),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
    ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ("/tokenize", {"prompt": "a", "metadata": {}}, "metadata"),
    ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
    ("/rerank", {"query": "a", "documents": [{"text": "b", "title": "c"}]}, "documents"),
    ("/score", {"text_1": "a", "text_2": "b", "store": True}, "store"),
])
def test_tokenize_errors(server: ServerProcess, path: str, body: dict[str, Any], param: str) -> None:
    check(server.http.post(path, json=body), 400, param)


def test_the_server_still_works(server: ServerProcess) -> None:
    assert server.http.post("/v1/completions", json=OK).status_code == 200
    assert server.health().json()["status"] == "ok"
    assert "Traceback" not in server.log
    server.wait_idle()
