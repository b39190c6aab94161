"""`POST /v1/chat/completions`: messages through the model's chat template."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving.api import params
from serving.api.call_weight import LOGPROB
from serving.api.chat_prompt import chat_prompt
from serving.api.drive import drive
from serving.api.errors import as_api_error, invalid
from serving.api.gate import Access
from serving.api.generation import Generation
from serving.api.json_slices import Items, Sliced, Slices, sliced
from serving.api.logprob_shapes import ChoiceLogprobs
from serving.api.route import Route
from serving.api.sse import EventForm
from serving.api.state import ServerState
from serving.api.structured import read_structured
from serving.api.tools import ToolWish, chat_tools
from serving.api.types import ChatBody
from serving.observe.request_log import RequestKind
from serving.parsers.events import CallArguments, CallStart, Event, ParsedOutput, Reasoning
from serving.parsers.output import OutputParser
from serving.parsers.reasoning.think_parser import CLOSE, ThinkParser
from xllm.client.assemble import Completion, Piece
from xllm.errors import RequestError
from xllm.request import MAX_LOGPROBS
from xllm.request import Request as EngineRequest
from xllm.structured.spec import StructuredOutput


@dataclass
class ChatCall:
    """One call: what was asked for, and what reads its answers. prompt_tail: the end of the prompt's text."""

    state: ServerState
    body: ChatBody
    id: str
    prompt_token_ids: list[int]
    prompt_tail: str
    tools: ToolWish
    n: int
    model: str

    def __post_init__(self) -> None:
        self.structured = self._structured()
        self.parsers = [self._parser() for _ in range(self.n)]
        self.logprobs = ChoiceLogprobs(self.state.tokenizer, as_ids=bool(self.body.return_tokens_as_token_ids))

    def _structured(self) -> StructuredOutput | None:
        """The form of the output, for the response's format or for forced calls. Raises ApiError."""
        asked, form = read_structured(self.body), self.tools.form(self.state.parsers.tools, self._hidden)
        if asked is not None and self.tools.is_forced:
            raise invalid("tool_choice forces a call; response_format and structured_outputs have no place beside it",
                          "tool_choice")
        if asked is None and form is not None:
            try:
                asked = StructuredOutput(**form)
            except RequestError as error:
                raise invalid(f"tools: {error}", "tools") from None
        thinking = self._thinking()
        if asked is None or asked.after is not None or thinking is None or not thinking.opens_for_sure:
            return asked
        return asked if CLOSE in self._hidden else replace(asked, after=CLOSE)

    @property
    def _hidden(self) -> frozenset[str]:
        """Texts that are special tokens: no prescribed form can hold them."""
        return frozenset() if self.state.tokenizer is None else self.state.tokenizer.special_token_texts

    def _thinking(self) -> ThinkParser | None:
        kind = self.state.parsers.reasoning
        return None if kind is None else kind(self.prompt_tail)

    def _parser(self) -> OutputParser:
        """A fresh one for a choice. A prescribed form leaves no room for reasoning unless it begins behind it."""
        form = self.structured
        has_room = form is None or form.after is not None or form.structural_tag is not None
        return OutputParser(self._thinking() if has_room else None, self.tools.answer_parser(self.state.parsers.tools))

    def sampling_overrides(self) -> dict[str, Any]:
        """Sampling parameters that the parsers ask for: markers that are special tokens must stay visible."""
        overrides: dict[str, Any] = {"structured": self.structured}
        if self._hidden.intersection(self.parsers[0].markers):
            overrides["skip_special_tokens"] = False
        return overrides

    def read(self, piece: Piece) -> list[Event]:
        """What a piece's text says; each piece once, in order."""
        return self.parsers[piece.index].feed(piece.text, num_tokens=len(piece.token_ids),
                                              last=piece.finish_reason is not None)

    def usage(self, generation: Generation) -> dict[str, object]:
        usage = generation.usage(self.n)
        if num_tokens := sum(parser.num_reasoning_tokens for parser in self.parsers):
            usage["completion_tokens_details"] = {"reasoning_tokens": num_tokens}
        return usage


class ChatWriter:
    """Writes a chat's answers as a chat completion, or as its chunks (`drive.Writer`)."""

    form = EventForm.PLAIN

    def __init__(self, call: ChatCall, generation: Generation):
        self._call, self._generation, self._body = call, generation, call.body
        self._created = int(time.time())
        self._chunk_head = self._head("chat.completion.chunk")
        options = call.body.stream_options
        self._shows_usage = bool(options and options.include_usage)
        self._shows_every_usage = bool(options and options.continuous_usage_stats)

    @property
    def _shows_tokens(self) -> bool:
        return bool(self._body.logprobs or self._body.return_token_ids)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._call.id, "object": kind, "created": self._created, "model": self._call.model}

    # --- the whole

    def take(self, piece: Piece) -> None:
        """Choices and parsers hold all of it."""
        self._call.read(piece)

    def body(self) -> dict[str, Any]:
        choices, usage = self._generation.choices, self._call.usage(self._generation)
        if len(choices) == 1 and not self._shows_tokens and self._body.prompt_logprobs is None:  # one text
            return {**self._head("chat.completion"), "choices": [self._choice_json(choices[0])], "usage": usage}
        answer = Sliced(self._head("chat.completion"), choices=Items(map(self._choice_json, choices)), usage=usage)
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(choices[0])
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._call.prompt_token_ids
        return answer

    def _choice_json(self, choice: Completion) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index, "message": self._message(self._call.parsers[choice.index].answer()),
            "logprobs": self._whole_logprobs(choice) if self._body.logprobs else None,
            "finish_reason": self._finish_reason(choice.index, choice.finish_reason), "stop_reason": choice.stop_reason,
        }
        if self._body.return_token_ids:
            shown["token_ids"] = Slices(sliced(choice.token_ids))
        return shown

    def _prompt_logprobs(self, choice: Completion) -> Slices:
        writer = self._call.logprobs.of_prompt(choice)
        return Slices(writer.prompt_slices(self._call.prompt_token_ids, choice.prompt_logprobs))

    def _whole_logprobs(self, choice: Completion) -> dict[str, Any]:
        writer = self._call.logprobs.of(choice)
        return {"content": Slices(writer.chat_slices(choice.logprobs, self._body.top_logprobs or 0)), "refusal": None}

    def _message(self, answer: ParsedOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning and self._body.include_reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in (answer.calls if self._call.tools.parallel else answer.calls[:1])]
        return message

    def _finish_reason(self, index: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._call.parsers[index].has_calls else reason

    # --- as a stream

    def begin(self) -> tuple[()]:
        """Nothing: each choice begins with its first piece."""
        return ()

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """The role before a choice's first text, then the text, then the finish reason on a chunk of its own."""
        chunks = [self._first_chunk(piece)] if piece.is_first else []
        deltas = [delta for event in self._call.read(piece) if (delta := self._delta(event)) is not None]
        if not deltas and piece.token_ids and self._shows_tokens:
            deltas = [{"content": ""}]
        text_chunks = [self._chunk(piece.index, delta) for delta in deltas]
        if text_chunks and self._shows_tokens:
            self._add_token_details(text_chunks[0]["choices"][0], piece)
        chunks += text_chunks
        if piece.finish_reason is not None:
            chunk = self._chunk(piece.index, {})
            reason = self._finish_reason(piece.index, piece.finish_reason)
            chunk["choices"][0].update(finish_reason=reason, stop_reason=piece.stop_reason)
            chunks.append(chunk)
        if self._shows_every_usage:
            for chunk in chunks:
                chunk["usage"] = self._call.usage(self._generation)
        return chunks

    def end(self) -> list[dict[str, Any]]:
        """What all of it took, if that was asked for."""
        if not self._shows_usage:
            return []
        return [{**self._chunk_head, "choices": [], "usage": self._call.usage(self._generation)}]

    def error(self, error: Exception) -> dict[str, Any]:
        return as_api_error(error).body()

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._chunk_head, "choices": [choice]}

    def _first_chunk(self, piece: Piece) -> dict[str, Any]:
        chunk = self._chunk(piece.index, {"role": "assistant", "content": ""})
        if self._body.return_token_ids and piece.index == 0:
            chunk["prompt_token_ids"] = self._call.prompt_token_ids
        if self._body.prompt_logprobs is not None and piece.index == 0:
            chunk = Sliced(chunk, prompt_logprobs=self._prompt_logprobs(self._generation.choices[0]))
        return chunk

    def _delta(self, event: Event) -> dict[str, Any] | None:
        """An event as a client wants it: a call's id and name once, then pieces of its arguments."""
        if isinstance(event, str):
            return {"content": event}
        if isinstance(event, Reasoning):
            return {"reasoning_content": event.text} if self._body.include_reasoning else None
        if event.index and not self._call.tools.parallel:
            return None
        if isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
        if isinstance(event, CallArguments):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        return None

    def _add_token_details(self, shown: dict[str, Any], piece: Piece) -> None:
        if self._body.logprobs:
            writer = self._call.logprobs.of(self._generation.choices[piece.index])
            shown["logprobs"] = writer.chat(piece.logprobs or (), self._body.top_logprobs or 0)
        if self._body.return_token_ids:
            shown["token_ids"] = piece.token_ids


def _read_max_tokens(body: ChatBody) -> tuple[int | None, str]:
    """What was asked for and under which name. Raises ApiError."""
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise invalid("max_tokens and max_completion_tokens contradict each other; send one", "max_completion_tokens")
    for name in ("max_completion_tokens", "max_tokens"):
        value: int | None = getattr(body, name)
        if value is not None:
            if value < 1:
                raise invalid(f"{name} must be at least 1", name)
            return value, name
    return None, "max_tokens"


def _check(body: ChatBody) -> None:
    if body.echo:
        raise invalid("echo is not supported for chats", "echo")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs", "top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise invalid(f"top_logprobs must be in 0 to {MAX_LOGPROBS}", "top_logprobs")
    if body.stream_options and not body.stream:
        raise invalid("stream_options needs stream", "stream_options")


async def begin_chat(state: ServerState, request: Request, body: ChatBody, prefix: str, *,
                     logprob_weight: int = LOGPROB) -> tuple[ChatCall, list[EngineRequest]]:
    """Check a chat; its requests are for `drive`. Raises ApiError or RequestError."""
    state.check_model(body.model)
    _check(body)
    n = params.check_fan_out(state, body, 1)
    max_tokens, max_tokens_field = _read_max_tokens(body)
    tools = chat_tools(body, state.parsers.tools)
    token_ids, tail = await chat_prompt(state, body, body.messages, tools)
    call = ChatCall(state, body, params.call_id(body, prefix, request.headers.get("x-request-id")), token_ids, tail,
                    tools, n, body.model or state.served_names[0])
    requests = await params.engine_requests(
        state, body, call.id, [token_ids], n=n, prompt_field="messages", max_tokens=max_tokens,
        max_tokens_field=max_tokens_field, default=state.sampling_defaults.get("max_tokens"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        logprobs_field="top_logprobs" if body.top_logprobs else "logprobs", logprob_weight=logprob_weight,
        **call.sampling_overrides())
    state.metrics[0].request_params_n.observe(n)
    return call, requests


async def create_chat_completion(state: ServerState, request: Request, body: ChatBody) -> Response:
    call, requests = await begin_chat(state, request, body, "chatcmpl")
    return await drive(state, request, requests, partial(ChatWriter, call), timeout_s=body.timeout_s,
                       stream=body.stream)


ROUTES = (Route("POST", "/v1/chat/completions", Access.USER, ChatBody, create_chat_completion,
                kind=RequestKind("chat", "chat"), checks_model=False),)
