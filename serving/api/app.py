"""`create_app`: the HTTP API over one engine client."""

from __future__ import annotations

import importlib
import logging

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.middleware.cors import CORSMiddleware

from serving.api.errors import install_handlers
from serving.api.gate import AccessGate, check_declared, declared_paths
from serving.api.route import Route, access_table
from serving.api.sse import ClientGone
from serving.api.state import ServerState
from serving.observe.tracing import TraceContext
from serving.security.exposure import host_rule

# Those of `serving/api/routes/`, in the order of `/openapi.json`.
MODULES = (
    "chat",
    "completions",
    "responses",
    "anthropic",
    "tgi",
    "embeddings",
    "sample",
    "admin",
    "adapters",
    "cluster",
    "models",
    "tokenize",
    "health",
    "metrics",
    "stats",
    "console",
    "openapi",
)
ROUTES: tuple[Route, ...] = tuple(
    route for name in MODULES for route in importlib.import_module(f"serving.api.routes.{name}").ROUTES)
QUIET = frozenset(route.path for route in ROUTES if route.is_quiet)
CLIENT_CLOSED_REQUEST = 499  # the status of a call whose client has gone, as nginx has it; it shows in logs only
logger = logging.getLogger("xllm.api")


def create_app(state: ServerState) -> FastAPI:
    """All routes. No documentation pages: they would load scripts from elsewhere.

    Raises ConfigError if a route is there without a `Route` that declares it, or two contradict each other.
    """
    app = FastAPI(title="xLLM", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
                  routes=[route.of(state) for route in ROUTES],
                  # Its own spans and metrics: ours are `serving/observe/`, and each call would look for who wants them.
                  telemetry={"tracing": False, "metrics": False, "logs": False})
    access = access_table(ROUTES)
    check_declared(declared_paths(app.routes), access)
    app.state.routes = ROUTES
    install_handlers(app)

    async def client_gone(request: Request, error: Exception) -> Response:
        logger.debug("%s: the client left", request.url.path)
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(ClientGone, client_gone)

    http, limits = state.config.http, state.config.limits
    app.add_middleware(AccessGate, keys=state.keys, hosts=host_rule(http, state.keys), limits=limits, routes=access,
                       refusals=state.refusals, text_work=state.text_work)
    if state.tracer is not None:
        app.add_middleware(TraceContext)
    if http.cors_origin:  # outermost: a preflight carries no key, and a refusal must be readable too
        # The origins are the defence. The headers of the SDKs (x-stainless-*, anthropic-*, openai-*, new ones in every
        # version) are allowed whatever they are called; there are no cookies that a page could ride on.
        app.add_middleware(CORSMiddleware, allow_origins=http.cors_origin, allow_headers=["*"],
                           allow_methods=["GET", "HEAD", "POST", "DELETE"],
                           expose_headers=["retry-after", "x-request-id"])
    return app
