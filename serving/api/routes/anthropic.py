"""`POST /v1/messages` and `/v1/messages/count_tokens`: the Messages API of Anthropic's clients, over the chat path."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import from_json

from serving.api.blocks import Block, Blocks, Change, Closed, Grew, Opened
from serving.api.chat_prompt import chat_prompt
from serving.api.drive import drive
from serving.api.errors import ApiError, as_api_error, json_response, renaming
from serving.api.gate import Access
from serving.api.generation import Generation
from serving.api.messages_input import NAMES, Chat, chat_body, hides_thinking
from serving.api.route import Needs, Route
from serving.api.routes.chat import ChatCall, begin_chat
from serving.api.sse import EventForm
from serving.api.state import ServerState
from serving.api.tools import chat_tools
from serving.api.types import CountTokensBody, MessagesBody
from serving.observe.call import CALL
from serving.observe.request_log import RequestKind
from xllm.client.assemble import Piece

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
               413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


class MessagesWriter:
    """Writes a chat's answer as a message, or as its events (`drive.Writer`)."""

    form = EventForm.NAMED

    def __init__(self, call: ChatCall, generation: Generation, *, shows_thinking: bool):
        self._call, self._generation = call, generation
        self._id = f"msg_{call.id.removeprefix('msg-')}"
        self._blocks = Blocks(parallel=call.tools.parallel, shows_reasoning=shows_thinking)

    def take(self, piece: Piece) -> None:
        self._blocks.feed(self._call.read(piece))

    def body(self) -> dict[str, Any]:
        self._blocks.end()
        return {**self._envelope([_whole(block) for block in self._blocks.all]), **self._ending()}

    def begin(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": self._envelope([])}

    def piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        return map(_event, self._blocks.feed(self._call.read(piece)))

    def end(self) -> Iterator[dict[str, Any]]:
        yield from map(_event, self._blocks.end())
        yield {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def error(self, error: Exception) -> dict[str, Any]:
        return error_body(as_api_error(error))

    def _envelope(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._call.model, "content": content,
                "stop_reason": None, "stop_sequence": None, "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        usage: dict[str, Any] = self._call.usage(self._generation)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": 0, "output_tokens": usage["completion_tokens"]}

    def _ending(self) -> dict[str, Any]:
        """stop_reason and stop_sequence."""
        choice = self._generation.choices[0]
        if isinstance(choice.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        reason = "tool_calls" if choice.finish_reason == "stop" and self._blocks.has_calls else choice.finish_reason
        return {"stop_reason": STOP_REASONS.get(reason or "", "end_turn"), "stop_sequence": None}


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
    """What a model wrote may be cut off, and then holds what came so far, as in the client's own reading of a stream.
    It need not be JSON either; then it is shown as it is."""
    try:
        found = from_json(text or "{}", allow_partial=True)
    except ValueError:
        return {"_raw": text}
    return found if isinstance(found, dict) else {"_raw": text}


def error_body(error: ApiError) -> dict[str, Any]:
    kind = ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    call = CALL.get()
    return {"type": "error", "error": {"type": kind, "message": error.message},
            "request_id": None if call is None else call.request_id}


async def create_message(state: ServerState, request: Request, body: MessagesBody) -> Response:
    chat = Chat.of(body)
    with renaming(NAMES, chat.places):
        chat_wish = chat_body(state, body, chat)
        call, requests = await begin_chat(state, request, chat_wish, "msg")
        writer = partial(MessagesWriter, call, shows_thinking=not hides_thinking(body))
        return await drive(state, request, requests, writer, timeout_s=chat_wish.timeout_s, stream=body.stream)


async def count_tokens(state: ServerState, request: Request, body: CountTokensBody) -> Response:
    chat = Chat.of(body)
    with renaming(NAMES, chat.places):
        wish = chat_body(state, body, chat)
        token_ids, _ = await chat_prompt(state, wish, wish.messages, chat_tools(wish, state.parsers.tools))
    return json_response({"input_tokens": len(token_ids)})


def failed(error: Exception) -> Response:
    """The one shape of errors that these clients know."""
    shown = as_api_error(error)
    return json_response(error_body(shown), shown.status, shown.headers)


ROUTES = (
    Route("POST", "/v1/messages", Access.USER, MessagesBody, create_message, kind=RequestKind("message", "chat"),
          checks_model=False, show_error=failed),
    Route("POST", "/v1/messages/count_tokens", Access.USER, CountTokensBody, count_tokens, Needs.MODEL,
          show_error=failed),
)
