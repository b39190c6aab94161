"""`GET /cluster`: a master's instances, their load, and its last decisions and events."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from serving.api.errors import ApiError, json_response
from serving.api.gate import Access
from serving.api.route import Needs, Route
from serving.api.state import ServerState


async def cluster(state: ServerState, request: Request) -> Response:
    if state.cluster is None:
        raise ApiError(404, "this server is no cluster's master: `xllm master` is")
    return json_response(await state.cluster.shown())


ROUTES = (Route("GET", "/cluster", Access.MONITOR, None, cluster, Needs.NOTHING, is_quiet=True),)
