"""The Responses API through the real client: whole, streamed in the order that the client's types demand, continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from serving.api.responses_input import ChatConversation, chat_body
from serving.api.responses_store import ResponseStore
from serving.api.routes.responses import _covering
from serving.api.types import ResponsesBody, parse
from tests.serving.recorded_tools import SCRIPTS, TEMPLATE, TOOLS
from tests.serving.scripted_model import go, write_checkpoint
from tests.serving.server_process import ServerProcess

FLAT_TOOLS = [{"type": "function", "strict": None, **tool["function"]} for tool in TOOLS]
KINDS = {kind.model_fields["type"].annotation.__args__[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])}
KEYS = ("first-key-of-some-length", "second-key-of-some-length")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_checkpoint(tmp_path_factory.mktemp("scripted"), SCRIPTS, TEMPLATE)
    with ServerProcess(folder / "log.txt", str(folder), "--served-model-name", "scripted", "--max-model-len", "2048",
                       "--api-key", KEYS[0], "--api-key", KEYS[1], "--admin-api-key", "ops", key=KEYS[0],
                       monitor_key="ops") as server:
        yield server
        server.wait_idle()


@pytest.fixture
def client(scripted: ServerProcess) -> Iterator[openai.OpenAI]:
    with scripted.client() as opened:
        yield opened


def ask(client: openai.OpenAI, script: str, **wish: Any) -> Response:
    return client.responses.create(**{"model": "scripted", "input": go(script), "temperature": 0, **wish})


def kinds(response: Response) -> list[str]:
    return [item.type for item in response.output]


def test_text(client: openai.OpenAI) -> None:
    response = ask(client, "text")
    assert response.output_text == SCRIPTS["text"]
    assert response.status == "completed" and kinds(response) == ["message"]
    usage = response.usage
    assert usage is not None and usage.total_tokens == usage.input_tokens + usage.output_tokens > 5


def test_thinking_and_calls_are_items_of_their_own(client: openai.OpenAI) -> None:
    thought = ask(client, "thinks")
    assert kinds(thought) == ["reasoning", "message"] and thought.output_text == "The answer is 42."
    assert "let me see" in thought.output[0].content[0].text
    assert thought.usage.output_tokens_details.reasoning_tokens > 0
    calls = ask(client, "calls", tools=FLAT_TOOLS)
    assert kinds(calls) == ["message", "function_call", "function_call"]
    assert json.loads(calls.output[1].arguments) == {"city": "Zürich 😀", "days": 3}
    assert calls.output[1].call_id != calls.output[2].call_id and calls.output[2].name == "ping"
    assert kinds(ask(client, "calls", tools=FLAT_TOOLS, parallel_tool_calls=False)) == ["message", "function_call"]


@pytest.mark.parametrize("script", ["text", "thinks", "calls", "thinks-then-calls"])
def test_a_stream_tells_what_the_whole_says(client: openai.OpenAI, scripted: ServerProcess, script: str) -> None:
    whole = ask(client, script, tools=FLAT_TOOLS)
    events = list(ask(client, script, tools=FLAT_TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    final = events[-1].response
    assert [item.type for item in final.output] == kinds(whole) and final.output_text == whole.output_text
    texts: dict[int, str] = {}
    open_items: set[int] = set()
    for event in events[2:-1]:
        if event.type == "response.output_item.added":
            assert not open_items
            open_items.add(event.output_index)
        elif event.type == "response.output_item.done":
            open_items.remove(event.output_index)
        else:
            assert event.output_index in open_items
        if event.type.endswith(".delta"):
            texts[event.output_index] = texts.get(event.output_index, "") + event.delta
    for index, item in enumerate(final.output):
        said = item.arguments if item.type == "function_call" else item.content[0].text
        assert texts.get(index, "") == said
    raw = scripted.http.post("/v1/responses", json={"model": "scripted", "input": go(script), "stream": True}).text
    for line in raw.splitlines():
        if line.startswith("data: "):
            KINDS[json.loads(line[6:])["type"]].model_validate_json(line[6:])
    with client.responses.stream(model="scripted", input=go(script)) as helper:
        assert helper.get_final_response().output_text is not None


def test_a_conversation_goes_on(client: openai.OpenAI, scripted: ServerProcess) -> None:
    first = ask(client, "calls", tools=FLAT_TOOLS)
    call = next(item for item in first.output if item.type == "function_call")
    outputs = [{"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
               for item in first.output if item.type == "function_call"]
    asked = [*outputs, {"role": "user", "content": [{"type": "input_text", "text": go("text")}]}]
    second = client.responses.create(model="scripted", previous_response_id=first.id, input=asked, temperature=0,
                                     tools=FLAT_TOOLS)
    assert second.output_text == SCRIPTS["text"] and second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    by_hand = [{"role": "user", "content": go("calls")}, *(item.model_dump(exclude_none=True) for item in first.output),
               *asked]
    again = client.responses.create(model="scripted", input=by_hand, temperature=0, tools=FLAT_TOOLS)
    assert again.usage.input_tokens == second.usage.input_tokens
    assert call.name == "get_weather"


def test_going_on_changes_nothing_that_is_kept(client: openai.OpenAI) -> None:
    """A call that the client adds is one of its own request."""
    first = ask(client, "text")
    call = {"type": "function_call", "call_id": "a", "name": "ping", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "a", "output": "x"}
    counts = {ask(client, "text", previous_response_id=first.id, input=[call, result],
                  max_output_tokens=1).usage.input_tokens for _ in range(3)}
    assert len(counts) == 1


def test_kept_shown_and_deleted(client: openai.OpenAI, scripted: ServerProcess) -> None:
    response = ask(client, "text", metadata={"a": "b"})
    assert client.responses.retrieve(response.id).output_text == response.output_text
    assert client.responses.retrieve(response.id).metadata == {"a": "b"}
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key=KEYS[1], max_retries=0) as other:
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.create(model="scripted", previous_response_id=response.id, input="x")
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    unstored = ask(client, "text", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_cut_by_length(client: openai.OpenAI) -> None:
    response = ask(client, "thinks", max_output_tokens=4)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert list(ask(client, "text", max_output_tokens=2, stream=True))[-1].type == "response.incomplete"


def test_a_prescribed_form(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    response = ask(client, "text", text={"format": {"type": "json_schema", "name": "x", "schema": schema}})
    assert json.loads(response.output_text)["a"] in (1, 2)


@pytest.mark.parametrize(("wish", "field"), [
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
    ({"background": True}, "background"),
    ({"tools": [{"type": "web_search"}]}, "tools"), ({"truncation": "auto"}, "truncation"), ({"input": []}, "input"),
    ({"unknown": 1}, "unknown"),
])
def test_what_is_not_built_is_named(scripted: ServerProcess, wish: dict, field: str) -> None:
    answer = scripted.http.post("/v1/responses", json={"input": "x", **wish})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


TEXT = {"type": "input_text", "text": "x"}
CALL = {"type": "function_call", "call_id": "a", "name": "ping", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "x"}
THOUGHT = {"type": "reasoning", "id": "r", "summary": []}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}


def said(**item: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "x"}, item]}


@pytest.mark.parametrize(("wish", "says"), [
    (said(role="user", content="x", mood=1), "input.1.mood"),
    (said(role="user", content=[{**TEXT, "mood": 1}]), "input.1.content.0.mood"),
    (said(role="assistant", content=[{"type": "refusal", "refusal": "x"}]), "input.1.content.0"),
    (said(role="user", content=1), "input.1.content"), (said(role="user", content=[1]), "input.1.content.0"),
    (said(**CALL, mood=1), "input.1.mood"), (said(**CALL, namespace="x"), "input.1.namespace"),
    (said(**CALL, caller={"type": "program", "caller_id": "x"}), "input.1.caller"),
    (said(**OUTPUT, mood=1), "input.1.mood"),
    (said(**OUTPUT | {"output": [{"type": "input_image"}]}), "input.1.output.0"),
    (said(**THOUGHT, encrypted_content="sealed"), "input.1.encrypted_content"),
    (said(**THOUGHT, content=[{"type": "output_text", "text": "x"}]), "input.1.content"),
    (said(**THOUGHT | {"summary": [{"type": "summary_text", "text": "x", "mood": 1}]}), "input.1.summary"),
    (said(**THOUGHT, mood=1), "input.1.mood"), (said(type="compaction"), "'compaction'"),
    ({"tools": [{**TOOL, "mood": 1}]}, "tools.0.mood"), ({"tools": [{**TOOL, "defer_loading": True}]}, "defer_loading"),
    ({"tools": [{**TOOL, "allowed_callers": ["programmatic"]}]}, "tools.0.allowed_callers"),
    ({"tools": [{**TOOL, "output_schema": {"type": "string"}}]}, "tools.0.output_schema"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0: tools of type 'custom'"),
    ({"tools": [{"type": "web_search", "external_web_access": True}]}, "tools.0: tools of type 'web_search'"),
    ({"tools": [TOOL], "tool_choice": {"type": "custom", "name": "f"}}, "'custom'"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f", "mood": 1}}, "tool_choice.mood"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "'web_search'"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}}, "'mcp'"),
    ({"text": {"format": {"type": "text", "mood": 1}}}, "text.format.mood"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "mood": 1}}}, "text.format.mood"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema must be"),
    ({"text": {"format": {"type": "json_schema", "name": 1, "schema": {}}}}, "text.format.name must be"),
    ({"text": {"format": {"type": "json_schema", "description": 1, "schema": {}}}}, "text.format.description must be"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format: "),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name must be"),
    ({"tools": [{**TOOL, "parameters": 1}]}, "tools.0.parameters must be"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "x", "tools": []}}, "tool_choice must be"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"mood": 1}}, "stream_options.mood"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options needs stream"),
    ({"prompt": {"id": "x"}}, "prompt"), ({"conversation": "x"}, "conversation"), ({"moderation": {}}, "moderation"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"), ({"image": {}}, "image"),
    ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
    ({"access_programs": {}}, "access_programs"),
    ({"max_output_tokens": 0}, "max_output_tokens"), ({"max_output_tokens": 10**6}, "max_output_tokens"),
])
def test_refused_by_name(scripted: ServerProcess, wish: dict[str, Any], says: str) -> None:
    answer = scripted.http.post("/v1/responses", json={"input": "x", **wish})
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    wish: dict[str, Any] = {
        "max_tool_calls": 3, "service_tier": "auto", "safety_identifier": "x", "truncation": "disabled",
        "background": False, "include": ["reasoning.encrypted_content"], "prompt_cache_retention": "24h",
        "extra_body": {"client_metadata": {"a": "b"}, "conversation": None, "context_management": []},
        "tools": [{**tool, "defer_loading": False, "allowed_callers": ["direct"]} for tool in FLAT_TOOLS]}
    response = ask(client, "text", **wish)
    assert response.output_text == SCRIPTS["text"] and response.max_tool_calls == 3
    part = {"type": "output_text", "text": "So.", "annotations": [], "logprobs": []}
    marked = [{"type": "message", "role": "assistant", "id": "m", "status": "completed", "phase": "commentary",
               "content": [part]}, {"role": "user", "content": [{"type": "input_text", "text": go("text")}]}]
    assert ask(client, "text", input=marked).output_text == SCRIPTS["text"]


def test_what_a_chat_has_too_reaches_it() -> None:
    """Under its own name or another one: everything that a chat does the same way."""
    alike = {"model": "m", "stream": True, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 1,
             "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "min_tokens": 2,
             "ignore_eos": True, "parallel_tool_calls": False, "chat_template_kwargs": {"a": 1}, "priority": 3,
             "cache_salt": "s", "prompt_cache_key": "k", "timeout_s": 9.0}
    renamed = {"max_output_tokens": ("max_tokens", 7), "reasoning": ("reasoning_effort", "low"),
               "text": ("verbosity", "high")}
    body = parse({"input": "x", **alike, "max_output_tokens": 7, "reasoning": {"effort": "low"},
                  "text": {"verbosity": "high"}}, ResponsesBody)
    chat = chat_body(body, ChatConversation.of(body, []))
    expected = alike | dict(renamed.values())
    assert {name: getattr(chat, name) for name in expected} == expected


def test_logprobs_are_those_of_a_chat(client: openai.OpenAI) -> None:
    """Of the text's tokens, with as many alternatives as asked for; of thinking and calls there are none."""
    include: Any = ["message.output_text.logprobs"]
    said = ask(client, "text", include=include, top_logprobs=3).output[0].content[0]
    chat = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": go("text")}],
                                          temperature=0, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    shown, expected = ([entry.model_dump() for entry in entries] for entries in (said.logprobs, chat))
    assert shown == expected[:len(shown)]
    assert b"".join(bytes(entry.bytes) for entry in said.logprobs).decode() == said.text
    assert all(len(entry.top_logprobs) == 3 for entry in said.logprobs)
    for script in ("thinks", "calls"):
        [message] = [item for item in ask(client, script, include=include, tools=FLAT_TOOLS).output
                     if item.type == "message"]
        text = b"".join(bytes(entry.bytes) for entry in message.content[0].logprobs).decode()
        assert message.content[0].text.strip() in text
        assert "let me see" not in text and "get_weather" not in text
    assert ask(client, "text").output[0].content[0].logprobs == []


def test_logprobs_of_a_piece_that_holds_more_than_text() -> None:
    """Several tokens at once: the text has those that cover it, at the side where it stands."""
    entries = [{"token": token, "bytes": list(token.encode())} for token in ("é", "</think>", "Just", " this")]
    assert _covering(entries, "Just this", from_end=True) == entries[2:]
    assert _covering(entries, "ust this", from_end=True) == entries[2:]
    assert _covering(entries, "é", from_end=False) == entries[:1]
    assert _covering(entries, "", from_end=True) == _covering(entries, "", from_end=False) == []


def test_thoughts_are_given_back_to_templates_that_want_them(tmp_path: Path) -> None:
    template = ("{%- for m in messages %}{{ '<|' + m.role + '|>' }}{%- if m.reasoning_content %}"
                "{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif %}{{ m.content }}"
                "{%- for c in m.tool_calls or [] %}{{ c.function.name }}{%- endfor %}{%- endfor %}")
    folder = write_checkpoint(tmp_path / "model", {"a": "Yes."}, template)
    thought = {**THOUGHT, "content": [{"type": "reasoning_text", "text": "Hm."}]}
    summed = {**THOUGHT, "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": None}
    with ServerProcess(tmp_path / "log.txt", str(folder), "--tool-call-parser", "hermes") as server:
        def num_tokens(*items: dict[str, Any]) -> int:
            answer = server.http.post("/v1/responses", json={"input": [*items, {"role": "user", "content": "x"}],
                                                             "max_output_tokens": 1})
            assert answer.status_code == 200, answer.text
            return answer.json()["usage"]["input_tokens"]

        said = {"role": "assistant", "content": "So."}
        for answer in (said, CALL):
            extra = len("<think>Hm.</think>")
            assert num_tokens(thought, answer) == num_tokens(summed, answer) == num_tokens(answer) + extra
        assert num_tokens(thought) == num_tokens() + len("<|assistant|><think>Hm.</think>")


def test_the_store_is_bounded() -> None:
    store = ResponseStore(max_entries=3, max_chars=400)
    for i in range(5):
        store.put({"id": str(i), "text": "x" * 20}, [], "me")
    assert len(store) == 3 and store.get("1", "me") is None and store.get("2", "me") is not None
    assert store.get("2", "you") is None and not store.delete("2", "you")
    store.put({"id": "large", "text": "x" * 300}, [], "me")
    assert store.num_chars <= 400 and store.get("large", "me") is not None
    store.put({"id": "huge", "text": "x" * 500}, [], "me")
    assert store.get("huge", "me") is None and store.get("large", "me") is not None
    assert store.delete("large", "me") and store.num_chars >= 0


def test_nobody_pushes_out_what_another_keeps() -> None:
    store = ResponseStore(max_entries=10, max_chars=10_000)
    store.put({"id": "hers"}, [], "alice")
    for i in range(50):
        store.put({"id": str(i)}, [], "mallory")
    assert len(store) == 10 and store.get("hers", "alice") is not None
    for i in range(50):
        store.put({"id": f"long-{i}", "text": "x" * 2000}, [], "mallory")
    assert store.num_chars <= 10_000 and store.get("hers", "alice") is not None
    store.put({"id": "0"}, [], "alice")  # the same name is another entry for another owner
    store.put({"id": "long-49"}, [], "alice")
    assert store.delete("long-49", "alice") and store.get("long-49", "mallory") is not None
