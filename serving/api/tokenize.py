"""`POST /tokenize` and `/detokenize`: the server's tokenizer, for clients that count tokens."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api.chat_prompt import encode_chat
from serving.api.errors import invalid, json_response
from serving.api.limits import read_json
from serving.api.tools import read_tools
from serving.api.types import DetokenizeBody, TokenizeBody, parse
from serving.state import ServerState


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        state.check_loaded()
        content = await read_json(request, state.config.limits.max_json_depth)
        body = parse({"add_special_tokens": "messages" not in content, **content}, TokenizeBody)
        state.check_model(body.model)
        token_ids = await _token_ids(state, body)
        answer = {"count": len(token_ids), "max_model_len": state.ready.max_model_len, "tokens": token_ids,
                  "token_strs": None}
        if body.return_token_strs:
            tokenizer = state.need_tokenizer("return_token_strs")
            answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in token_ids]
        return json_response(answer)

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        state.check_loaded()
        body = parse(await read_json(request, state.config.limits.max_json_depth), DetokenizeBody)
        state.check_model(body.model)
        vocab_size = state.ready.vocab_size
        if any(not 0 <= token_id < vocab_size for token_id in body.tokens):
            raise invalid(f"tokens must be in 0 to {vocab_size - 1}", "tokens")
        tokenizer = state.need_tokenizer("tokens")
        return json_response({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})

    return routes


async def _token_ids(state: ServerState, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.messages is not None:
        return await encode_chat(state, body, body.messages, read_tools(body.tools, None, None).tools)
    assert body.prompt is not None
    tokenizer = state.need_tokenizer("prompt")
    return await asyncio.to_thread(tokenizer.encode, body.prompt, body.add_special_tokens)
