"""`GET /v1/stats` and `/v1/stats/stream`: the engine, its last steps and its latest requests, for people to look at.

What monitoring needs is in `/metrics`; this is the same under the same names, with what a live view wants besides.
All times are on one clock, `now_s`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response

from serving.api.errors import ApiError, invalid, json_response
from serving.api.gate import Access
from serving.api.route import Needs, Route
from serving.api.routes.health import health_of, package_version
from serving.api.sse import EVENT_HEADERS, EventStream
from serving.api.state import ServerState
from serving.observe.engine_history import HISTORY_COLUMNS
from serving.observe.metrics.refusals import OVERLOAD
from serving.observe.request_log import RequestRecord
from serving.security.caller import CALLER
from serving.security.keys import NOBODY
from xllm.engine.step_log import STEP_COLUMNS
from xllm.shown import shown_in
from xllm.stats import EngineStats

MAX_REQUESTS = 40  # in a snapshot: more than a screen shows
MAX_VIEWERS = 32  # streams of one caller. Chosen: each costs a snapshot an interval
# Of a stream. Chosen: ten a second look smooth; a minute keeps a connection alive.
MIN_INTERVAL_MS, MAX_INTERVAL_MS = 100, 60_000
# What a snapshot says of each engine: an attribute of its stats, and its name.
OF_EACH = {name: shown_in(EngineStats)[name].key for name in ("num_running", "num_waiting", "kv_usage")}
NAP_S = 0.5  # that a shutdown may wait for a sleeping stream. Chosen: hardly noticed, and wakes up seldom


def engine_json(stats: EngineStats) -> dict[str, Any]:
    """The engine's gauges and totals under the names that they have in `/metrics`, as `xllm/stats.py` declares them."""
    return {shown.key: msgspec.to_builtins(getattr(stats, attribute))
            for attribute, shown in shown_in(EngineStats).items() if shown.key}


def server_json(state: ServerState) -> dict[str, Any]:
    status, health = health_of(state)
    facts: dict[str, Any] = {"version": package_version(), "status": health["status"], "ok": status == 200,
                             "reason": health.get("reason"), "phase": state.engine.phase,
                             "started": state.started_unix_s, "server_load": state.num_open_in_all}
    if (known := state.engine.facts) is not None:
        facts.update(model=state.served_names[0], max_model_len=known.max_model_len,
                     block_size=known.config.cache.block_size,
                     max_num_seqs=known.config.scheduler.max_num_seqs * len(state.engine.engines),
                     num_speculative_tokens=known.config.speculative.num_speculative_tokens)
    return facts


def request_json(record: RequestRecord) -> dict[str, Any]:
    """A record as every viewer may see it: without the id that its caller chose, without text."""
    return {
        "number": record.number, "engine": record.engine, "kind": record.kind.name, "arrival_s": record.arrival_s,
        "scheduled_s": record.scheduled_s, "first_token_s": record.first_token_s, "end_s": record.end_s,
        "num_prompt_tokens": record.num_prompt_tokens, "num_cached_tokens": record.num_cached_tokens,
        "num_generation_tokens": record.num_output_tokens, "max_tokens": record.sampling.max_tokens,
        "num_preemptions": record.num_preemptions, "finish_reason": record.finish_reason,
    }


def _may_see(record: RequestRecord) -> bool:
    """A caller sees its own requests; on a server without keys, and as an administrator, all. Who may only see how much
    goes on does not see whose it is."""
    caller = CALLER.get()
    return caller is NOBODY or caller.is_admin or record.caller == caller.name


def cursor_of(state: ServerState) -> tuple[int, int]:
    """Where the next snapshot goes on."""
    caller = CALLER.get()
    return state.history.cursor if caller.may_monitor else (state.callers.of(caller.name).num_rows, 0)


def snapshot(state: ServerState, cursor: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Everything that the caller may see, but of history and steps only what came after `cursor`."""
    if CALLER.get().may_monitor:
        stats, (rows, steps) = state.engine.stats, state.history.since(cursor)
        engines = [{"is_up": one.is_up, **{key: getattr(one.stats, name) for name, key in OF_EACH.items()}}
                   for one in state.engine.engines]
    else:
        figures = state.callers.of(CALLER.get().name)
        stats, rows, steps, engines = figures.stats(), figures.since(cursor[0]), [], []
    return {
        "object": "stats", "scope": "server" if CALLER.get().may_monitor else "own", "now_s": time.monotonic(),
        "server": server_json(state), "engine": engine_json(stats), "engines": engines,
        "history": {"columns": HISTORY_COLUMNS, "rows": rows},
        "steps": {"columns": STEP_COLUMNS, "rows": steps},
        "requests": [request_json(record) for record in state.requests.latest(MAX_REQUESTS, _may_see)],
    }


def _interval_s(request: Request) -> float:
    given = request.query_params.get("interval_ms", "500")
    if not given.isascii() or not given.isdigit() or not MIN_INTERVAL_MS <= int(given[:9]) <= MAX_INTERVAL_MS:
        raise invalid(f"interval_ms must be in {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}", "interval_ms")
    return int(given) / 1000


def _asked(state: ServerState, request: Request) -> ServerState:
    """Of several models that of `?model=`, or else the first. Raises ApiError 404."""
    name = request.query_params.get("model")
    return state if name is None else state.of_model(name)


async def stats(state: ServerState, request: Request) -> Response:
    state = _asked(state, request)
    return json_response(snapshot(state), headers={"Cache-Control": "no-store"})


async def stream(state: ServerState, request: Request) -> Response:
    state = _asked(state, request)
    interval_s, name = _interval_s(request), CALLER.get().name
    if request.method == "HEAD":  # the head alone: nobody would read the stream
        return Response(media_type="text/event-stream", headers=EVENT_HEADERS)
    if state.num_viewers[name] >= MAX_VIEWERS:
        state.refusals.note(OVERLOAD)
        raise ApiError(429, f"{MAX_VIEWERS} streams of this caller are open already", headers={"Retry-After": "10"})
    state.num_viewers[name] += 1

    def leave() -> None:
        state.num_viewers[name] -= 1

    return EventStream(_events(state, interval_s), leave)


async def _events(state: ServerState, interval_s: float) -> AsyncGenerator[dict[str, Any], None]:
    """A snapshot at each interval; each but the first with news only. Ends when the server drains."""
    cursor = (0, 0)
    while not state.draining:
        content, cursor = snapshot(state, cursor), cursor_of(state)
        yield content
        await _sleep(state, interval_s)


async def _sleep(state: ServerState, seconds: float) -> None:
    """In short naps, so that a long interval does not hold up the shutdown."""
    end_s = time.monotonic() + seconds
    while not state.draining and (left_s := end_s - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, NAP_S))


ROUTES = (
    Route("GET", "/v1/stats", Access.USER, None, stats, Needs.NOTHING, is_quiet=True),
    Route("GET", "/v1/stats/stream", Access.USER, None, stream, Needs.NOTHING, is_quiet=True, is_listed=False),
)
