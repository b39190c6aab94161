"""`GET /v1/models` and `/v1/models/{id}`, with the members of OpenAI's cards and of Anthropic's."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from serving.state import ServerState


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    def card(name: str) -> dict[str, Any]:
        adapter = state.adapter_of(name)
        return {"id": name, "object": "model", "created": state.started_unix_s, "owned_by": "xllm", "type": "model",
                "display_name": name, "created_at": datetime.fromtimestamp(state.started_unix_s, UTC).isoformat(),
                "root": adapter or state.served_names[0], "parent": state.served_names[0] if adapter else None,
                "max_model_len": state.facts.max_model_len}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        state.check_loaded()
        names = (*state.served_names, *state.engine.adapters)
        return {"object": "list", "data": [card(name) for name in names], "has_more": False, "first_id": names[0],
                "last_id": names[-1]}

    @routes.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        state.check_loaded()
        state.check_model(name)
        return card(name)

    return routes
