"""Routes that act on the engine as a whole: hold it, put it to sleep, wake it, forget what is cached, end requests.

All of them need an admin key.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response

from serving.api.admin_calls import control
from serving.api.errors import invalid, json_response
from serving.api.gate import Access
from serving.api.route import Needs, Route
from serving.api.routes.health import package_version
from serving.api.state import ServerState
from serving.api.types import AbortBody, PauseBody, SleepBody
from xllm.engine.commands import EngineState

PAUSE_MODES = ("keep", "abort", "wait")
SLEEP_LEVELS = (1, 2)  # 1: without the KV cache; 2: without the weights too. vLLM's numbers
POLL_S = 0.02  # between looks whether running requests have ended. Chosen: hardly noticed by the caller


async def reset_prefix_cache(state: ServerState, request: Request) -> Response:
    done = await control(state, "reset_prefix_cache")
    return json_response({"success": True, "num_blocks": done.num_blocks})


async def abort(state: ServerState, request: Request, body: AbortBody) -> Response:
    return json_response({"aborted": _abort(state, body)})


async def server_info(state: ServerState, request: Request) -> Response:
    return json_response(_server_info(state))


async def pause(state: ServerState, request: Request, body: PauseBody) -> Response:
    mode = body.mode
    if mode not in PAUSE_MODES:
        raise invalid(f"mode must be one of {', '.join(PAUSE_MODES)}", "mode")
    done = await control(state, "pause", mode=mode)
    while mode == "wait" and done.state.num_open and state.engine.stats.num_running:
        if await request.is_disconnected():
            break
        await asyncio.sleep(POLL_S)
    return json_response(_shown(done.state))


async def resume(state: ServerState, request: Request) -> Response:
    return json_response(_shown((await control(state, "resume")).state))


async def sleep(state: ServerState, request: Request, body: SleepBody) -> Response:
    level = body.level
    if level not in SLEEP_LEVELS:
        raise invalid(f"level must be one of {', '.join(map(str, SLEEP_LEVELS))}", "level")
    return json_response(_shown((await control(state, "sleep", level=level)).state))


async def wake_up(state: ServerState, request: Request) -> Response:
    return json_response(_shown((await control(state, "wakeup")).state))


async def is_sleeping(state: ServerState, request: Request) -> Response:
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
    for group, name in (("model", "tokenizer"), ("cache", "disk_cache_dir"), ("cache", "kv_store")):
        config[group][name] = None  # folders of this machine
    return {"version": package_version(), "config": config, "num_kv_blocks": state.facts.num_blocks,
            "vocab_size": state.facts.vocab_size, "stats": msgspec.to_builtins(state.engine.stats)}


def _shown(engine: EngineState) -> dict[str, Any]:
    return {"is_paused": engine.paused is not None, "pause_mode": engine.paused,
            "is_sleeping": engine.sleep_level > 0, "sleep_level": engine.sleep_level, "num_open": engine.num_open}


ROUTES = (
    Route("POST", "/pause", Access.ADMIN, PauseBody, pause, Needs.NOTHING),
    Route("POST", "/resume", Access.ADMIN, None, resume, Needs.NOTHING),
    Route("POST", "/sleep", Access.ADMIN, SleepBody, sleep, Needs.NOTHING),
    *(Route("POST", path, Access.ADMIN, None, wake_up, Needs.NOTHING) for path in ("/wakeup", "/wake_up")),
    Route("GET", "/is_sleeping", Access.ADMIN, None, is_sleeping, Needs.NOTHING),
    *(Route("POST", path, Access.ADMIN, None, reset_prefix_cache, Needs.NOTHING)
      for path in ("/reset_prefix_cache", "/flush_cache")),
    *(Route("POST", path, Access.ADMIN, AbortBody, abort, Needs.NOTHING)
      for path in ("/abort", "/abort_request", "/abort_requests")),
    *(Route("GET", path, Access.ADMIN, None, server_info, Needs.MODEL)
      for path in ("/server_info", "/get_server_info")),
)
