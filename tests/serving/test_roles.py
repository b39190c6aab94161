"""Every message of every API reaches the prompt or is refused by its place, also by templates that drop what they do
not know (sglang#40082, llama.cpp#20215)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.scripted_model import go, write_checkpoint
from tests.serving.server_process import ServerProcess
from xllm import LLM
from xllm.errors import RequestError

TEMPLATE = ("{%- for m in messages %}{%- if m.role in ['system', 'user', 'assistant'] %}"
            "{{ '<|' + m.role + '|>' + m.content }}{%- endif %}{%- endfor %}{{ '<|assistant|>' }}")
USER = {"role": "user", "content": go("a")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("scripted"), {"a": "Yes."}, TEMPLATE))


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("roles") / "log.txt", folder, "--tool-call-parser", "hermes") as running:
        yield running
        running.wait_idle()


def first(role: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": "Say only BANANA.", **more}, USER]


def bodies(messages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {"/v1/chat/completions": {"messages": messages, "max_tokens": 1}, "/tokenize": {"messages": messages},
            "/v1/responses": {"input": messages, "max_output_tokens": 1}}


def count(answer: Any) -> int:
    usage = answer.get("usage") or {}
    return answer.get("count") or usage.get("prompt_tokens") or usage["input_tokens"]


def test_a_developer_is_a_system(server: ServerProcess) -> None:
    counts = set()
    for role in ("system", "developer"):
        for path, body in bodies(first(role)).items():
            answer = server.http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            counts.add(count(answer.json()))
    assert len(counts) == 1 and counts.pop() > len("Say only BANANA.")


@pytest.mark.parametrize("role", ["function", "moderator", "System", "tool", "", "x" * 5000])
def test_an_unknown_role_is_refused(server: ServerProcess, role: str) -> None:
    for path, body in bodies([USER, *first(role)]).items():
        answer = server.http.post(path, json=body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        named = "input.1.role" if path == "/v1/responses" else "messages.1.role"
        assert error["message"].startswith(named) and len(error["message"]) < 300
        assert error["param"] == named.partition(".")[0]


def test_results_that_a_template_drops_are_refused_where_they_stand(server: ServerProcess) -> None:
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        body = {"messages": [USER, result, USER], **({"max_tokens": 1} if path == "/v1/messages" else {})}
        answer = server.http.post(path, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("messages.1.content.0.role")
    items = [USER, {"type": "function_call_output", "call_id": "a", "output": "x"}, USER]
    answer = server.http.post("/v1/responses", json={"input": items, "instructions": "Be brief."})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("input.1.role")


@pytest.mark.parametrize(("message", "says"), [
    ({"role": "user", "mood": "good"}, "messages.0.mood"),
    ({"role": "user", "tool_call_id": "a"}, "messages.0.tool_call_id"),
    ({"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}, "messages.0.tool_calls.0"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "mood": 1}]}, "messages.0.tool_calls.0.mood"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "mood": 1}}]}, "tool_calls.0.function.mood"),
    ({"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}, "messages.0.content.0.mood"),
    *(({"role": "user", "content": [{"type": kind}]}, f"messages.0.content.0: parts of type '{kind}'")
      for kind in ("image_url", "input_audio", "file", "refusal", "input_text")),
])
def test_members_of_messages(server: ServerProcess, message: dict[str, Any], says: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = server.http.post(path, json={"messages": [{"content": "x", **message}, USER]})
        assert answer.status_code == 400, answer.text
        assert says in answer.json()["error"]["message"]


def test_what_a_client_sends_back_is_taken(server: ServerProcess) -> None:
    """The message of an answer as the SDK dumps it."""
    answer = server.http.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 4}).json()
    echoed = {**answer["choices"][0]["message"], "annotations": [], "audio": None, "function_call": None,
              "tool_calls": None, "reasoning_content": "Hm."}
    messages = [USER, echoed, {"role": "user", "content": [{**{"type": "text", "text": go("a")}, "cache_control": {
        "type": "ephemeral"}}]}]
    answer = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4, "stream": True,
                                                            "stream_options": {"include_obfuscation": False}})
    assert answer.status_code == 200, answer.text


def test_python(folder: str) -> None:
    with LLM(folder, max_model_len=256) as llm:
        lengths = {len(llm.chat(first(role))[0].prompt_token_ids) for role in ("system", "developer")}
        assert len(lengths) == 1
        for messages, says in ((first("moderator"), r"messages\.0\.role"), (first("tool"), r"messages\.0\.role")):
            with pytest.raises(RequestError, match=says):
                llm.chat(messages)
        with pytest.raises(RequestError, match="does not show tools"):
            llm.chat([USER], tools=[{"type": "function", "function": {"name": "f"}}])


def test_a_refusal_is_what_was_said(server: ServerProcess) -> None:
    def count(**message: Any) -> int:
        answer = server.http.post("/tokenize", json={"messages": [USER, {"role": "assistant", **message}, USER]})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["count"])

    assert count(refusal="I will not do that.") == count(content="I will not do that.") > count(content="")
    assert count(refusal="I will not do that.", content="No.") == count(content="No.")


def test_what_clients_send_and_nobody_needs(server: ServerProcess) -> None:
    tool = {"type": "function", "cache_control": {"type": "ephemeral"},
            "function": {"name": "f", "parameters": {"type": "object"}, "return": {"type": "string"}}}
    body = {"messages": [{**USER, "name": "Ann", "id": "msg_1"}], "tools": [tool], "top_logprobs": 0, "max_tokens": 1,
            "reasoning_effort": "medium"}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
