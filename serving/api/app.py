"""`create_app`: the HTTP API over one engine client."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serving.api import chat, completions, health, metrics, models, tokenize
from serving.api.auth import ApiKeyGuard
from serving.api.errors import install_handlers
from serving.api.limits import BodyLimit
from serving.api.sse import ClientGone
from serving.state import ServerState

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it
logger = logging.getLogger("xllm.api")


def create_app(state: ServerState) -> FastAPI:
    """All routes. No documentation pages: they would load scripts from elsewhere."""
    app = FastAPI(title="xLLM", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for module in (chat, completions, models, tokenize, health, metrics):
        app.include_router(module.router(state))
    install_handlers(app)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        logger.debug("%s: the client left", request.url.path)
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_middleware(BodyLimit, max_bytes=state.config.limits.max_body_bytes)
    if state.config.http.api_key:
        app.add_middleware(ApiKeyGuard, keys=state.config.http.api_key)
    return app
