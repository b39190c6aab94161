"""`GET /v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from serving.state import ServerState


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    def card(name: str) -> dict[str, Any]:
        adapter = state.adapter_of(name)
        return {"id": name, "object": "model", "created": state.started_unix_s, "owned_by": "xllm",
                "root": adapter or state.served_names[0], "parent": state.served_names[0] if adapter else None,
                "max_model_len": state.facts.max_model_len}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        state.check_loaded()
        return {"object": "list", "data": [card(name) for name in (*state.served_names, *state.engine.adapters)]}

    @routes.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        state.check_loaded()
        state.check_model(name)
        return card(name)

    return routes
