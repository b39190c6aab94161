"""The Messages API through Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from serving.api.messages_input import Chat
from serving.api.types import CountTokensBody, parse
from tests.serving.recorded_tools import SCRIPTS, TEMPLATE, TOOLS
from tests.serving.scripted_model import go, write_checkpoint
from tests.serving.server_process import ServerProcess

KEY = "a-key-of-some-length"
CLIENT_TOOLS = [{"name": tool["function"]["name"], "description": "x",
                 "input_schema": tool["function"].get("parameters") or {"type": "object"}} for tool in TOOLS]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_checkpoint(tmp_path_factory.mktemp("scripted"), SCRIPTS, TEMPLATE)
    with ServerProcess(folder / "log.txt", str(folder), "--served-model-name", "scripted", "--max-model-len", "2048",
                       "--api-key", KEY, key=KEY) as server:
        yield server
        server.wait_idle()


@pytest.fixture
def client(scripted: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=scripted.url, api_key=KEY, max_retries=0, timeout=60) as opened:
        yield opened


def ask(client: anthropic.Anthropic, script: str, **wish: Any) -> Any:
    return client.messages.create(**{"model": "scripted", "max_tokens": 300, "extra_body": {"temperature": 0},
                                     "messages": [{"role": "user", "content": go(script)}], **wish})


def test_text_thinking_and_calls(client: anthropic.Anthropic) -> None:
    text = ask(client, "text")
    assert [block.type for block in text.content] == ["text"] and text.content[0].text == SCRIPTS["text"]
    assert text.stop_reason == "end_turn" and text.usage.output_tokens > 3 and text.id.startswith("msg_")
    thought = ask(client, "thinks")
    assert [block.type for block in thought.content] == ["thinking", "text"]
    assert thought.content[1].text == "The answer is 42."
    calls = ask(client, "calls", tools=CLIENT_TOOLS)
    assert [block.type for block in calls.content] == ["text", "tool_use", "tool_use"]
    assert calls.content[1].input == {"city": "Zürich 😀", "days": 3} and calls.content[2].input == {}
    assert calls.stop_reason == "tool_use"
    one = ask(client, "calls", tools=CLIENT_TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["text", "tool_use"]


@pytest.mark.parametrize(("thinking", "kinds"), [
    ({"type": "adaptive"}, ["thinking", "text"]), ({"type": "enabled", "budget_tokens": 2048}, ["thinking", "text"]),
    ({"type": "adaptive", "display": "summarized"}, ["thinking", "text"]),
    ({"type": "adaptive", "display": "omitted"}, ["text"]), ({"type": "disabled"}, ["text"])])
def test_thinking_that_is_not_wanted_is_left_out(client: anthropic.Anthropic, thinking: Any, kinds: list[str]) -> None:
    """Of a model too that thinks whatever it is told."""
    answer = ask(client, "thinks", thinking=thinking)
    assert [block.type for block in answer.content] == kinds
    assert answer.content[-1].text == "The answer is 42."


def test_ends(client: anthropic.Anthropic) -> None:
    assert ask(client, "text", max_tokens=2).stop_reason == "max_tokens"
    stopped = ask(client, "text", stop_sequences=["</b>"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "</b>")
    assert stopped.content[0].text == "Just <b>text"


@pytest.mark.parametrize("script", ["text", "thinks", "calls", "thinks-then-calls"])
def test_a_stream_tells_what_the_whole_says(client: anthropic.Anthropic, script: str) -> None:
    whole = ask(client, script, tools=CLIENT_TOOLS)
    wish = {"model": "scripted", "max_tokens": 300, "extra_body": {"temperature": 0}, "tools": CLIENT_TOOLS,
            "messages": [{"role": "user", "content": go(script)}]}
    with client.messages.stream(**wish) as stream:
        final = stream.get_final_message()
    without_ids = [[{k: v for k, v in block.model_dump().items() if k != "id"} for block in message.content]
                   for message in (whole, final)]
    assert without_ids[0] == without_ids[1]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    events = [event.type for event in client.messages.create(**wish, stream=True)]
    assert events[0] == "message_start" and events[-2:] == ["message_delta", "message_stop"]
    assert events.count("content_block_start") == events.count("content_block_stop") == len(whole.content)


def test_a_conversation_with_results(client: anthropic.Anthropic) -> None:
    calls = ask(client, "calls", tools=CLIENT_TOOLS)
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]}
               for block in calls.content if block.type == "tool_use"]
    messages = [{"role": "user", "content": go("calls")}, {"role": "assistant", "content": calls.content},
                {"role": "user", "content": [*results, {"type": "text", "text": go("text")}]}]
    answer = ask(client, "text", messages=messages, tools=CLIENT_TOOLS, system=[{"type": "text", "text": "Be brief."}])
    assert answer.content[0].text == SCRIPTS["text"]


def test_forced_calls(client: anthropic.Anthropic) -> None:
    forced = ask(client, "text", tools=CLIENT_TOOLS, tool_choice={"type": "tool", "name": "get_weather"})
    assert [block.type for block in forced.content] == ["tool_use"] and forced.content[0].name == "get_weather"
    assert isinstance(forced.content[0].input, dict) and "city" in forced.content[0].input
    assert ask(client, "text", tools=CLIENT_TOOLS, tool_choice={"type": "any"}).stop_reason == "tool_use"


def test_sampling_reaches_the_engine(server: ServerProcess) -> None:
    """Of the demo model: hot, it never says the same; one candidate is the greedy choice at any temperature."""
    def answer(**wish: Any) -> str:
        found = server.http.post("/v1/messages", json={
            "max_tokens": 24, "messages": [{"role": "user", "content": "Tell me a story."}], **wish})
        assert found.status_code == 200, found.text
        return "".join(block["text"] for block in found.json()["content"])

    greedy = answer(temperature=0)
    assert greedy == answer(temperature=2, top_k=1) == answer(temperature=2, top_p=1e-6)
    assert len({greedy, answer(temperature=2), answer(temperature=2)}) == 3


def test_a_form_of_the_output(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    answer = ask(client, "text", output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(answer.content[0].text)["a"] in (1, 2)


def test_strict_tools_get_arguments_of_their_schema(client: anthropic.Anthropic) -> None:
    strict = [{**tool, "strict": True} for tool in CLIENT_TOOLS[:1]]
    loose, held = (next(block.input for block in ask(client, "wrong", tools=tools).content if block.type == "tool_use")
                   for tools in (CLIENT_TOOLS[:1], strict))
    assert "town" in loose, (loose, held)
    assert set(held) <= {"city", "days"} and isinstance(held["city"], str), held


def counted(scripted: ServerProcess, **body: Any) -> int:
    answer = scripted.http.post("/v1/messages/count_tokens?beta=true", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["input_tokens"]


def test_what_reaches_the_prompt(scripted: ServerProcess) -> None:
    """Systems among the messages, where they stand; a failed result says so; thinking is cleared as told."""
    user = {"role": "user", "content": "Hi"}
    plain = counted(scripted, messages=[user])
    assert counted(scripted, messages=[user, {"role": "system", "content": "Be brief."}]) == plain + len("Be brief.")
    assert counted(scripted, messages=[{"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                                       user]) == plain + len("Be brief.")
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "ping", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "no route"}
    good, bad = (counted(scripted, messages=[user, call, {"role": "user", "content": [{**result, "is_error": failed}]}])
                 for failed in (False, True))
    assert bad == good + len("Error: ")


def test_thinking_is_cleared_as_told() -> None:
    turns = [message for number in range(3) for message in (
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": f"t{number}", "signature": ""},
                                          {"type": "text", "text": "y"}]})]

    def kept(keep: Any) -> list[str]:
        edit = {"type": "clear_thinking_20251015", **({} if keep is None else {"keep": keep})}
        body = parse({"messages": turns, "context_management": {"edits": [edit]}}, CountTokensBody)
        return [message["reasoning_content"] for message in Chat.of(body).messages if "reasoning_content" in message]

    assert kept("all") == kept({"type": "all"}) == ["t0", "t1", "t2"]
    assert kept(None) == kept({"type": "thinking_turns", "value": 1}) == ["t2"]
    assert kept({"type": "thinking_turns", "value": 2}) == ["t1", "t2"]


TEXT = {"type": "text", "text": "x"}
USE = {"type": "tool_use", "id": "a", "name": "ping", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}


def said(role: str, block: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, {"role": role, "content": [block]}]}


@pytest.mark.parametrize(("wish", "says"), [
    (said("user", {**TEXT, "mood": 1}), "messages.1.content.0.mood"),
    (said("user", {**TEXT, "citations": [{"type": "char_location"}]}), "messages.1.content.0.citations"),
    (said("user", {**TEXT, "cache_control": {"type": "forever"}}), "messages.1.content.0.cache_control.type"),
    (said("user", {**TEXT, "cache_control": {"type": "ephemeral", "ttl": "9d"}}), "cache_control.ttl"),
    (said("user", {**RESULT, "mood": 1}), "messages.1.content.0.mood"),
    (said("user", {**RESULT, "is_error": "yes"}), "messages.1.content.0.is_error"),
    (said("user", {**RESULT, "content": [{"type": "image"}]}), "messages.1.content.0.content.0"),
    (said("user", {**RESULT, "toolset_name": "x"}), "messages.1.content.0.toolset_name"),
    (said("user", USE), "'tool_use' is not supported here"), (said("assistant", RESULT), "'tool_result'"),
    (said("assistant", {**USE, "caller": {"type": "code_execution_20250825", "tool_id": "x"}}), "content.0.caller"),
    (said("assistant", {**USE, "input": "x"}), "messages.1.content.0.input"),
    (said("assistant", {**USE, "mood": 1}), "messages.1.content.0.mood"),
    (said("assistant", {"type": "thinking", "thinking": 1}), "messages.1.content.0.thinking"),
    (said("assistant", {"type": "thinking", "thinking": "x", "mood": 1}), "messages.1.content.0.mood"),
    (said("assistant", {"type": "server_tool_use"}), "'server_tool_use'"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood"),
    ({"system": [{**TEXT, "mood": 1}]}, "system.0.mood"),
    ({"tools": [{**TOOL, "mood": 1}]}, "tools.0.mood"), ({"tools": [{**TOOL, "defer_loading": True}]}, "defer_loading"),
    ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "tools.0.allowed_callers"),
    ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools.0.input_examples"),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "mood": 1}}, "tool_choice.mood"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "needs a name"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "mood": 1}}, "thinking.mood"),
    ({"thinking": {"type": "adaptive", "display": "loud"}}, "thinking.display"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"output_config": {"task_budget": {"type": "tokens", "total": 9}}}, "output_config.task_budget"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "output_config.format: "),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type: tools of type 'bash_20250124'"),
    ({"tools": [{**TOOL, "input_schema": 1}]}, "tools.0.input_schema must be"),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name must be"),
    ({"tools": [{**TOOL, "strict": 1}]}, "tools.0.strict must be"),
    ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
    ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {}, "mood": 1}}}, "output_config.format.mood"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits.0"),
    ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": 3}]}}, "edits.0.keep"),
    ({"context_management": {"mood": 1}}, "context_management.mood"),
    ({"cache_control": {"type": "ephemeral", "mood": 1}}, "cache_control.mood"), ({"speed": "fast"}, "speed"),
    ({"container": "x"}, "container"), ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"fallbacks": [{"model": "x"}]}, "fallbacks"), ({"inference_geo": "eu"}, "inference_geo"),
    ({"diagnostics": {"previous_message_id": "x"}}, "diagnostics"), ({"thread": {"id": "x"}}, "thread"),
    ({"compaction": {"type": "auto"}}, "compaction"), ({"workspace_id": "x"}, "workspace_id"), ({"mood": 1}, "mood"),
])
def test_refused_by_name(scripted: ServerProcess, wish: dict[str, Any], says: str) -> None:
    body = {"max_tokens": 4, "messages": [{"role": "user", "content": "x"}], **wish}
    answer = scripted.http.post("/v1/messages", json=body)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(("wish", "says"), [
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"), ({"max_tokens": 4}, "max_tokens"),
    ({"temperature": 1.0}, "temperature"), ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "'bash_20250124'"), ({"container": "x"}, "container"),
])
def test_refused_where_tokens_are_counted(scripted: ServerProcess, wish: dict[str, Any], says: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **wish}
    answer = scripted.http.post("/v1/messages/count_tokens", json=body)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    wish = {"model": "scripted", "messages": [{"role": "user", "content": go("text")}], "system": "Be brief."}
    counted = client.messages.count_tokens(**wish).input_tokens
    usage = client.messages.create(**wish, max_tokens=2).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_have_the_clients_shape(client: anthropic.Anthropic, scripted: ServerProcess) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        ask(client, "text", model="another")
    with pytest.raises(anthropic.BadRequestError, match="only text"):
        ask(client, "text", system=[{"type": "image"}])
    with pytest.raises(anthropic.AuthenticationError), anthropic.Anthropic(
            base_url=scripted.url, api_key="wrong", max_retries=0) as wrong:
        ask(wrong, "text")
    for wish in ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {"max_tokens": 0}, {"top_k": "x"},
                 {"messages": [{"role": "tool", "content": "x"}]}, {"tools": [{"type": "bash_20250124"}]},
                 {"tool_choice": {"type": "x"}, "tools": CLIENT_TOOLS}):
        body = {"max_tokens": 4, "messages": [{"role": "user", "content": "x"}], **wish}
        answer = scripted.http.post("/v1/messages", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == "invalid_request_error"


def test_arguments_that_are_no_json_are_shown(client: anthropic.Anthropic) -> None:
    wrong = ask(client, "wrong", tools=CLIENT_TOOLS)
    assert json.dumps(wrong.content[-1].input)
