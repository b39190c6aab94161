"""`POST /v1/responses`, and `GET` and `DELETE /v1/responses/{id}`: OpenAI's Responses API over the chat path."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving.api.blocks import Block, Blocks, Change, Grew, Opened
from serving.api.call_weight import KEPT_LOGPROB
from serving.api.drive import drive
from serving.api.errors import ApiError, as_api_error, invalid, json_response, renaming
from serving.api.gate import Access
from serving.api.generation import Generation
from serving.api.responses_input import NAMES, ChatConversation, chat_body, shown_tools
from serving.api.route import Needs, Route
from serving.api.routes.chat import ChatCall, begin_chat
from serving.api.sse import EventForm
from serving.api.state import ServerState
from serving.api.types import ResponsesBody
from serving.observe.call import CALL
from serving.observe.request_log import RequestKind
from serving.security.caller import CALLER
from xllm.client.assemble import Piece


class ResponsesWriter:
    """Writes a chat's answer as a response, or as its events (`drive.Writer`)."""

    form = EventForm.NAMED

    def __init__(self, state: ServerState, body: ResponsesBody, call: ChatCall, generation: Generation,
                 messages: list[dict[str, Any]], response_id: str):
        self._state, self._body, self._call, self._generation = state, body, call, generation
        self._messages, self._id = messages, response_id
        self._owner = CALLER.get().name
        self._created, self._number = int(time.time()), 0
        self._blocks = Blocks(parallel=call.tools.parallel)
        self._item_ids: dict[int, str] = {}
        self._logprobs: dict[int, list[dict[str, Any]]] = defaultdict(list)  # of each block of text, where asked for
        self._unplaced: list[dict[str, Any]] = []  # of tokens whose text the parser holds back

    # --- the whole

    def _response(self, status: str, output: list[dict[str, Any]], *, with_usage: bool) -> dict[str, Any]:
        body = self._body
        cut = status == "incomplete"
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "model": self._call.model, "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": body.store is not False, "temperature": body.temperature, "text": {
                "format": {"type": "text"}, **(body.text.model_dump(exclude_none=True) if body.text else {})},
            "tool_choice": body.tool_choice or "auto", "tools": shown_tools(body), "top_p": body.top_p,
            "top_logprobs": body.top_logprobs or 0, "truncation": "disabled", "background": False,
            "max_tool_calls": body.max_tool_calls, "metadata": body.metadata or {}, "user": body.user,
            "prompt_cache_key": body.prompt_cache_key,
            "usage": self._usage() if with_usage else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = self._call.usage(self._generation)
        details = usage.get("completion_tokens_details") or {}
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)}}

    @property
    def _is_cut(self) -> bool:
        return self._generation.choices[0].finish_reason == "length"

    def _finished(self) -> dict[str, Any]:
        """The response at its end, which is kept for later calls unless they said not to."""
        blocks = self._blocks.all
        items = [self._item(block, "incomplete" if self._is_cut and block is blocks[-1] else "completed")
                 for block in blocks]
        response = self._response("incomplete" if self._is_cut else "completed", items, with_usage=True)
        if self._body.store is not False:
            self._state.responses.put(response, [*self._messages, self._answer_message()], self._owner)
        return response

    def _answer_message(self) -> dict[str, Any]:
        blocks = self._blocks.all
        message: dict[str, Any] = {
            "role": "assistant", "content": "".join(block.text for block in blocks if block.kind == "text")}
        if calls := [{"id": block.call_id, "type": "function", "function": {
                "name": block.name, "arguments": block.text}} for block in blocks if block.kind == "call"]:
            message["tool_calls"] = calls
        if reasoning := "".join(block.text for block in blocks if block.kind == "reasoning"):
            message["reasoning_content"] = reasoning
        return message

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item_id = self._item_ids.setdefault(block.index, f"{_PREFIXES[block.kind]}_{uuid.uuid4().hex}")
        if block.kind == "call":
            return {"type": "function_call", "id": item_id, "call_id": block.call_id, "name": block.name,
                    "arguments": block.text, "status": status}
        content = [self._part(block)] if block.text else []
        if block.kind == "reasoning":
            return {"type": "reasoning", "id": item_id, "summary": [], "content": content, "status": status}
        return {"type": "message", "id": item_id, "role": "assistant", "content": content, "status": status}

    def _part(self, block: Block) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        return {"type": "output_text", "text": block.text, "annotations": [],
                "logprobs": list(self._logprobs[block.index])}

    def _read(self, piece: Piece) -> list[tuple[Change, list[dict[str, Any]]]]:
        """What a piece changes, and the logprobs that go with each change.

        A token counts to a text if some of it comes out there. One that is held back until its meaning is known waits;
        those of thinking and calls are not shown.
        """
        if self._call.body.logprobs:
            writer = self._call.logprobs.of(self._generation.choices[piece.index])
            self._unplaced += writer.chat(piece.logprobs or (), self._call.body.top_logprobs or 0)["content"]
        changes = self._blocks.feed(self._call.read(piece))
        grown = [change for change in changes if isinstance(change, Grew)]
        texts = [change for change in grown if change.block.kind == "text"]
        entries: list[dict[str, Any]] = []
        if grown:
            entries, self._unplaced = self._unplaced, []
        if len(texts) < len(grown):  # several tokens at once, or none of text
            entries = _covering(entries, "".join(change.text for change in texts), from_end=grown[0] not in texts)
        if texts:
            self._logprobs[texts[0].block.index] += entries
        return [(change, entries if texts and change is texts[0] else []) for change in changes]

    def take(self, piece: Piece) -> None:
        self._read(piece)

    def body(self) -> dict[str, Any]:
        self._blocks.end()
        return self._finished()

    # --- as a stream

    def begin(self) -> Iterator[dict[str, Any]]:
        begun = self._response("in_progress", [], with_usage=False)
        yield self._event("created", response=begun)
        yield self._event("in_progress", response=begun)

    def piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        for change, entries in self._read(piece):
            yield from self._changed(change, entries, "completed")

    def end(self) -> Iterator[dict[str, Any]]:
        for change in self._blocks.end():
            yield from self._changed(change, [], "incomplete" if self._is_cut else "completed")
        response = self._finished()
        yield self._event(response["status"], response=response)

    def error(self, error: Exception) -> dict[str, Any]:
        response = self._response("failed", [], with_usage=False)
        response["error"] = {"code": "server_error", "message": as_api_error(error).message}
        return self._event("failed", response=response)

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **content}

    def _changed(self, change: Change, entries: list[dict[str, Any]], status: str) -> Iterator[dict[str, Any]]:
        """entries: logprobs of the text that is new. status: of an item that is closed."""
        block = change.block
        place: dict[str, Any] = {"output_index": block.index}
        if isinstance(change, Opened):
            item = self._item(block, "in_progress")
            yield self._event("output_item.added", item=item, **place)
            if block.kind != "call":
                part = {**self._part(block), **_logprobs_of(block, [])}
                yield self._event("content_part.added", item_id=item["id"], content_index=0, part=part, **place)
            return
        at = {"item_id": self._item_ids[block.index], **place}
        if block.kind != "call":
            at["content_index"] = 0
        if isinstance(change, Grew):
            yield self._event(f"{_STREAMS[block.kind]}.delta", delta=change.text, **at, **_logprobs_of(block, entries))
            return
        if block.kind == "call":
            yield self._event("function_call_arguments.done", arguments=block.text, name=block.name, **at)
        else:
            whole = self._logprobs[block.index]
            yield self._event(f"{_STREAMS[block.kind]}.done", text=block.text, **at, **_logprobs_of(block, whole))
            yield self._event("content_part.done", part=self._part(block), **at)
        yield self._event("output_item.done", item=self._item(block, status), **place)


_PREFIXES = {"call": "fc", "reasoning": "rs", "text": "msg"}
_STREAMS = {"call": "function_call_arguments", "reasoning": "reasoning_text", "text": "output_text"}


def _covering(entries: list[dict[str, Any]], text: str, *, from_end: bool) -> list[dict[str, Any]]:
    """As many of the first entries, or of the last, as it takes for the text."""
    num_bytes, taken = len(text.encode()), 0
    for entry in reversed(entries) if from_end else entries:
        if num_bytes <= 0:
            break
        num_bytes -= len(entry["bytes"] or b"")
        taken += 1
    return entries[len(entries) - taken:] if from_end else entries[:taken]


def _logprobs_of(block: Block, entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Events about text have the member; nothing else may."""
    return {"logprobs": list(entries)} if block.kind == "text" else {}


def _new_id() -> str:
    """A stored response is found by it: an id that the client chose may come again, and would take its place."""
    http_call = CALL.get()
    return f"resp_{uuid.uuid4().hex if http_call is None or http_call.is_given else http_call.request_id}"


def not_found(response_id: str) -> ApiError:
    return ApiError(404, f"there is no response {response_id[:128]!r}; the server keeps the latest in memory only",
                    param="response_id")


async def create_response(state: ServerState, request: Request, body: ResponsesBody) -> Response:
    before: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        stored = state.responses.get(body.previous_response_id, CALLER.get().name)
        if stored is None:
            raise not_found(body.previous_response_id)
        before = stored.messages
    if body.background:
        raise invalid("background is not supported", "background")
    if body.stream_options and not body.stream:
        raise invalid("stream_options needs stream", "stream_options")
    conversation = ChatConversation.of(body, before)
    with renaming(NAMES, conversation.places_after(body)):
        chat = chat_body(body, conversation)
        call, requests = await begin_chat(state, request, chat, "resp", logprob_weight=KEPT_LOGPROB)

        def writer(generation: Generation) -> ResponsesWriter:
            return ResponsesWriter(state, body, call, generation, conversation.messages, _new_id())

        return await drive(state, request, requests, writer, timeout_s=chat.timeout_s, stream=body.stream)


async def get_response(state: ServerState, request: Request) -> Response:
    name = request.path_params["name"]
    stored = state.responses.get(name, CALLER.get().name)
    if stored is None:
        raise not_found(name)
    return json_response(stored.response)


async def delete_response(state: ServerState, request: Request) -> Response:
    name = request.path_params["name"]
    if not state.responses.delete(name, CALLER.get().name):
        raise not_found(name)
    return json_response({"id": name, "object": "response", "deleted": True})


ROUTES = (
    Route("POST", "/v1/responses", Access.USER, ResponsesBody, create_response, kind=RequestKind("response", "chat"),
          checks_model=False),
    Route("GET", "/v1/responses/{name}", Access.USER, None, get_response, Needs.NOTHING),
    Route("DELETE", "/v1/responses/{name}", Access.USER, None, delete_response, Needs.NOTHING, is_listed=False),
)
