"""How the server is: `/health` (progress, not mere life), `/ready`, `/ping`, `/version`, `/load`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving.api.errors import RETRY_AFTER_S, json_response
from serving.api.gate import Access
from serving.api.route import Needs, Route
from serving.api.state import ServerState
from serving.security.paths import hide_paths
from xllm.client.engine_client import WatchedEngine


def health_of(state: ServerState) -> tuple[int, dict[str, Any]]:
    """HTTP status and body. 200 means: the engine answers, and if it has work, that work moves on. Of several engines
    one is enough; "degraded" and the reason say that others are not well."""
    engine = state.engine
    if engine.dead_reason is not None:
        return 503, {"status": "dead", "reason": hide_paths(engine.dead_reason)}
    if engine.restarting_after is not None:
        status = "waiting" if state.cluster else "restarting"
        return 503, {"status": status, "reason": hide_paths(engine.restarting_after), "phase": engine.phase}
    if engine.facts is None or not state.loaded:
        return 503, {"status": "starting", "reason": f"phase: {engine.phase}"}
    silent_s = engine.silent_for_s()
    stats = engine.stats
    facts: dict[str, Any] = {"running": stats.num_running, "waiting": stats.num_waiting, "steps": stats.num_steps}
    if silent_s >= state.config.http.health_timeout:
        reason = f"no progress for {silent_s:.1f} s since step {facts['steps']}"
        return 503, {"status": "stuck", "reason": reason, **facts}
    each = [_health_of_one(state, one) for one in engine.engines]
    if len(each) > 1:
        facts["engines"] = each
    bad = [f"engine {number}: {one['status']}: {one['reason']}" for number, one in enumerate(each) if "reason" in one]
    if bad:
        facts["reason"] = "; ".join(bad)
    return 200, {"status": "draining" if state.draining else "degraded" if bad else "ok", **facts}


def _health_of_one(state: ServerState, engine: WatchedEngine) -> dict[str, Any]:
    """Of one engine of several: its status, and a reason if it is not well."""
    if engine.restarting_after is not None:
        return {"status": "restarting", "reason": hide_paths(engine.restarting_after)}
    if engine.dead_reason is not None:
        return {"status": "dead", "reason": hide_paths(engine.dead_reason)}
    silent_s = engine.silent_for_s()
    if silent_s >= state.config.http.health_timeout:
        return {"status": "stuck", "reason": f"no progress for {silent_s:.1f} s since step {engine.stats.num_steps}"}
    return {"status": "ok", "running": engine.stats.num_running, "waiting": engine.stats.num_waiting}


def package_version() -> str:
    try:
        return version("xllm")
    except PackageNotFoundError:
        return "0.1.0"


def health_of_all(state: ServerState) -> tuple[int, dict[str, Any]]:
    """As `health_of`; of several models one is enough."""
    if len(state.states) == 1:
        return health_of(state)
    each = [(one.served_names[0], *health_of(one)) for one in state.states]
    bad = [f"{name}: {body['status']}: {body['reason']}" for name, _, body in each if "reason" in body]
    found: dict[str, Any] = {what: sum(body.get(what, 0) for _, _, body in each)
                             for what in ("running", "waiting", "steps")}
    found["models"] = [{"model": name, "status": body["status"]} for name, _, body in each]
    if bad:
        found["reason"] = "; ".join(bad)
    if not any(status == 200 for _, status, _ in each):
        return 503, {**found, "status": each[0][2]["status"]}
    return 200, {**found, "status": "draining" if state.draining else "degraded" if bad else "ok"}


async def health(state: ServerState, request: Request) -> Response:
    status, body = health_of_all(state)
    if state.cluster is not None:  # the console asks before anybody has a key
        body["is_master"] = True
    return json_response(body, status)


async def ready(state: ServerState, request: Request) -> Response:
    status, body = health_of_all(state)
    if status == 200 and not state.draining:
        return json_response({"status": "ready"})
    if state.draining:
        body = {"status": "draining", "reason": "the server is shutting down"}
    return json_response({**body, "phase": state.engine.phase}, 503, {"Retry-After": str(RETRY_AFTER_S)})


async def show_version(state: ServerState, request: Request) -> Response:
    return json_response({"version": package_version()})


async def load(state: ServerState, request: Request) -> Response:
    return json_response({"server_load": state.num_open_in_all})


ROUTES = (
    Route("GET", "/health", Access.PUBLIC, None, health, Needs.NOTHING, is_quiet=True),
    Route("GET", "/ready", Access.PUBLIC, None, ready, Needs.NOTHING, is_quiet=True),
    Route("POST", "/ping", Access.PUBLIC, None, health, Needs.NOTHING, is_quiet=True, is_listed=False),
    Route("GET", "/ping", Access.PUBLIC, None, health, Needs.NOTHING, is_quiet=True),
    Route("GET", "/version", Access.PUBLIC, None, show_version, Needs.NOTHING, is_quiet=True),
    Route("GET", "/load", Access.USER, None, load, Needs.NOTHING, is_quiet=True),
)
