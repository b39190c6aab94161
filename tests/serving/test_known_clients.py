"""The requests of coding agents and browser pages as they send them: their shapes, in words of our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.recorded_tools import SCRIPTS, TEMPLATE
from tests.serving.scripted_model import go, write_checkpoint
from tests.serving.server_process import ServerProcess

# A template that takes instructions at the front only and says so, as some of today's do.
STRICT = ("{%- for message in messages %}{%- if message.role in ['system', 'developer'] and not loop.first %}"
          "{{- raise_exception('instructions come first') }}{%- endif %}{%- endfor %}" + TEMPLATE)
CACHED = {"type": "ephemeral"}


@pytest.fixture(scope="module", params=[TEMPLATE, STRICT], ids=["anywhere", "front-only"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_checkpoint(tmp_path_factory.mktemp("scripted"), SCRIPTS, request.param)
    with ServerProcess(folder / "log.txt", str(folder), "--served-model-name", "scripted", "--max-model-len",
                       "2048") as running:
        yield running
        running.wait_idle()


# --- Claude Code

CLAUDE_HEADERS = {
    "anthropic-version": "2023-06-01", "x-api-key": "unused", "x-app": "cli",
    "user-agent": "claude-cli/2.1.0 (external, cli)",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true", "x-stainless-retry-count": "0", "x-stainless-timeout": "600"}
CLAUDE_TOOLS = [
    {"name": "get_weather", "description": "Says the weather.", "eager_input_streaming": True, "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "additionalProperties": False,
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}},
    {"name": "ping", "description": "Pings.", "input_schema": {"type": "object", "properties": {}},
     "cache_control": CACHED}]


def claude_code(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "scripted", "max_tokens": 200, "temperature": 0, "stream": True, "messages": list(messages),
        "system": [{"type": "text", "text": "client-header: version=2"},
                   {"type": "text", "text": "You work in a terminal.", "cache_control": CACHED},
                   {"type": "text", "text": "The folder is empty.", "cache_control": {**CACHED, "ttl": "1h"}}],
        "tools": CLAUDE_TOOLS, "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "s"})},
        "thinking": {"type": "adaptive"}, "output_config": {"effort": "medium"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}, **more}


def events(server: ServerProcess, path: str, body: dict[str, Any], headers: dict[str, str]) -> list[dict[str, Any]]:
    answer = server.http.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]


def test_claude_code_asks_and_calls(server: ServerProcess) -> None:
    asked = {"role": "user", "content": [{"type": "text", "text": "<reminder>Be careful.</reminder>"},
                                         {"type": "text", "text": go("calls"), "cache_control": CACHED}]}
    first = events(server, "/v1/messages?beta=true", claude_code(asked), CLAUDE_HEADERS)
    assert first[0]["type"] == "message_start" and first[-2]["delta"]["stop_reason"] == "tool_use"
    begun = [event["content_block"] for event in first if event["type"] == "content_block_start"]
    used = [block for block in begun if block["type"] == "tool_use"]
    assert [block["name"] for block in used] == ["get_weather", "ping"]
    turn = {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": "sealed elsewhere"},
        {"type": "text", "text": "Let me look.", "citations": None},
        *({**block, "input": {}, "caller": {"type": "direct"}} for block in used)]}
    results = {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": used[0]["id"], "content": "sunny"},
        {"type": "tool_result", "tool_use_id": used[1]["id"], "content": [{"type": "text", "text": "lost"}],
         "is_error": True, "cache_control": CACHED}]}
    later = {"role": "system", "content": [{"type": "text", "text": "A file has changed."}]}
    going_on = {"role": "user", "content": [{"type": "text", "text": go("text")}]}
    second = events(server, "/v1/messages?beta=true", claude_code(asked, turn, results, later, going_on),
                    CLAUDE_HEADERS)
    texts = [event["delta"]["text"] for event in second if event.get("delta", {}).get("type") == "text_delta"]
    assert "".join(texts) == SCRIPTS["text"]


def test_claude_code_counts_names_and_titles(server: ServerProcess) -> None:
    whole = claude_code({"role": "user", "content": "count this"})
    count = {name: whole[name] for name in ("model", "messages", "system", "tools", "thinking")}
    answer = server.http.post("/v1/messages/count_tokens?beta=true", json=count, headers=CLAUDE_HEADERS)
    assert answer.status_code == 200 and answer.json()["input_tokens"] > 20, answer.text
    probe = {"model": "scripted", "max_tokens": 1, "messages": [{"role": "user", "content": "quota"}],
             "metadata": whole["metadata"]}
    assert server.http.post("/v1/messages?beta=true", json=probe, headers=CLAUDE_HEADERS).status_code == 200
    title = claude_code({"role": "user", "content": [{"type": "text", "text": go("text")}]}, stream=False, tools=[],
                        thinking={"type": "disabled"}, output_config={"format": {"type": "json_schema", "schema": {
                            "type": "object", "properties": {"title": {"type": "string", "maxLength": 9}},
                            "required": ["title"], "additionalProperties": False}}})
    answer = server.http.post("/v1/messages?beta=true", json=title, headers=CLAUDE_HEADERS)
    assert answer.status_code == 200, answer.text
    assert set(json.loads(answer.json()["content"][0]["text"])) == {"title"}


def test_models_for_both(server: ServerProcess) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as claude, server.client() as client:
        [card] = claude.models.list().data
        assert (card.id, card.type, card.display_name, card.created_at.year > 2000) == (
            "scripted", "model", "scripted", True)
        assert claude.models.retrieve("scripted").id == client.models.list().data[0].id == "scripted"
        assert [model.id for model in claude.models.list()] == ["scripted"]


# --- Codex

CODEX_HEADERS = {"originator": "codex_cli_rs", "session_id": "s", "conversation_id": "s", "accept": "text/event-stream",
                 "user-agent": "codex_cli_rs/0.100.0", "version": "0.100.0", "authorization": "Bearer unused"}
CODEX_TOOLS = [
    {"type": "function", "name": "get_weather", "description": "Says the weather.", "strict": False, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number"}}, "required": ["city"],
        "additionalProperties": False}},
    {"type": "function", "name": "ping", "description": "Pings.", "strict": False,
     "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    {"type": "web_search", "external_web_access": False}]


def codex(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    before = [("developer", "Ask before you write."), ("user", "<environment><cwd>/</cwd></environment>")]
    return {
        "model": "scripted", "instructions": "You work in a terminal.", "tools": CODEX_TOOLS, "tool_choice": "auto",
        "input": [*({"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}
                    for role, text in before), *items],
        "parallel_tool_calls": True, "reasoning": None, "store": False, "stream": True, "temperature": 0,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "s",
        "client_metadata": {"x-codex-installation-id": "i"}, **more}


def asks(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def test_codex_asks_and_calls(server: ServerProcess) -> None:
    first = events(server, "/v1/responses", codex(asks(go("thinks-then-calls"))), CODEX_HEADERS)
    assert first[-1]["type"] == "response.completed"
    items = [event["item"] for event in first if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in items] == ["reasoning", "function_call"]
    assert items == first[-1]["response"]["output"]
    assert [tool["name"] for tool in first[-1]["response"]["tools"]] == ["get_weather", "ping"]
    result = {"type": "function_call_output", "call_id": items[1]["call_id"], "output": "sunny"}
    again = [{**items[0], "encrypted_content": None}, items[1]]  # as Codex keeps them
    second = events(server, "/v1/responses", codex(asks(go("thinks-then-calls")), *again, result, asks(go("text"))),
                    CODEX_HEADERS)
    [message] = second[-1]["response"]["output"]
    assert message["content"][0]["text"] == SCRIPTS["text"]


def test_codex_hears_its_instructions(server: ServerProcess) -> None:
    """Instructions and what a developer says are two messages to templates that take two, else one."""
    num_tokens = [events(server, "/v1/responses", codex(asks(go("text")), instructions=text),
                         CODEX_HEADERS)[-1]["response"]["usage"]["input_tokens"] for text in ("x", "x and more")]
    assert num_tokens[1] == num_tokens[0] + len(" and more")


# --- pages

def test_a_page_with_the_sdk(tmp_path: Any) -> None:
    site = "https://app.example"
    with ServerProcess(tmp_path / "log.txt", "--cors-origin", site) as server:
        body = {"model": "demo", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
        for path in ("/v1/messages", "/v1/chat/completions"):
            answer = httpx.post(f"{server.url}{path}", json=body, headers={
                **CLAUDE_HEADERS, "Origin": site, "Sec-Fetch-Mode": "cors", "openai-organization": "o"})
            assert answer.status_code == 200, answer.text
            assert answer.headers["access-control-allow-origin"] == site
