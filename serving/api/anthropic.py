"""`POST /v1/messages` and `/v1/messages/count_tokens`: the Messages API of Anthropic's clients, over the chat path."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api.blocks import Block, Blocks, Change, Closed, Grew, Opened
from serving.api.chat import ChatCall, begin_chat, prepare_chat
from serving.api.errors import ApiError, as_api_error, invalid, json_response
from serving.api.generation import Generation
from serving.api.limits import read_json
from serving.api.sse import ClientGone, EventStream, named, until_disconnect
from serving.api.types import ChatBody, CountTokensBody, MessagesBody, parse
from serving.state import ServerState
from xllm.client.assemble import Piece

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
               413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(body: MessagesBody | CountTokensBody) -> ChatBody:
    """The same wish as a chat request. Raises ApiError."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text_of(body.system, "system")})
    for index, message in enumerate(body.messages):
        messages += _messages(index, message.role, message.content)
    choice = body.tool_choice or {}
    fields: dict[str, Any] = {"messages": messages, "model": body.model, "tools": _tools(body.tools),
                              "tool_choice": _tool_choice(choice) if body.tools else None,
                              "parallel_tool_calls": not choice.get("disable_parallel_tool_use", False)}
    if isinstance(body, MessagesBody):
        fields |= {"max_tokens": body.max_tokens, "temperature": body.temperature, "top_p": body.top_p,
                   "top_k": body.top_k, "stop": body.stop_sequences or None, "stream": body.stream}
    if body.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": body.thinking.get("type") != "disabled"}
    return parse({name: value for name, value in fields.items() if value is not None}, ChatBody)


def _messages(index: int, role: str, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A message may stand for several: results of tools are messages of their own."""
    if role not in ("user", "assistant"):
        raise invalid(f"messages.{index}.role must be user or assistant", "messages")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts, calls, results, reasoning = [], [], [], []
    for block in content:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "thinking" and role == "assistant":
            reasoning.append(str(block.get("thinking", "")))
        elif kind == "redacted_thinking":
            continue
        elif kind == "tool_use" and role == "assistant" and isinstance(block.get("name"), str):
            calls.append({"id": str(block.get("id", "")), "type": "function", "function": {
                "name": block["name"], "arguments": json.dumps(block.get("input", {}), ensure_ascii=False)}})
        elif kind == "tool_result" and role == "user":
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")),
                            "content": _text_of(block.get("content") or "", f"messages.{index}")})
        else:
            raise invalid(f"messages.{index}: content of type {str(kind)[:64]!r} is not supported here", "messages")
    if role == "assistant":
        message: dict[str, Any] = {"role": role, "content": "".join(texts)}
        if calls:
            message["tool_calls"] = calls
        if reasoning:
            message["reasoning_content"] = "".join(reasoning)
        return [message]
    return [*results, *([{"role": role, "content": "".join(texts)}] if texts or not results else [])]


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text"
                                         and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise invalid(f"{where}: only text is supported here", where.partition(".")[0])


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    for index, tool in enumerate(tools):
        if tool.get("type", "custom") != "custom" or not isinstance(tool.get("input_schema", {}), dict):
            raise invalid(f"tools.{index}: only tools of the client's own, with an input_schema, are supported",
                          "tools")
    return [{"type": "function", "function": {"name": tool.get("name"), "description": tool.get("description") or "",
                                              "parameters": tool.get("input_schema") or {}}} for tool in tools]


def _tool_choice(choice: dict[str, Any]) -> str | dict[str, Any]:
    kind = choice.get("type", "auto")
    if kind == "tool" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    if kind not in TOOL_CHOICES:
        raise invalid("tool_choice.type must be auto, any, none, or tool with a name", "tool_choice")
    return TOOL_CHOICES[kind]


class MessagesCall:
    """Writes a chat's answer as a message."""

    def __init__(self, call: ChatCall, generation: Generation):
        self._call, self._generation = call, generation
        self.id = f"msg_{uuid.uuid4().hex}"
        self._blocks = Blocks(parallel=call.tools.parallel)

    def usage(self) -> dict[str, int]:
        usage: dict[str, Any] = self._call.usage(self._generation)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": 0, "output_tokens": usage["completion_tokens"]}

    def envelope(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._call.model, "content": content,
                "stop_reason": None, "stop_sequence": None, "usage": self.usage()}

    def ending(self) -> dict[str, Any]:
        """stop_reason and stop_sequence."""
        choice = self._generation.choices[0]
        if isinstance(choice.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        reason = "tool_calls" if choice.finish_reason == "stop" and self._blocks.has_calls else choice.finish_reason
        return {"stop_reason": STOP_REASONS.get(reason or "", "end_turn"), "stop_sequence": None}

    def read(self, piece: Piece) -> list[Change]:
        return self._blocks.feed(self._call.read(piece))

    async def run(self) -> dict[str, Any]:
        """The whole message."""
        async with self._generation as pieces:
            async for piece in pieces:
                self.read(piece)
        self._blocks.end()
        return {**self.envelope([_whole(block) for block in self._blocks.all]), **self.ending()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        yield named({"type": "message_start", "message": self.envelope([])})
        async with self._generation as pieces:
            async for piece in pieces:
                for change in self.read(piece):
                    yield named(_event(change))
            for change in self._blocks.end():
                yield named(_event(change))
            yield named({"type": "message_delta", "delta": self.ending(), "usage": self.usage()})
            yield named({"type": "message_stop"})


def _event(change: Change) -> dict[str, Any]:
    index = change.block.index
    if isinstance(change, Opened):
        return {"type": "content_block_start", "index": index, "content_block": _empty(change.block)}
    if isinstance(change, Closed):
        return {"type": "content_block_stop", "index": index}
    delta = {"reasoning": {"type": "thinking_delta", "thinking": change.text},
             "text": {"type": "text_delta", "text": change.text},
             "call": {"type": "input_json_delta", "partial_json": change.text}}[change.block.kind]
    assert isinstance(change, Grew)
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _empty(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return {**_empty(block), "input": _arguments(block.text)}
    return {**_empty(block), "thinking" if block.kind == "reasoning" else "text": block.text}


def _arguments(text: str) -> Any:
    """What a model wrote need not be JSON; then it is shown as it is."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {"_raw": text}
    return found if isinstance(found, dict) else {"_raw": text}


def error_body(error: ApiError) -> dict[str, Any]:
    kind = ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    def failed(error: Exception) -> Response:
        shown = as_api_error(error)
        return json_response(error_body(shown), shown.status, shown.headers)

    @routes.post("/v1/messages")
    async def create_message(request: Request) -> Response:
        try:
            state.check_accepting()
            body = parse(await read_json(request, state.config.limits.max_json_depth), MessagesBody)
            call, generation = await begin_chat(state, request, chat_body(body), "msg")
            message = MessagesCall(call, generation)
            if body.stream:
                return EventStream(message.events(), generation.close, done=b"",
                                   show_error=lambda error: named(error_body(as_api_error(error))))
            return json_response(await until_disconnect(request.receive, message.run()))
        except ClientGone:
            raise
        except Exception as error:  # the client knows one shape of errors only
            return failed(error)

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        try:
            state.check_loaded()
            body = parse(await read_json(request, state.config.limits.max_json_depth), CountTokensBody)
            state.check_model(body.model)
            _, prompt = await prepare_chat(state, chat_body(body))
            return json_response({"input_tokens": len(prompt.token_ids)})
        except ClientGone:
            raise
        except Exception as error:
            return failed(error)

    return routes
