"""`GET /openapi.json`: what the server takes, for clients that read it and for tools that test it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic.json_schema import models_json_schema

from serving.api import types
from serving.api.auth import ROUTES, Access
from serving.api.health import package_version
from serving.state import ServerState

# The bodies of POST routes. Routes without an entry are GETs, but for those that take no body.
BODIES: dict[str, type[types.StrictBody]] = {
    "/v1/completions": types.CompletionBody, "/v1/chat/completions": types.ChatBody,
    "/v1/responses": types.ResponsesBody,
    "/v1/messages": types.MessagesBody, "/v1/messages/count_tokens": types.CountTokensBody,
    "/v1/embeddings": types.EmbeddingBody, "/pooling": types.EmbeddingBody, "/v1/sample": types.SampleBody,
    "/v1/score": types.ScoreBody, "/score": types.ScoreBody,
    "/rerank": types.RerankBody, "/v1/rerank": types.RerankBody, "/v2/rerank": types.RerankBody,
    "/tokenize": types.TokenizeBody, "/detokenize": types.DetokenizeBody,
    "/pause": types.PauseBody, "/sleep": types.SleepBody,
    "/abort": types.AbortBody, "/abort_request": types.AbortBody, "/abort_requests": types.AbortBody,
    "/v1/load_lora_adapter": types.LoadAdapterBody, "/v1/unload_lora_adapter": types.UnloadAdapterBody,
}
PROMPTS = (("CompletionBody", "prompt"), ("EmbeddingBody", "input"))
WITHOUT_BODY = frozenset({"/resume", "/wakeup", "/wake_up", "/reset_prefix_cache", "/flush_cache"})
HIDDEN = ("/web/", "/v1/stats/stream")  # files of the console, and a stream that does not end
ERROR_STATUSES = (400, 401, 403, 404, 409, 413, 415, 429, 500, 503, 504)
PREFIX = "#/components/schemas/{model}"
ERROR_SCHEMA = {
    "type": "object", "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": "integer"}}}},
}


def document(models: Sequence[str] = (), vocab_size: int = 2**31) -> dict[str, Any]:
    """The OpenAPI 3.1 description of all routes. models: what is served; none: any name."""
    kinds = sorted({*BODIES.values()}, key=lambda kind: kind.__name__)
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=PREFIX)
    for kind, field in PROMPTS:
        schemas["$defs"][kind]["properties"][field] = _prompt_schema(vocab_size)
    for kind in schemas["$defs"].values():
        if models and "model" in kind.get("properties", {}):
            kind["properties"]["model"] = {"enum": [*models, None]}
    paths = {path.replace(":path", ""): _operations(path, level)
             for path, level in ROUTES.items() if not path.startswith(HIDDEN)}
    return {
        "openapi": "3.1.0", "info": {"title": "xLLM", "version": package_version()},
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": ERROR_SCHEMA},
                       "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _prompt_schema(vocab_size: int) -> dict[str, Any]:
    """A text, several, token ids, or several lists of those."""
    text, token_ids = {"type": "string", "minLength": 1}, {
        "type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}}
    several = [{"type": "array", "minItems": 1, "items": kind} for kind in (text, token_ids)]
    return {"anyOf": [text, token_ids, *several]}


def _operations(path: str, level: Access) -> dict[str, Any]:
    shape = {"schema": {"$ref": PREFIX.format(model="Error")}}
    failed = {"description": "error", "content": {"application/json": shape}}
    operation: dict[str, Any] = {
        "operationId": path.strip("/").replace("/", "_") or "console", "tags": [level.name.lower()],
        "responses": {"200": {"description": "done"}, **{str(status): failed for status in ERROR_STATUSES}},
        "security": [] if level is Access.PUBLIC else [{"key": []}],
    }
    if "{name" in path:
        path_parameter = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        operation["parameters"] = [path_parameter]
    if path not in BODIES:
        return {"post" if path in WITHOUT_BODY else "get": operation}
    schema = {"$ref": PREFIX.format(model=BODIES[path].__name__)}
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": operation}


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.get("/openapi.json")
    async def show() -> dict[str, Any]:
        if not state.loaded:
            return document()
        return document((*state.served_names, *state.engine.adapters), state.facts.vocab_size)

    return routes
