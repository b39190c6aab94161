"""The Messages API through Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

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
