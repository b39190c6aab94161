"""Every stream of every API, read by the SDK that it is made for: what its events add up to is the answer that comes
without a stream, piece by piece (llama-cpp-python#2285)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from tests.serving.recorded_tools import SCRIPTS, TEMPLATE, TOOLS
from tests.serving.scripted_model import go, write_checkpoint
from tests.serving.server_process import ServerProcess

LONG = " ".join(f"word{number}" for number in range(700))
FLAT_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]
CLIENT_TOOLS = [{"name": tool["function"]["name"], "input_schema": tool["function"].get("parameters") or {
    "type": "object"}} for tool in TOOLS]
UNIQUE = ("id", "created", "created_at", "completed_at", "call_id", "parsed", "parsed_arguments")
ANSWERS = ("text", "thinks", "calls", "thinks-then-calls")
LENGTHS = (1, 2, 5, 9, 14, 20, 27, 300)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_checkpoint(tmp_path_factory.mktemp("scripted"), {**SCRIPTS, "long": LONG}, TEMPLATE)
    with ServerProcess(folder / "log.txt", str(folder), "--served-model-name", "scripted", "--max-model-len",
                       "4096", "--no-enable-prefix-caching") as server:  # what is cached differs from call to call
        yield server
        server.wait_idle()


@pytest.fixture
def client(scripted: ServerProcess) -> Iterator[openai.OpenAI]:
    with scripted.client() as opened:
        yield opened


@pytest.fixture
def claude(scripted: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=scripted.url, api_key="x", max_retries=0, timeout=60) as opened:
        yield opened


def plain(value: Any) -> Any:
    """Without what differs from call to call, and without members that are null or left out."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if name not in UNIQUE and item is not None}
    return value


def dumped(message: Any) -> Any:
    return plain(message.model_dump())


@pytest.mark.parametrize("wish", [{}, {"n": 3}, {"logprobs": 2}, {"stop": "text", "echo": True}], ids=str)
@pytest.mark.parametrize("length", [1, 3, 300])
def test_completions(client: openai.OpenAI, wish: dict[str, Any], length: int) -> None:
    asked = {"model": "scripted", "prompt": go("text"), "temperature": 0, "max_tokens": length, **wish}
    whole = client.completions.create(**asked)
    texts = [""] * len(whole.choices)
    reasons: list[Any] = [None] * len(whole.choices)
    tokens: list[list[str]] = [[] for _ in whole.choices]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens if choice.logprobs else [] for choice in whole.choices]


@pytest.mark.parametrize("wish", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"parallel_tool_calls": False},
                                  {"tool_choice": "required"}], ids=str)
@pytest.mark.parametrize("script", ANSWERS)
def test_chat(client: openai.OpenAI, script: str, wish: dict[str, Any]) -> None:
    for length in LENGTHS if not wish else (14, 300):
        asked = {"model": "scripted", "messages": [{"role": "user", "content": go(script)}], "temperature": 0,
                 "tools": TOOLS, "max_tokens": length, **wish}
        whole = client.chat.completions.create(**asked)
        state: ChatCompletionStreamState = ChatCompletionStreamState()
        for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            state.handle_chunk(chunk)
        final, expected = dumped(state.current_completion_snapshot), dumped(whole)
        for choice in (*final["choices"], *expected["choices"]):
            choice["message"] = {"content": "", **choice["message"]}  # nothing said: null, or a text of no length
            for call in choice["message"].get("tool_calls", ()):
                call.pop("index", None)
        assert {**final, "object": 0} == {**expected, "object": 0}, length


@pytest.mark.parametrize("wish", [{}, {"parallel_tool_calls": False}, {"tool_choice": "required"},
                                  {"include": ["message.output_text.logprobs"], "top_logprobs": 2}], ids=str)
@pytest.mark.parametrize("script", ANSWERS)
def test_responses(client: openai.OpenAI, script: str, wish: dict[str, Any]) -> None:
    for length in LENGTHS if not wish else (14, 300):
        asked = {"model": "scripted", "input": go(script), "temperature": 0, "tools": FLAT_TOOLS,
                 "max_output_tokens": length, **wish}
        whole = client.responses.create(**asked)
        items: dict[int, dict[str, Any]] = {}
        snapshots: dict[int, str] = {}
        with client.responses.stream(**{**asked, "tools": [{**tool, "strict": None} for tool in FLAT_TOOLS]}) as stream:
            for event in stream:
                _add(items, event)
                if event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
                    snapshots[event.output_index] = event.snapshot
                elif event.type in ("response.output_text.done", "response.function_call_arguments.done"):
                    said = event.text if event.type == "response.output_text.done" else event.arguments
                    assert snapshots.get(event.output_index, "") == said
                final = event.response if hasattr(event, "response") else None
        assert final is not None
        assert [plain(items[index]) for index in range(len(items))] == dumped(final)["output"]
        without_tools = [{**dumped(response), "tools": 0} for response in (final, whole)]
        assert without_tools[0] == without_tools[1], length


def _add(items: dict[int, dict[str, Any]], event: Any) -> None:
    """What a client knows that keeps nothing but events; `done` events must say what the others added up to."""
    kind = event.type.removeprefix("response.")
    if kind == "output_item.added":
        items[event.output_index] = {**event.item.model_dump(), "status": None}
    elif kind == "content_part.added":
        items[event.output_index]["content"].append(event.part.model_dump())
    elif kind in ("output_text.delta", "reasoning_text.delta"):
        part = items[event.output_index]["content"][event.content_index]
        part["text"] += event.delta
        if kind == "output_text.delta":
            part["logprobs"] += [entry.model_dump() for entry in event.logprobs]
    elif kind == "function_call_arguments.delta":
        items[event.output_index]["arguments"] += event.delta
    elif kind == "content_part.done":
        assert items[event.output_index]["content"][event.content_index] == event.part.model_dump()
    elif kind == "output_item.done":
        items[event.output_index]["status"] = event.item.status
        assert plain(items[event.output_index]) == plain(event.item.model_dump())


@pytest.mark.parametrize("wish", [{}, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
                                  {"tool_choice": {"type": "any"}},
                                  {"thinking": {"type": "adaptive", "display": "omitted"}},
                                  {"stop_sequences": ["answer", "text"]}], ids=str)
@pytest.mark.parametrize("script", ANSWERS)
def test_messages(claude: anthropic.Anthropic, script: str, wish: dict[str, Any]) -> None:
    for length in LENGTHS if not wish else (14, 300):
        asked: dict[str, Any] = {
            "model": "scripted", "max_tokens": length, "tools": CLIENT_TOOLS, **wish, "extra_body": {"temperature": 0},
            "messages": [{"role": "user", "content": go(script)}]}
        whole = claude.messages.create(**asked)
        with claude.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        assert dumped(final) == dumped(whole), length


def test_errors_midway(client: openai.OpenAI, claude: anthropic.Anthropic, scripted: ServerProcess) -> None:
    """The text that came is there, and the SDK says that the rest is not."""
    prompt, wish = go("long"), {"extra_body": {"timeout_s": 0.25, "temperature": 0}}
    with pytest.raises(openai.APIError, match="time"):
        _read(client.completions.create(model="scripted", prompt=prompt, max_tokens=3000, stream=True, **wish))
    messages: Any = [{"role": "user", "content": prompt}]
    with pytest.raises(openai.APIError, match="time"):
        _read(client.chat.completions.create(model="scripted", messages=messages, stream=True, **wish))
    events = list(client.responses.create(model="scripted", input=prompt, stream=True, **wish))
    assert events[-1].type == "response.failed"
    assert "time" in events[-1].response.error.message
    assert any(event.type == "response.output_text.delta" for event in events)


def _read(stream: Any) -> None:
    num_chunks = 0
    try:
        for _ in stream:
            num_chunks += 1
    finally:
        assert num_chunks > 2


def test_messages_errors_midway(tmp_path: Any) -> None:
    folder = write_checkpoint(tmp_path / "model", {"long": LONG}, TEMPLATE)
    flags = ("--max-model-len", "4096", "--request-timeout", "0.25")
    with ServerProcess(tmp_path / "log.txt", str(folder), *flags) as server, \
            anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as claude:
        texts = []
        with pytest.raises(anthropic.APIStatusError, match="time"), claude.messages.stream(
                model=server.http.get("/v1/models").json()["data"][0]["id"], max_tokens=3000,
                messages=[{"role": "user", "content": go("long")}], extra_body={"temperature": 0}) as stream:
            texts.extend(stream.text_stream)
        assert LONG.startswith("".join(texts)) and len(texts) > 2
