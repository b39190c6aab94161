"""`POST /v1/responses`, and `GET` and `DELETE /v1/responses/{id}`: OpenAI's Responses API over the chat path."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api.blocks import Block, Blocks, Change, Closed, Opened
from serving.api.chat import ChatCall, begin_chat
from serving.api.errors import ApiError, as_api_error, invalid, json_response
from serving.api.generation import Generation
from serving.api.limits import read_json
from serving.api.sse import EventStream, named, until_disconnect
from serving.api.types import ChatBody, ResponsesBody, parse
from serving.security.caller import CALLER
from serving.state import ServerState

TEXT_PARTS = ("input_text", "output_text", "text")
# Called alike here and in a chat. The second line is not OpenAI's, but load tools send it.
SAMPLING = ("temperature", "top_p", "top_k", "seed",
            "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos")


def conversation(body: ResponsesBody, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a request, behind those of the response that it continues. Raises ApiError."""
    messages = list(before)
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        _add_item(messages, index, item)
    return messages


def _add_item(messages: list[dict[str, Any]], index: int, item: dict[str, Any]) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise invalid(f"input.{index}.role must be user, assistant, system or developer", "input")
        messages.append({"role": "system" if role == "developer" else role,
                         "content": _text_of(item.get("content"), index)})
    elif kind == "function_call":
        call = {"id": str(item.get("call_id", "")), "type": "function", "function": {
            "name": item.get("name"), "arguments": item.get("arguments", "")}}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        output = item.get("output")
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")),
                         "content": _text_of(output, index)})
    elif kind != "reasoning":  # a model's earlier thoughts are not given back to it
        raise invalid(f"input.{index}: items of type {str(kind)[:64]!r} are not supported", "input")


def _text_of(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") in TEXT_PARTS
                                         and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise invalid(f"input.{index}.content: only text is supported", "input")


def chat_body(body: ResponsesBody, messages: list[dict[str, Any]]) -> ChatBody:
    """The same wish as a chat request. Raises ApiError."""
    if body.instructions:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    fields = {
        "model": body.model, "messages": messages, "stream": body.stream, "max_tokens": body.max_output_tokens,
        **{name: getattr(body, name) for name in SAMPLING},
        "tools": _tools(body.tools), "tool_choice": _tool_choice(body.tool_choice) if body.tools else None,
        "parallel_tool_calls": body.parallel_tool_calls, "response_format": _response_format(body.text),
        "chat_template_kwargs": body.chat_template_kwargs, "priority": body.priority, "cache_salt": body.cache_salt,
        "prompt_cache_key": body.prompt_cache_key, "timeout_s": body.timeout_s,
    }
    return parse({name: value for name, value in fields.items() if value is not None}, ChatBody)


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Functions stand flat here and one level deeper in a chat."""
    if not tools:
        return None
    for index, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise invalid(f"tools.{index}: tools of type {str(tool.get('type'))[:64]!r} are not supported; only "
                          "function", "tools")
    return [{"type": "function", "function": {name: value for name, value in tool.items()
                                              if name != "type" and value is not None}} for tool in tools]


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    form = (text or {}).get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: form[name] for name in ("name", "schema", "strict")
                                                   if form.get(name) is not None}}


class ResponsesCall:
    """Writes a chat's answer as a response."""

    def __init__(self, state: ServerState, body: ResponsesBody, call: ChatCall, generation: Generation,
                 messages: list[dict[str, Any]], response_id: str):
        self._state, self._body, self._call, self._generation = state, body, call, generation
        self._messages, self.id = messages, response_id
        self._owner = CALLER.get().name
        self._created, self._number = int(time.time()), 0
        self._blocks = Blocks(parallel=call.tools.parallel)
        self._item_ids: dict[int, str] = {}

    # --- the whole

    def response(self, status: str, output: list[dict[str, Any]], *, with_usage: bool) -> dict[str, Any]:
        body = self._body
        cut = status == "incomplete"
        return {
            "id": self.id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "model": self._call.model, "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id, "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False, "temperature": body.temperature, "text": body.text or {
                "format": {"type": "text"}}, "tool_choice": body.tool_choice or "auto", "tools": body.tools or [],
            "top_p": body.top_p, "truncation": "disabled", "metadata": body.metadata or {}, "user": body.user,
            "usage": self._usage() if with_usage else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = self._call.usage(self._generation)
        details = usage.get("completion_tokens_details") or {}
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"],
                "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                                         "cache_write_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)}}

    def finished(self) -> dict[str, Any]:
        """The response at its end, which is kept for later calls unless they said not to."""
        status = "incomplete" if self._generation.choices[0].finish_reason == "length" else "completed"
        response = self.response(status, [self._item(block, status) for block in self._blocks.all], with_usage=True)
        if self._body.store is not False:
            self._state.responses.put(response, [*self._messages, self._answer_message()], self._owner)
        return response

    def _answer_message(self) -> dict[str, Any]:
        blocks = self._blocks.all
        calls = [{"id": b.call_id, "type": "function", "function": {"name": b.name, "arguments": b.text}}
                 for b in blocks if b.kind == "call"]
        message = {"role": "assistant", "content": "".join(b.text for b in blocks if b.kind == "text")}
        return {**message, "tool_calls": calls} if calls else message

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item_id = self._item_ids.setdefault(block.index, f"{_PREFIXES[block.kind]}_{uuid.uuid4().hex}")
        if block.kind == "call":
            return {"type": "function_call", "id": item_id, "call_id": block.call_id, "name": block.name,
                    "arguments": block.text, "status": status}
        if block.kind == "reasoning":
            return {"type": "reasoning", "id": item_id, "summary": [], "content": [_part(block)] if block.text else [],
                    "status": status}
        return {"type": "message", "id": item_id, "role": "assistant", "content": [_part(block)] if block.text else [],
                "status": status}

    async def run(self) -> dict[str, Any]:
        async with self._generation as pieces:
            async for piece in pieces:
                self._blocks.feed(self._call.read(piece))
        self._blocks.end()
        return self.finished()

    # --- as a stream

    def _event(self, kind: str, **content: Any) -> bytes:
        self._number += 1
        return named({"type": f"response.{kind}", "sequence_number": self._number - 1, **content})

    def error_event(self, error: Exception) -> bytes:
        shown = as_api_error(error)
        response = self.response("failed", [], with_usage=False)
        response["error"] = {"code": "server_error", "message": shown.message}
        return self._event("failed", response=response)

    async def events(self) -> AsyncGenerator[bytes, None]:
        begun = self.response("in_progress", [], with_usage=False)
        yield self._event("created", response=begun)
        yield self._event("in_progress", response=begun)
        async with self._generation as pieces:
            async for piece in pieces:
                for change in self._blocks.feed(self._call.read(piece)):
                    for event in self._changed(change):
                        yield event
            for change in self._blocks.end():
                for event in self._changed(change):
                    yield event
            response = self.finished()
            yield self._event(response["status"], response=response)

    def _changed(self, change: Change) -> Iterator[bytes]:
        block = change.block
        place: dict[str, Any] = {"output_index": block.index}
        if isinstance(change, Opened):
            item = self._item(block, "in_progress")
            yield self._event("output_item.added", item=item, **place)
            if block.kind != "call":
                yield self._event("content_part.added", item_id=item["id"], content_index=0, part=_part(block), **place)
            return
        at = {"item_id": self._item_ids[block.index], **place}
        if block.kind != "call":
            at["content_index"] = 0
        if not isinstance(change, Closed):
            yield self._event(f"{_STREAMS[block.kind]}.delta", delta=change.text, **at, **_no_logprobs(block))
            return
        if block.kind == "call":
            yield self._event("function_call_arguments.done", arguments=block.text, name=block.name, **at)
        else:
            yield self._event(f"{_STREAMS[block.kind]}.done", text=block.text, **at, **_no_logprobs(block))
            yield self._event("content_part.done", part=_part(block), **at)
        yield self._event("output_item.done", item=self._item(block, "completed"), **place)


_PREFIXES = {"call": "fc", "reasoning": "rs", "text": "msg"}
_STREAMS = {"call": "function_call_arguments", "reasoning": "reasoning_text", "text": "output_text"}


def _no_logprobs(block: Block) -> dict[str, list[object]]:
    """Events about text have the member; nothing else may."""
    return {"logprobs": []} if block.kind == "text" else {}


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    def not_found(response_id: str) -> ApiError:
        return ApiError(404, f"there is no response {response_id[:128]!r}; the server keeps the latest in memory only",
                        param="response_id")

    @routes.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        state.check_accepting()
        body = parse(await read_json(request, state.config.limits.max_json_depth), ResponsesBody)
        before: list[dict[str, Any]] = []
        if body.previous_response_id is not None:
            stored = state.responses.get(body.previous_response_id, CALLER.get().name)
            if stored is None:
                raise not_found(body.previous_response_id)
            before = stored.messages
        if body.background:
            raise invalid("background is not supported", "background")
        messages = conversation(body, before)
        call, generation = await begin_chat(state, request, chat_body(body, messages), "resp")
        answer = ResponsesCall(state, body, call, generation, messages, f"resp_{uuid.uuid4().hex}")
        if body.stream:
            return EventStream(answer.events(), generation.close, done=b"", show_error=answer.error_event)
        return json_response(await until_disconnect(request.receive, answer.run()))

    @routes.get("/v1/responses/{name}")
    async def get_response(name: str) -> Response:
        stored = state.responses.get(name, CALLER.get().name)
        if stored is None:
            raise not_found(name)
        return json_response(stored.response)

    @routes.delete("/v1/responses/{name}")
    async def delete_response(name: str) -> Response:
        if not state.responses.delete(name, CALLER.get().name):
            raise not_found(name)
        return json_response({"id": name, "object": "response", "deleted": True})

    return routes
