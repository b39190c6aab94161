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
from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.api.errors import ApiError, invalid, json_response
from serving.api.health import health_of, package_version
from serving.api.sse import EVENT_HEADERS, EventStream, event
from serving.history import HISTORY_COLUMNS
from serving.metrics.refusals import OVERLOAD
from serving.request_log import RequestRecord
from serving.security.caller import CALLER
from serving.security.keys import NOBODY
from serving.state import ServerState
from xllm.engine.step_log import STEP_COLUMNS

MAX_REQUESTS = 40
MAX_VIEWERS = 32
MIN_INTERVAL_MS, MAX_INTERVAL_MS = 100, 60_000
NAP_S = 0.5


def engine_json(state: ServerState) -> dict[str, Any]:
    """The engine's gauges and totals under the names that they have in `/metrics`."""
    s = state.engine.stats
    return {
        "num_requests_running": s.num_running, "num_requests_waiting": s.num_waiting,
        "kv_cache_usage_perc": s.kv_usage, "num_kv_blocks": s.num_blocks, "num_free_kv_blocks": s.num_free_blocks,
        "engine_steps": s.num_steps, "step_time_seconds": s.step_time_s, "oldest_waiting_seconds": s.oldest_waiting_s,
        "prompt_tokens": s.prompt_tokens_total, "prompt_tokens_cached": s.cached_prompt_tokens_total,
        "generation_tokens": s.generation_tokens_total, "num_preemptions": s.preemptions_total,
        "prefix_cache_queries": s.prefix_queries_total, "prefix_cache_hits": s.prefix_hits_total,
        "spec_decode_num_draft_tokens": s.spec_draft_tokens_total,
        "spec_decode_num_accepted_tokens": s.spec_accepted_tokens_total,
        "kv_tiers": msgspec.to_builtins(s.kv_tiers), "kv_lanes": msgspec.to_builtins(s.kv_lanes),
        "cached_tokens_by_tier": dict(s.cached_tokens_by_tier_total), "kv_disk_up": s.kv_disk_up,
        "graphs": msgspec.to_builtins(s.graphs),
    }


def server_json(state: ServerState) -> dict[str, Any]:
    status, health = health_of(state)
    facts: dict[str, Any] = {"version": package_version(), "status": health["status"], "ok": status == 200,
                             "reason": health.get("reason"), "phase": state.engine.phase,
                             "started": state.started_unix_s, "server_load": state.num_open}
    if (known := state.engine.facts) is not None:
        facts.update(model=state.served_names[0], max_model_len=known.max_model_len,
                     block_size=known.config.cache.block_size, max_num_seqs=known.config.scheduler.max_num_seqs,
                     num_speculative_tokens=known.config.speculative.num_speculative_tokens)
    return facts


def request_json(record: RequestRecord) -> dict[str, Any]:
    """A record for everybody's eyes: no id that its caller chose, no text."""
    return {
        "number": record.number, "kind": record.kind, "arrival_s": record.arrival_s,
        "scheduled_s": record.scheduled_s, "first_token_s": record.first_token_s, "end_s": record.end_s,
        "num_prompt_tokens": record.num_prompt_tokens, "num_cached_tokens": record.num_cached_tokens,
        "num_generation_tokens": record.num_output_tokens, "max_tokens": record.sampling.max_tokens,
        "num_preemptions": record.num_preemptions, "finish_reason": record.finish_reason,
    }


def _may_see(record: RequestRecord) -> bool:
    """A caller sees its own requests; on a server without keys, and as an administrator, all."""
    caller = CALLER.get()
    return caller is NOBODY or caller.is_admin or record.caller == caller.name


def snapshot(state: ServerState, cursor: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Everything, but of history and steps only what came after `cursor`."""
    rows, steps = state.history.since(cursor)
    return {
        "object": "stats", "now_s": time.monotonic(), "server": server_json(state), "engine": engine_json(state),
        "history": {"columns": HISTORY_COLUMNS, "rows": rows},
        "steps": {"columns": STEP_COLUMNS, "rows": steps},
        "requests": [request_json(record) for record in state.requests.latest(MAX_REQUESTS, _may_see)],
    }


def _interval_s(request: Request) -> float:
    given = request.query_params.get("interval_ms", "500")
    if not given.isascii() or not given.isdigit() or not MIN_INTERVAL_MS <= int(given[:9]) <= MAX_INTERVAL_MS:
        raise invalid(f"interval_ms must be in {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}", "interval_ms")
    return int(given) / 1000


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()
    num_viewers = 0

    @routes.get("/v1/stats")
    async def stats() -> Response:
        return json_response(snapshot(state), headers={"Cache-Control": "no-store"})

    @routes.get("/v1/stats/stream")
    async def stream(request: Request) -> Response:
        nonlocal num_viewers
        interval_s = _interval_s(request)
        if request.method == "HEAD":  # the head alone: nobody would read the stream
            return Response(media_type="text/event-stream", headers=EVENT_HEADERS)
        if num_viewers >= MAX_VIEWERS:
            state.refusals.note(OVERLOAD)
            raise ApiError(429, f"{MAX_VIEWERS} streams are open already", headers={"Retry-After": "10"})
        num_viewers += 1

        def leave() -> None:
            nonlocal num_viewers
            num_viewers -= 1

        return EventStream(_events(state, interval_s), leave)

    return routes


async def _events(state: ServerState, interval_s: float) -> AsyncGenerator[bytes, None]:
    """A snapshot at each interval; each but the first with news only. Ends when the server drains."""
    cursor = (0, 0)
    while not state.draining:
        content, cursor = snapshot(state, cursor), state.history.cursor
        yield event(content)
        await _sleep(state, interval_s)


async def _sleep(state: ServerState, seconds: float) -> None:
    """In short naps, so that a long interval does not hold up the shutdown."""
    end_s = time.monotonic() + seconds
    while not state.draining and (left_s := end_s - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, NAP_S))
