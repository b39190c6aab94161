"""Tool calls and reasoning over HTTP, through the real OpenAI client, by a model whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.serving.parsers.templates import ENDLESS
from tests.serving.recorded_tools import SCRIPTS, TEMPLATE, TOOLS
from tests.serving.scripted_model import go, write_checkpoint
from tests.serving.server_process import ServerProcess
from xllm.errors import ConfigError


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_checkpoint(tmp_path_factory.mktemp("scripted"), SCRIPTS, TEMPLATE)
    with ServerProcess(folder / "log.txt", "--model", str(folder), "--served-model-name", "scripted",
                       "--max-model-len", "4096") as server:
        yield server
        server.wait_idle()


def ask(server: ServerProcess, script: str, **wish: Any) -> Any:
    messages = [{"role": "user", "content": go(script)}]
    with server.client() as client:
        return client.chat.completions.create(**{"model": "scripted", "messages": messages, "temperature": 0, **wish})


def stream(server: ServerProcess, script: str, **wish: Any) -> list[ChatCompletionChunk]:
    messages = [{"role": "user", "content": go(script)}]
    with server.client() as client:
        return list(client.chat.completions.create(
            **{"model": "scripted", "messages": messages, "temperature": 0, "stream": True, **wish}))


def put_together(chunks: list[ChatCompletionChunk]) -> tuple[str, str, list[tuple[str, str]], str | None]:
    """(content, reasoning, (name, arguments) of calls, finish reason), checking what clients rely on."""
    content, reasoning, calls, finish = "", "", [], None
    ids = set()
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for piece in choice.delta.tool_calls or ():
            if piece.id is not None:  # the first of a call: id, type and name, which never come again
                assert piece.index == len(calls)
                assert piece.type == "function"
                assert piece.id not in ids
                ids.add(piece.id)
                calls.append((piece.function.name, ""))
            else:
                assert piece.function.name is None
                assert piece.type is None
            name, arguments = calls[piece.index]
            calls[piece.index] = name, arguments + piece.function.arguments
        assert finish is None
        finish = choice.finish_reason
    return content, reasoning, calls, finish


EXPECTED = {  # script -> content, reasoning, calls, finish reason
    "calls": ("Let me look – one moment.\n", "",
              [("get_weather", {"city": "Zürich 😀", "days": 3}), ("ping", {})], "tool_calls"),
    "thinks": ("The answer is 42.", "Hm … \n</tool_call> 机器, let me see.", [], "stop"),
    "thinks-then-calls": (None, "I need the weather.", [("get_weather", {"city": "Bern"})], "tool_calls"),
    "text": ("Just <b>text</b>, no <tool.", "", [], "stop"),
}


@pytest.mark.parametrize("script", EXPECTED)
def test_streamed_and_whole_agree(scripted: ServerProcess, script: str) -> None:
    content, reasoning, calls, finish = EXPECTED[script]
    answer = ask(scripted, script, tools=TOOLS)
    message = answer.choices[0].message
    assert message.content == content
    assert (getattr(message, "reasoning_content", None) or "") == reasoning
    assert [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()] == calls
    assert answer.choices[0].finish_reason == finish
    chunks = stream(scripted, script, tools=TOOLS)
    shown = put_together(chunks)
    assert shown[:2] == (content or "", reasoning)
    assert shown[2] == [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
    assert shown[3] == finish
    assert len(chunks) > 4


def test_the_client_s_own_accumulation(scripted: ServerProcess) -> None:
    messages = [{"role": "user", "content": go("calls")}]
    with scripted.client() as client, client.chat.completions.stream(
            model="scripted", messages=messages, temperature=0, tools=TOOLS) as events:
        kinds = [event.type for event in events]
        final = events.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 2
    calls = final.choices[0].message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Zürich 😀", "days": 3}, {}]


def test_arguments_come_piece_by_piece(scripted: ServerProcess) -> None:
    pieces = [p for chunk in stream(scripted, "calls", tools=TOOLS) for p in chunk.choices[0].delta.tool_calls or ()
              if p.index == 0]
    assert len(pieces) > 4


def test_the_whole_loop_of_an_agent(scripted: ServerProcess) -> None:
    """Call, result, next answer: the messages that came from the server go back to it as they are."""
    first = ask(scripted, "calls", tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in first.tool_calls]
    messages = [{"role": "user", "content": "weather?"}, first, *results, {"role": "user", "content": go("text")}]
    with scripted.client() as client:
        answer = client.chat.completions.create(model="scripted", messages=messages, temperature=0, tools=TOOLS)
    assert answer.choices[0].message.content == EXPECTED["text"][0]
    plain = [message if isinstance(message, dict) else message.model_dump(exclude_none=True) for message in messages]
    text = scripted.http.post("/tokenize", json={"messages": plain, "tools": TOOLS}).json()
    prompt = scripted.http.post("/detokenize", json={"tokens": text["tokens"]}).json()["prompt"]
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich 😀", "days": 3}}</tool_call>' in prompt
    assert prompt.count("<tool_response>sunny</tool_response>") == 2
    assert '"description": "Weather, by city"' in prompt


def test_parallel_tool_calls_off(scripted: ServerProcess) -> None:
    answer = ask(scripted, "calls", tools=TOOLS, parallel_tool_calls=False)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]
    calls = put_together(stream(scripted, "calls", tools=TOOLS, parallel_tool_calls=False))[2]
    assert [name for name, _ in calls] == ["get_weather"]


def test_tool_choice_none_shows_the_model_no_tools(scripted: ServerProcess) -> None:
    answer = ask(scripted, "calls", tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == SCRIPTS["calls"]
    assert answer.usage.prompt_tokens == ask(scripted, "calls").usage.prompt_tokens


def test_reasoning_can_be_left_out(scripted: ServerProcess) -> None:
    wish = {"extra_body": {"include_reasoning": False}}
    message = ask(scripted, "thinks", **wish).choices[0].message
    assert not hasattr(message, "reasoning_content")
    assert message.content == EXPECTED["thinks"][0]
    content, reasoning, _, _ = put_together(stream(scripted, "thinks", **wish))
    assert (content, reasoning) == (EXPECTED["thinks"][0], "")


def test_cut_off_in_a_call(scripted: ServerProcess) -> None:
    answer = ask(scripted, "calls", tools=TOOLS, max_tokens=24)
    assert answer.choices[0].finish_reason == "length"
    whole = put_together(stream(scripted, "calls", tools=TOOLS, max_tokens=24))
    calls = answer.choices[0].message.tool_calls
    assert whole[2] == [(call.function.name, call.function.arguments) for call in calls]
    assert whole[3] == "length"


def test_n_choices_have_their_own_calls(scripted: ServerProcess) -> None:
    answer = ask(scripted, "calls", tools=TOOLS, n=3)
    ids = {call.id for choice in answer.choices for call in choice.message.tool_calls}
    assert len(ids) == 6
    assert {choice.finish_reason for choice in answer.choices} == {"tool_calls"}


def test_logprobs_go_with_the_deltas(scripted: ServerProcess) -> None:
    whole = ask(scripted, "calls", tools=TOOLS, logprobs=True).choices[0]
    chunks = stream(scripted, "calls", tools=TOOLS, logprobs=True)
    tokens = [entry.token for chunk in chunks if chunk.choices[0].logprobs for entry in
              chunk.choices[0].logprobs.content]
    assert tokens == [entry.token for entry in whole.logprobs.content]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_required_and_named(scripted: ServerProcess, streamed: bool) -> None:
    """The model would write text; what it may write leaves it no choice."""
    for choice, names in (("required", {"get_weather", "ping", "find"}),
                          ({"type": "function", "function": {"name": "find"}}, {"find"})):
        wish = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400}
        if streamed:
            content, _, calls, finish = put_together(stream(scripted, "text", **wish))
        else:
            message, finish = (answer := ask(scripted, "text", **wish).choices[0]).message, answer.finish_reason
            content, calls = message.content or "", [(c.function.name, c.function.arguments)
                                                     for c in message.tool_calls]
        assert finish == "tool_calls"
        assert content == ""
        assert calls
        assert {name for name, _ in calls} <= names
        for name, arguments in calls:
            check_arguments(name, json.loads(arguments))


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    if name == "get_weather":
        assert isinstance(arguments["city"], str)
    elif name == "find":
        assert arguments["kind"] in ("a", "b")
    else:
        assert arguments == {}


def test_strict_functions_bind_the_model(scripted: ServerProcess) -> None:
    """Left to itself it writes arguments that its function does not have."""
    free = ask(scripted, "wrong", tools=TOOLS[:1]).choices[0].message
    assert json.loads(free.tool_calls[0].function.arguments) == {"town": [1], "city": False, "days": 99, "x": {}}
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS[:1]]
    bound = ask(scripted, "wrong", tools=tools, max_tokens=300).choices[0].message
    assert bound.content.startswith("I ask.\n")
    arguments = json.loads(bound.tool_calls[0].function.arguments)
    assert set(arguments) <= {"city", "days"}
    assert isinstance(arguments["city"], str)
    assert ask(scripted, "text", tools=tools).choices[0].message.content == EXPECTED["text"][0]


def test_what_the_prompt_opens_is_thought_through_before_a_form(scripted: ServerProcess) -> None:
    free = ask(scripted, "opened<think>")
    assert free.choices[0].message.reasoning_content == "Let me think {of} it."
    assert free.choices[0].message.content == "Just this."
    for wish in ({"tools": TOOLS, "tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
        answer = ask(scripted, "opened<think>", max_tokens=300, **wish)
        message = answer.choices[0].message
        assert message.reasoning_content == "Let me think {of} it."
        if "tools" in wish:
            assert message.tool_calls
            assert message.content is None
        else:
            assert isinstance(json.loads(message.content), dict)


def test_reasoning_tokens_are_counted(scripted: ServerProcess) -> None:
    usage = ask(scripted, "thinks").usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert ask(scripted, "text").usage.completion_tokens_details is None
    chunks = stream(scripted, "thinks", stream_options={"include_usage": True})
    assert chunks[-1].usage.completion_tokens_details == usage.completion_tokens_details


@pytest.mark.parametrize(("wish", "param", "says"), [
    ({"tools": [{"type": "web_search"}]}, "tools", "only function"),
    ({"tools": [{"type": "function"}]}, "tools", "function must be"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}] * 2}, "tools", "same name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools", "schema"),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "must be"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice", "no tool"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "must be"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "forces"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}],
      "tool_choice": "required"}, "tools", ""),
    ({"tools": [{}] * 513}, "tools", "at most"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages", "only assistant"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages", "function"),
    ({"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "messages", "list"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}]}, "messages",
     "arguments"),
    ({"chat_template": "{{ messages }}"}, "chat_template", "--trust-request-chat-template"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "may not set"),
    ({"chat_template_kwargs": {"x": "a" * 20_000}}, "chat_template_kwargs", "characters"),
    ({"chat_template_kwargs": {f"x{n}": 1 for n in range(40)}}, "chat_template_kwargs", "32 entries"),
], ids=range(20))
def test_what_is_refused(scripted: ServerProcess, wish: dict[str, Any], param: str, says: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **wish}
    response = scripted.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert says in response.json()["error"]["message"]


def test_unknown_format_is_said_and_forcing_still_works(server: ServerProcess) -> None:
    """The demo model's template knows no tools."""
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "max_tokens": 200, "temperature": 0}
    refused = server.http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "--tool-call-parser" in refused.json()["error"]["message"]
    named = {"type": "function", "function": {"name": "find"}}
    answer = server.http.post("/v1/chat/completions", json={**body, "tool_choice": named}).json()
    [call] = answer["choices"][0]["message"]["tool_calls"]
    check_arguments("find", json.loads(call["function"]["arguments"]))


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_all_that_the_model_sees(scripted: ServerProcess, mode: str) -> None:
    def answer(path: str, **body: Any) -> Any:
        found = scripted.http.post(path, json={"temperature": 0, **body})
        assert found.status_code == 200, found.text
        return found.json()

    ask_for = {"messages": [{"role": "user", "content": go("calls")}], "max_tokens": 200}
    allowed = [{"type": "function", "function": {"name": "ping"}}]
    choice: dict[str, Any] = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
    chosen = answer("/v1/chat/completions", **ask_for, tools=TOOLS, tool_choice=choice)
    alone = answer("/v1/chat/completions", **ask_for, tools=[TOOLS[1]], tool_choice=mode)
    assert chosen["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    if mode == "required":
        assert {call["function"]["name"] for call in chosen["choices"][0]["message"]["tool_calls"]} == {"ping"}
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "ping"}]}
    response = answer("/v1/responses", input=go("calls"), max_output_tokens=200, tools=flat, tool_choice=choice)
    assert response["usage"]["input_tokens"] == alone["usage"]["prompt_tokens"]


FUNCTION = {"name": "f", "parameters": {"type": "object"}}


@pytest.mark.parametrize(("wish", "says"), [
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0: tools of type 'custom'"),
    ({"tools": [{"type": "function", "function": FUNCTION, "mood": 1}]}, "tools.0.mood"),
    ({"tools": [{"type": "function", "function": {**FUNCTION, "mood": 1}}]}, "tools.0.function.mood"),
    ({"tools": [{"type": "function", "function": {**FUNCTION, "strict": "yes"}}]}, "tools.0.function.strict"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f", "mood": 1}}}, "tool_choice.function.mood"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}, "mood": 1}}, "tool_choice.mood"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}}},
     "allowed_tools must be"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "g"}}]}}}, "no tool 'g'"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "custom"}]}}},
     "allowed_tools.tools.0"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "mood": 1, "tools": [
        {"type": "function", "function": {"name": "f"}}]}}}, "allowed_tools.mood"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"mood": 1}}, "stream_options.mood"),
])
def test_members_of_tools_and_choices(scripted: ServerProcess, wish: dict[str, Any], says: str) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, **wish}
    answer = scripted.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_unknown_parser_name_is_refused_at_once() -> None:
    from serving.config import ChatSettings, ServerConfig

    for setting in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match=rf"{setting}.*'nope'.*auto, none, .*glm45"):
            ServerConfig(chat=ChatSettings(**{setting: "nope"}))


def test_special_markers_named_parser_and_own_template(tmp_path: Path) -> None:
    """Markers that are special tokens, a parser by flag, a template and its variables from the request."""
    scripts = {"v13": '[TOOL_CALLS]ping[CALL_ID]abcdefghi[ARGS]{"x": "y"}'}
    folder = write_checkpoint(tmp_path / "model", scripts, "{{ messages[-1].content }}",
                              special=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"))
    with ServerProcess(tmp_path / "log.txt", "--model", str(folder), "--served-model-name", "scripted",
                       "--tool-call-parser", "mistral", "--trust-request-chat-template", "--chat-template-timeout",
                       "0.5") as server:
        message = ask(server, "v13", tools=TOOLS).choices[0].message
        assert [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls] == [
            ("abcdefghi", "ping", '{"x": "y"}')]
        assert ask(server, "v13").choices[0].message.content == 'pingabcdefghi{"x": "y"}'  # nobody asked for calls
        body = {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ messages[0].content * n }}",
                "chat_template_kwargs": {"n": 5}}
        tokens = server.http.post("/tokenize", json=body).json()["tokens"]
        assert server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "xxxxx"
        endless = {"messages": body["messages"], "chat_template": ENDLESS}
        refused = server.http.post("/tokenize", json=endless)
        assert refused.status_code == 400
        assert "seconds" in refused.json()["error"]["message"]
        assert server.health().status_code == 200


def test_openai_client_parses_pydantic_tools(scripted: ServerProcess) -> None:
    """What `client.chat.completions.parse` sends: strict tools, and it reads the arguments into the model."""
    from pydantic import BaseModel

    class Find(BaseModel):
        kind: str
        names: list[str]

    tool = openai.pydantic_function_tool(Find, name="find")
    with scripted.client() as client:
        answer = client.chat.completions.parse(
            model="scripted", messages=[{"role": "user", "content": go("text")}], temperature=0, tools=[tool],
            tool_choice="required", max_tokens=400, parallel_tool_calls=False)
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Find)
