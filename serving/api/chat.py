"""`POST /v1/chat/completions`: messages through the model's chat template."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api import params
from serving.api.errors import invalid, json_response
from serving.api.generation import Choice, Generation, Piece
from serving.api.limits import read_json
from serving.api.logprobs import LogprobsWriter
from serving.api.sse import EventStream, event, until_disconnect
from serving.api.types import ChatBody, ChatMessage, TokenizeBody, parse
from serving.state import ServerState
from xllm.errors import ModelError
from xllm.request import MAX_LOGPROBS

# What a caller may not set through chat_template_kwargs: our own arguments, and the template itself.
RESERVED_KWARGS = frozenset({"messages", "tools", "tokenize", "chat_template", "add_generation_prompt",
                             "continue_final_message", "documents", "field", "self"})


@dataclass
class ChatCall:
    """One call: what was asked for, and how its answers are written."""

    state: ServerState
    body: ChatBody
    id: str
    prompt_ids: list[int]
    n: int
    model: str

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.writer = LogprobsWriter(self.state.tokenizer, as_ids=bool(self.body.return_tokens_as_token_ids))

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def response(self, generation: Generation) -> dict[str, Any]:
        choices = [self._choice_json(choice) for choice in generation.choices]
        answer = {**self.envelope("chat.completion", choices), "usage": generation.usage(self.n)}
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self.writer.prompt(generation.choices[0].prompt_logprobs)
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = self.prompt_ids
        return answer

    def _choice_json(self, choice: Choice) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index, "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self.writer.chat(choice.logprobs, self.body.top_logprobs or 0) if self.body.logprobs else None,
            "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason,
        }
        if self.body.return_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self.envelope("chat.completion.chunk", [choice])

    def piece_chunks(self, generation: Generation, piece: Piece) -> list[dict[str, Any]]:
        """The role before a choice's first text, then the text, then the finish reason on a chunk of its own."""
        chunks = []
        if piece.is_first:
            chunks.append(self._chunk(piece.index, {"role": "assistant", "content": ""}))
            if self.body.return_token_ids and piece.index == 0:
                chunks[0]["prompt_token_ids"] = self.prompt_ids
            if self.body.prompt_logprobs is not None and piece.index == 0:
                chunks[0]["prompt_logprobs"] = self.writer.prompt(generation.choices[0].prompt_logprobs)
        has_tokens = piece.token_ids and (self.body.logprobs or self.body.return_token_ids)
        if piece.text or has_tokens:
            chunk = self._chunk(piece.index, {"content": piece.text})
            if self.body.logprobs:
                chunk["choices"][0]["logprobs"] = self.writer.chat(piece.logprobs or (), self.body.top_logprobs or 0)
            if self.body.return_token_ids:
                chunk["choices"][0]["token_ids"] = piece.token_ids
            chunks.append(chunk)
        if piece.finish_reason is not None:
            chunk = self._chunk(piece.index, {})
            chunk["choices"][0].update(finish_reason=piece.finish_reason, stop_reason=piece.stop_reason)
            chunks.append(chunk)
        return chunks

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options
        pieces = generation.pieces()
        try:
            async for found in pieces:
                for piece in found:
                    for chunk in self.piece_chunks(generation, piece):
                        if options and options.continuous_usage_stats:
                            chunk["usage"] = generation.usage(self.n)
                        yield event(chunk)
            if options and options.include_usage:
                usage = generation.usage(self.n)
                yield event({**self.envelope("chat.completion.chunk", []), "usage": usage})
        finally:
            await pieces.aclose()
            generation.close()


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates want them: text parts joined into one string. Raises ApiError for what is not built."""
    if not messages:
        raise invalid("messages must not be empty", "messages")
    plain = []
    for index, message in enumerate(messages):
        extra = {k: v for k, v in (message.model_extra or {}).items() if v is not None}
        for name in ("tool_calls", "function_call", "audio"):
            if extra.get(name):
                raise invalid(f"messages.{index}.{name} is not supported", "messages")
        content = message.content
        if isinstance(content, list):
            content = _join_parts(content, index)
        plain.append({**extra, "role": message.role, "content": content if content is not None else ""})
    return plain


def _join_parts(parts: list[dict[str, Any]], index: int) -> str:
    texts = []
    for part in parts:
        kind = part.get("type")
        if kind != "text":
            raise invalid(f"messages.{index}.content: parts of type {str(kind)[:64]!r} are not supported; only text",
                          "messages")
        if not isinstance(part.get("text"), str):
            raise invalid(f"messages.{index}.content: a text part needs a string 'text'", "messages")
        texts.append(part["text"])
    return "\n".join(texts)


async def encode_chat(state: ServerState, body: ChatBody | TokenizeBody, messages: list[ChatMessage],
                      **encode_kwargs: Any) -> list[int]:
    """Prompt token ids. Rendering runs in a thread: a template is foreign code and may be slow."""
    tokenizer = state.need_tokenizer("messages")
    extra = body.chat_template_kwargs or {}
    for name in extra:
        if name in RESERVED_KWARGS or not name.isidentifier():
            raise invalid(f"chat_template_kwargs may not set {name[:64]!r}", "chat_template_kwargs")
    plain = plain_messages(messages)

    def encode() -> list[int]:
        text = tokenizer.render_chat(plain, add_generation_prompt=body.add_generation_prompt,
                                     continue_final_message=body.continue_final_message, **extra)
        return tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens), field="messages")

    try:
        return await asyncio.to_thread(encode)
    except ModelError as error:  # no template, or none that compiles
        raise invalid(str(error), "messages") from None


def _read_max_tokens(body: ChatBody) -> tuple[int | None, str]:
    """What was asked for and under which name. Raises ApiError."""
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
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs", "top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise invalid(f"top_logprobs must be in 0 to {MAX_LOGPROBS}", "top_logprobs")
    if body.stream_options and not body.stream:
        raise invalid("stream_options needs stream", "stream_options")


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        state.check_accepting()
        body = parse(await read_json(request, state.config.limits.max_json_depth), ChatBody)
        state.check_model(body.model)
        _check(body)
        n = params.check_fan_out(state, body, 1)
        asked, asked_field = _read_max_tokens(body)
        prompt_ids = await encode_chat(state, body, body.messages)
        max_tokens = params.choose_max_tokens(
            state, asked, len(prompt_ids), default=state.sampling_defaults.get("max_tokens"), prompt_field="messages",
            asked_field=asked_field)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = params.sampling_params(state, body, max_tokens=max_tokens, logprobs=logprobs)
        call = ChatCall(state, body, params.call_id(body, "chatcmpl", request.headers.get("x-request-id")), prompt_ids,
                        n, body.model or state.served_names[0])
        requests = await params.engine_requests(state, body, call.id, [prompt_ids], [sampling])
        state.metrics.request_params_n.observe(n)
        generation = await until_disconnect(request.receive, Generation.start(state, requests))
        if body.stream:
            return EventStream(call.events(generation), generation.close)
        await until_disconnect(request.receive, generation.run())
        return json_response(call.response(generation))

    return routes
