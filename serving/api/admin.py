"""Routes that act on the engine as a whole: hold it, put it to sleep, wake it, forget what is cached, end requests.

All of them need an admin key (`serving/api/auth.py`).
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api.control import body_of, control
from serving.api.errors import invalid, json_response
from serving.api.health import package_version
from serving.api.types import AbortBody, PauseBody, SleepBody
from serving.state import ServerState
from xllm.engine.commands import EngineState

PAUSE_MODES = ("keep", "abort", "wait")
SLEEP_LEVELS = (1, 2)  # without the KV cache; without the weights too
POLL_S = 0.02


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()
    _add_holding(routes, state)
    _add_sleeping(routes, state)

    @routes.post("/flush_cache")
    @routes.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        done = await control(state, "reset_prefix_cache")
        return json_response({"success": True, "num_blocks": done.num_blocks})

    @routes.post("/abort_requests")
    @routes.post("/abort_request")
    @routes.post("/abort")
    async def abort(request: Request) -> Response:
        return json_response({"aborted": _abort(state, await body_of(state, request, AbortBody))})

    @routes.get("/get_server_info")
    @routes.get("/server_info")
    async def server_info() -> Response:
        state.check_loaded()
        return json_response(_server_info(state))

    return routes


def _add_holding(routes: APIRouter, state: ServerState) -> None:
    @routes.post("/pause")
    async def pause(request: Request) -> Response:
        mode = (await body_of(state, request, PauseBody)).mode
        if mode not in PAUSE_MODES:
            raise invalid(f"mode must be one of {', '.join(PAUSE_MODES)}", "mode")
        done = await control(state, "pause", mode=mode)
        while mode == "wait" and done.state.num_open and state.engine.stats.num_running:
            if await request.is_disconnected():
                break
            await asyncio.sleep(POLL_S)
        return json_response(_shown(done.state))

    @routes.post("/resume")
    async def resume() -> Response:
        return json_response(_shown((await control(state, "resume")).state))


def _add_sleeping(routes: APIRouter, state: ServerState) -> None:
    @routes.post("/sleep")
    async def sleep(request: Request) -> Response:
        level = (await body_of(state, request, SleepBody)).level
        if level not in SLEEP_LEVELS:
            raise invalid(f"level must be one of {', '.join(map(str, SLEEP_LEVELS))}", "level")
        return json_response(_shown((await control(state, "sleep", level=level)).state))

    @routes.post("/wake_up")
    @routes.post("/wakeup")
    async def wake_up() -> Response:
        return json_response(_shown((await control(state, "wakeup")).state))

    @routes.get("/is_sleeping")
    async def is_sleeping() -> Response:
        return json_response(_shown((await control(state, "state")).state))


def _abort(state: ServerState, body: AbortBody) -> int:
    """How many requests were ended. Raises ApiError if the body names none."""
    if not body.abort_all and not body.request_ids and body.rid is None and body.request_id is None:
        raise invalid("give request_ids, or abort_all", "request_ids")
    named = {*(body.request_ids or ()), *filter(None, (body.rid, body.request_id))}
    ids = [request_id for request_id in state.engine.request_ids
           if body.abort_all or request_id in named or request_id.partition("/")[0] in named]
    state.engine.abort(ids)
    return len(ids)


def _server_info(state: ServerState) -> dict[str, Any]:
    config = msgspec.to_builtins(state.facts.config)
    config["model"]["model"] = state.served_names[0]
    config["model"]["tokenizer"] = config["cache"]["disk_cache_dir"] = None  # folders of this machine
    return {"version": package_version(), "config": config, "num_kv_blocks": state.facts.num_blocks,
            "vocab_size": state.facts.vocab_size, "stats": msgspec.to_builtins(state.engine.stats)}


def _shown(engine: EngineState) -> dict[str, Any]:
    return {"is_paused": engine.paused is not None, "pause_mode": engine.paused,
            "is_sleeping": engine.sleep_level > 0, "sleep_level": engine.sleep_level, "num_open": engine.num_open}
