"""`GET /openapi.json`: what the server takes, for clients that read it and for tools that test it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic.json_schema import models_json_schema

from serving.api.errors import json_response
from serving.api.gate import Access
from serving.api.route import Needs, Route
from serving.api.routes.health import package_version
from serving.api.state import ServerState

PROMPTS = (("CompletionBody", "prompt"), ("EmbeddingBody", "input"))
# That any route may answer with, in the API's error shape.
ERROR_STATUSES = (400, 401, 403, 404, 409, 413, 415, 429, 500, 503, 504)
PARAMETER = re.compile(r"\{(\w+)")
PREFIX = "#/components/schemas/{model}"
ERROR_SCHEMA = {
    "type": "object", "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": "integer"}}}},
}


def document(routes: Sequence[Route], models: Sequence[str] = (), vocab_size: int = 2**31) -> dict[str, Any]:
    """The OpenAPI 3.1 description of the routes that are listed. models: what is served; none: any name."""
    kinds = sorted({route.body for route in routes if route.body}, key=lambda kind: kind.__name__)
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=PREFIX)
    for kind, field in PROMPTS:
        if kind in schemas["$defs"]:
            schemas["$defs"][kind]["properties"][field] = _prompt_schema(vocab_size)
    for kind in schemas["$defs"].values():
        if models and "model" in kind.get("properties", {}):
            kind["properties"]["model"] = {"enum": [*models, None]}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if route.is_listed:
            operations = paths.setdefault(route.path.replace(":path", ""), {})
            operations[route.method.lower()] = _operation(route, is_first=not operations)
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


def _operation(route: Route, *, is_first: bool) -> dict[str, Any]:
    """is_first: of its path; the others have their method in their ids."""
    name = route.path.strip("/").replace("/", "_") or "console"
    shape = {"schema": {"$ref": PREFIX.format(model="Error")}}
    failed = {"description": "error", "content": {"application/json": shape}}
    operation: dict[str, Any] = {
        "operationId": name if is_first else f"{route.method.lower()}_{name}", "tags": [route.access.name.lower()],
        "responses": {"200": {"description": "done"}, **{str(status): failed for status in ERROR_STATUSES}},
        "security": [] if route.access is Access.PUBLIC else [{"key": []}],
    }
    if names := PARAMETER.findall(route.path):
        operation["parameters"] = [{"name": name, "in": "path", "required": True,
                                    "schema": {"type": "string", "minLength": 1}} for name in names]
    if route.body is not None:
        schema = {"$ref": PREFIX.format(model=route.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


async def show(state: ServerState, request: Request) -> Response:
    routes = request.app.state.routes
    if not state.loaded:
        return json_response(document(routes))
    vocab_size = max(one.facts.vocab_size for one in state.states)
    return json_response(document(routes, state.all_names, vocab_size))


ROUTES = (Route("GET", "/openapi.json", Access.USER, None, show, Needs.NOTHING),)
