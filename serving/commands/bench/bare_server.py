"""The floor of `xllm bench master`: FastAPI on uvicorn with nothing behind it: `python -m
serving.commands.bench.bare_server STEP_MS`.

A chat is parsed by a pydantic model, and each token of its answer is the same text after so many milliseconds: whole,
or as a chunk of a stream. It prints its URL and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

USAGE = {"prompt_tokens": 1, "total_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}


class BareMessage(BaseModel):
    role: str
    content: str


class BareChat(BaseModel):
    """The fields of a chat that the benchmark sends."""

    messages: list[BareMessage]
    max_tokens: int
    ignore_eos: bool = False
    stream: bool = False
    stream_options: dict[str, Any] | None = None


def bare_app(step_s: float) -> FastAPI:
    """Answers `POST /v1/chat/completions`, a token every `step_s` seconds."""
    app = FastAPI(openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat(body: BareChat) -> Response:
        if body.stream:
            return StreamingResponse(_events(body.max_tokens, step_s), media_type="text/event-stream")
        for _ in range(body.max_tokens):
            await asyncio.sleep(step_s)
        return JSONResponse({"choices": [{"index": 0, "message": {"role": "assistant", "content": "a " *
                                                                   body.max_tokens}}],
                             "usage": {"completion_tokens": body.max_tokens, **USAGE}})

    return app


async def _events(num_tokens: int, step_s: float) -> AsyncGenerator[str, None]:
    for _ in range(num_tokens):
        await asyncio.sleep(step_s)
        yield _event({"choices": [{"index": 0, "delta": {"content": "a "}, "finish_reason": None}]})
    yield _event({"choices": [], "usage": {"completion_tokens": num_tokens, **USAGE}})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def serve(step_s: float) -> None:
    """Until stdin ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(bare_app(step_s), http="httptools", ws="none", lifespan="off",
                                           log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]) / 1000))
