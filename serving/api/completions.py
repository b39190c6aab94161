"""`POST /v1/completions`: prompts as text or token ids, one or many, with echo and legacy logprobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api import params
from serving.api.errors import invalid, json_response
from serving.api.generation import Generation
from serving.api.limits import read_json
from serving.api.logprobs import LogprobsWriter
from serving.api.sse import EventStream, event, until_disconnect
from serving.api.structured import read_structured
from serving.api.types import CompletionBody, parse
from serving.state import ServerState
from xllm.client.assemble import Completion, Piece
from xllm.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None  # None: it came as token ids


@dataclass
class CompletionCall:
    """One call: what was asked for, and how its answers are written."""

    state: ServerState
    body: CompletionBody
    id: str
    prompts: list[Prompt]
    n: int
    model: str

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.writer = LogprobsWriter(self.state.tokenizer, as_ids=bool(self.body.return_tokens_as_token_ids))
        self.hides_output = self.body.max_tokens == 0  # echo only: one token is made and not shown

    def samplings(self) -> list[SamplingParams]:
        body = self.body
        if body.max_tokens == 0 and not body.echo:
            raise invalid("max_tokens must be at least 1 unless echo is set", "max_tokens")
        overrides: dict[str, Any] = {}
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            overrides["prompt_logprobs"] = body.logprobs
        default = self.state.sampling_defaults.get("max_tokens", params.COMPLETION_MAX_TOKENS)
        lengths = [params.choose_max_tokens(self.state, body.max_tokens or (1 if self.hides_output else None),
                                            len(prompt.token_ids), default=default, prompt_field="prompt")
                   for prompt in self.prompts]
        overrides["structured"] = read_structured(body)
        made: dict[int, SamplingParams] = {}
        for length in lengths:
            if length not in made:
                made[length] = params.sampling_params(self.state, body, max_tokens=length, logprobs=body.logprobs,
                                                      **overrides)
        return [made[length] for length in lengths]

    def prompt_of(self, choice: Completion) -> Prompt:
        return self.prompts[choice.index // self.n]

    def prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None or self.state.tokenizer is None:
            return prompt.text or ""
        return self.state.tokenizer.decode(prompt.token_ids)

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
                "choices": choices}

    def usage(self, generation: Generation) -> dict[str, object]:
        return generation.usage(self.n, hidden_tokens=int(self.hides_output))

    def choice_json(self, choice: Completion) -> dict[str, Any]:
        """A finished choice."""
        piece = Piece(choice.index, choice.text, choice.token_ids, choice.logprobs or None, choice.finish_reason,
                      choice.stop_reason, is_first=True)
        return self.piece_json(choice, piece, offset=0)

    def piece_json(self, choice: Completion, piece: Piece, *, offset: int) -> dict[str, Any]:
        """One piece, with the echoed prompt before the first. offset: characters of the choice sent so far."""
        body, prompt = self.body, self.prompt_of(choice)
        text = "" if self.hides_output else piece.text
        token_ids = [] if self.hides_output else piece.token_ids
        shown = {"index": piece.index, "text": text, "logprobs": None,
                 "finish_reason": "length" if self.hides_output else piece.finish_reason,
                 "stop_reason": piece.stop_reason}
        logprob_ids: Sequence[int] = token_ids
        entries: list[TokenLogprobs | None] = [] if self.hides_output else list(piece.logprobs or ())
        if piece.is_first and body.echo:
            shown["text"] = self.prompt_text(prompt) + text
            logprob_ids = [*prompt.token_ids, *token_ids]
            entries = [*choice.prompt_logprobs, *entries]
        if body.logprobs is not None:
            shown["logprobs"] = self.writer.completion(logprob_ids, entries, offset)
        if piece.is_first and body.prompt_logprobs is not None:
            shown["prompt_logprobs"] = self.writer.prompt(choice.prompt_logprobs)
        if body.return_token_ids:
            shown["token_ids"] = token_ids
            if piece.is_first:
                shown["prompt_token_ids"] = prompt.token_ids
        return shown

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        body, options = self.body, self.body.stream_options
        always = bool(body.return_token_ids) or body.logprobs is not None
        num_sent = [0] * len(generation.choices)
        async with generation as pieces:
            async for piece in pieces:
                if not (piece.text or piece.is_first or piece.finish_reason or always):
                    continue  # tokens that do not make a character yet
                choice = generation.choices[piece.index]
                shown = self.piece_json(choice, piece, offset=num_sent[piece.index])
                num_sent[piece.index] += len(shown["text"])
                chunk = self.envelope([shown])
                if options and options.continuous_usage_stats:
                    chunk["usage"] = self.usage(generation)
                yield event(chunk)
            if options and options.include_usage:
                yield event({**self.envelope([]), "usage": self.usage(generation)})


def read_prompts(value: Any, limit: int, field: str = "prompt") -> list[str] | list[list[int]]:
    """Sort out the four shapes of a prompt. Raises ApiError naming the field."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise invalid(f"{field} must be a string, a list of strings, a list of token ids or a list of such lists",
                      field)
    if not value:
        raise invalid(f"{field} must not be empty", field)
    if all(type(item) is int for item in value):
        return [value]
    if len(value) > limit:
        raise invalid(f"{field} holds {len(value)} prompts, more than {limit}", field)
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and all(type(token_id) is int for token_id in item) for item in value):
        return value
    raise invalid(f"{field} mixes strings, token ids and lists, or holds something else", field)


async def encode_prompts(state: ServerState, body: CompletionBody) -> list[Prompt]:
    raw = read_prompts(body.prompt, state.config.limits.max_sequences_per_request)
    if any(not item for item in raw):
        raise invalid("prompt must not be empty", "prompt")
    if isinstance(raw[0], list):
        return [Prompt(ids, None) for ids in raw if isinstance(ids, list)]
    texts = [text for text in raw if isinstance(text, str)]
    tokenizer = state.need_tokenizer("prompt")
    add_special = True if body.add_special_tokens is None else body.add_special_tokens

    def encode() -> list[Prompt]:
        return [Prompt(tokenizer.encode(text, add_special_tokens=add_special), text) for text in texts]

    long = sum(map(len, texts)) > params.LONG_TEXT_CHARS
    return await asyncio.to_thread(encode) if long else encode()


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        state.check_accepting()
        body = parse(await read_json(request, state.config.limits.max_json_depth), CompletionBody)
        state.check_model(body.model)
        prompts = await encode_prompts(state, body)
        n = params.check_fan_out(state, body, len(prompts))
        if body.best_of not in (None, n):
            raise invalid("best_of other than n is not supported", "best_of")
        if body.stream_options and not body.stream:
            raise invalid("stream_options needs stream", "stream_options")
        call = CompletionCall(state, body, params.call_id(body, "cmpl", request.headers.get("x-request-id")), prompts,
                              n, body.model or state.served_names[0])
        requests = await params.engine_requests(state, body, call.id, [p.token_ids for p in prompts],
                                                call.samplings())
        state.metrics.request_params_n.observe(n)
        generation = await until_disconnect(request.receive, Generation.start(state, requests, body.timeout_s))
        if body.stream:
            return EventStream(call.events(generation), generation.close)
        await until_disconnect(request.receive, generation.run())
        choices = [call.choice_json(choice) for choice in generation.choices]
        return json_response({**call.envelope(choices), "usage": call.usage(generation)})

    return routes
