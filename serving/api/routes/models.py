"""`GET /v1/models` and `/v1/models/{id}`, with the members of OpenAI's cards and of Anthropic's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving.api.errors import invalid, json_response
from serving.api.gate import Access
from serving.api.route import Needs, Route
from serving.api.state import ServerState

MAX_LIMIT = 1000  # models on a page; Anthropic's limit


def page_of(names: Sequence[str], query: Mapping[str, str]) -> tuple[Sequence[str], bool]:
    """The names that Anthropic's `after_id`, `before_id` and `limit` ask for, and whether more follow that way.

    Without them all names. Raises ApiError.
    """
    after, before, limit = query.get("after_id"), query.get("before_id"), len(names)
    if after is not None and before is not None:
        raise invalid("after_id and before_id contradict each other; send one", "before_id")
    for field, name in (("after_id", after), ("before_id", before)):
        if name is not None and name not in names:
            raise invalid(f"{field}: there is no model {name[:64]!r}", field)
    if (text := query.get("limit")) is not None:
        if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_LIMIT:
            raise invalid(f"limit must be in 1 to {MAX_LIMIT}, got {text[:64]!r}", "limit")
        limit = int(text)
    if before is not None:
        found = names[:names.index(before)]
        return found[-limit:], len(found) > limit
    found = names if after is None else names[names.index(after) + 1:]
    return found[:limit], len(found) > limit


def card(state: ServerState, name: str) -> dict[str, Any]:
    adapter = state.adapter_of(name)
    return {"id": name, "object": "model", "created": state.started_unix_s, "owned_by": "xllm", "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(state.started_unix_s, timezone.utc).isoformat(),
            "root": adapter or state.served_names[0], "parent": state.served_names[0] if adapter else None,
            "max_model_len": state.facts.max_model_len}


async def list_models(state: ServerState, request: Request) -> Response:
    cards = {name: card(state.of_model(name), name) for name in state.all_names}
    names, has_more = page_of(tuple(cards), request.query_params)
    return json_response({"object": "list", "data": [cards[name] for name in names], "has_more": has_more,
                          "first_id": names[0] if names else None, "last_id": names[-1] if names else None})


async def get_model(state: ServerState, request: Request) -> Response:
    name = request.path_params["name"]
    return json_response(card(state.of_model(name), name))


ROUTES = (
    Route("GET", "/v1/models", Access.USER, None, list_models, Needs.MODEL),
    Route("GET", "/v1/models/{name:path}", Access.USER, None, get_model, Needs.MODEL),
)
