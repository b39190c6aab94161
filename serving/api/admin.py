"""Routes that act on the engine as a whole: hold it, put it to sleep, wake it, forget what is cached, end requests.

All of them need an admin key (`serving/api/auth.py`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving import protocol
from serving.api.errors import ApiError, invalid, json_response
from serving.api.health import package_version
from serving.api.limits import read_json
from serving.api.types import AbortBody, LoadAdapterBody, PauseBody, SleepBody, UnloadAdapterBody, parse
from serving.security.paths import contained, hide_paths
from serving.state import ServerState
from xllm.errors import RequestError

PAUSE_MODES = ("keep", "abort", "wait")
SLEEP_LEVELS = (1, 2)  # without the KV cache; without the weights too
POLL_S = 0.02


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    async def body_of(request: Request, kind: type[Any]) -> Any:
        """A JSON body; none is an empty one, and query parameters count as members."""
        content = await read_json(request, state.config.limits.max_json_depth) if await request.body() else {}
        return parse({**{name: _number(value) for name, value in request.query_params.items()}, **content}, kind)

    async def control(action: str, **options: Any) -> protocol.Controlled:
        state.check_loaded()
        done = await state.engine.control(action, **options)
        if done.error is not None:
            raise ApiError(409 if done.is_state else 400, hide_paths(done.error), param=done.field)
        return done

    @routes.post("/pause")
    async def pause(request: Request) -> Response:
        mode = (await body_of(request, PauseBody)).mode
        if mode not in PAUSE_MODES:
            raise invalid(f"mode must be one of {', '.join(PAUSE_MODES)}", "mode")
        done = await control("pause", mode=mode)
        while mode == "wait" and done.state.num_open and state.engine.stats.num_running:
            if await request.is_disconnected():
                break
            await asyncio.sleep(POLL_S)
        return json_response(_shown(done.state))

    @routes.post("/resume")
    async def resume() -> Response:
        return json_response(_shown((await control("resume")).state))

    @routes.post("/sleep")
    async def sleep(request: Request) -> Response:
        level = (await body_of(request, SleepBody)).level
        if level not in SLEEP_LEVELS:
            raise invalid(f"level must be one of {', '.join(map(str, SLEEP_LEVELS))}", "level")
        return json_response(_shown((await control("sleep", level=level)).state))

    @routes.post("/wake_up")
    @routes.post("/wakeup")
    async def wake_up() -> Response:
        return json_response(_shown((await control("wakeup")).state))

    @routes.get("/is_sleeping")
    async def is_sleeping() -> Response:
        return json_response(_shown((await control("state")).state))

    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> Response:
        body = await body_of(request, LoadAdapterBody)
        folder = adapter_folder(state.config.http.lora_folder, body.lora_path)
        done = await control("load_adapter", name=body.lora_name, folder=str(folder))
        return json_response({"adapters": done.state.adapters})

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> Response:
        body = await body_of(request, UnloadAdapterBody)
        done = await control("unload_adapter", name=body.lora_name)
        return json_response({"adapters": done.state.adapters})

    @routes.post("/flush_cache")
    @routes.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        done = await control("reset_prefix_cache")
        return json_response({"success": True, "num_blocks": done.num_blocks})

    @routes.post("/abort_requests")
    @routes.post("/abort_request")
    @routes.post("/abort")
    async def abort(request: Request) -> Response:
        body = await body_of(request, AbortBody)
        if not body.abort_all and not body.request_ids and body.rid is None and body.request_id is None:
            raise invalid("give request_ids, or abort_all", "request_ids")
        named = [*(body.request_ids or ()), *filter(None, (body.rid, body.request_id))]
        return json_response({"aborted": state.engine.abort_calls(None if body.abort_all else named)})

    @routes.get("/get_server_info")
    @routes.get("/server_info")
    async def server_info() -> Response:
        state.check_loaded()
        config = protocol.as_builtins(state.ready.config)
        config["model"]["model"] = state.served_names[0]
        config["model"]["tokenizer"] = config["cache"]["disk_cache_dir"] = None  # folders of this machine
        return json_response({"version": package_version(), "config": config, "num_kv_blocks": state.ready.num_blocks,
                              "vocab_size": state.ready.vocab_size, "stats": protocol.as_builtins(state.engine.stats)})

    return routes


def adapter_folder(root: str | None, wish: str) -> Path:
    """An adapter's folder below `--lora-folder`. Raises ApiError."""
    if root is None:
        raise ApiError(403, "adapters are loaded at run time only from --lora-folder, which was not given")
    try:
        folder = contained(Path(root), wish)
    except RequestError:
        folder = Path(root)
    if folder == Path(root) or not folder.is_dir():
        raise invalid("lora_path must be a folder below the server's --lora-folder", "lora_path")
    return folder


def _number(value: str) -> str | int | bool:
    """A query parameter as JSON would have it."""
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value


def _shown(engine: protocol.EngineState) -> dict[str, Any]:
    return {"is_paused": engine.paused is not None, "pause_mode": engine.paused,
            "is_sleeping": engine.sleep_level > 0, "sleep_level": engine.sleep_level, "num_open": engine.num_open}
