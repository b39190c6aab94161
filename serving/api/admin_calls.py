"""Functions shared by the routes for administrators: reading their bodies, and sending the engine a command."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from serving.api.errors import ApiError
from serving.api.state import ServerState
from serving.security.paths import hide_paths
from xllm.engine.commands import Action, Controlled


def query_members(request: Request) -> dict[str, Any]:
    """The query's parameters as members of a body; `model` says which model it is for (`Route`)."""
    return {name: _number(value) for name, value in request.query_params.items() if name != "model"}


async def control(state: ServerState, action: Action, **options: Any) -> Controlled:
    """Send a command to the engine as a whole (`EngineClient.control`). Raises ApiError if it is refused."""
    state.check_loaded()
    done = await state.engine.control(action, **options)
    if done.error is not None:
        raise ApiError(409 if done.is_state else 400, hide_paths(done.error), param=done.field)
    return done


def _number(value: str) -> str | int | bool:
    """A query parameter as JSON would have it."""
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
