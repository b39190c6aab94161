"""`Route`: one declaration, from which a route's handler, its access level, its OpenAPI entry and its HEAD come."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import Response
from starlette import routing
from starlette.types import Receive, Scope, Send

from serving.api.admin_calls import query_members
from serving.api.body import read_body
from serving.api.gate import Access
from serving.api.sse import ClientGone
from serving.api.state import ServerState
from serving.api.types import StrictBody
from serving.observe.request_log import PLAIN, REQUEST_KIND, RequestKind
from xllm.errors import ConfigError

METHODS = ("GET", "POST", "DELETE")


class Needs(enum.Enum):
    """What must be there for a route; it answers 503 otherwise. ENGINE: one that takes new requests."""

    NOTHING = enum.auto()
    MODEL = enum.auto()
    ENGINE = enum.auto()


@dataclass(frozen=True, slots=True)
class Route:
    """`handler(state, request)`, with a body type `handler(state, request, body)`, answers requests to the path.

    Before it is called, in this order: what the route needs is there, the body is read within the limits and checked
    against its type, and the model that it names is served here. A body of an ADMIN route may be left out, and query
    parameters count as members of it. GET answers HEAD, too.

    Of a server of several models the handler gets the state of the one that is meant: which the body's `model` says,
    or `?model=` with ADMIN routes and those that are `by_query`. Other routes without a body are for all of them.

    kind: of the generations that it begins, for `/v1/stats` and traces. checks_model: else the handler does it, later.
    is_listed: in `/openapi.json`. is_quiet: machines ask it every few seconds, and only its errors are logged.
    show_error: writes errors in another shape than the API's usual one.
    """

    method: str
    path: str
    access: Access
    body: type[StrictBody] | None
    handler: Callable[..., Awaitable[Response]]
    needs: Needs = Needs.ENGINE
    kind: RequestKind = PLAIN
    checks_model: bool = True
    is_listed: bool = True
    is_quiet: bool = False
    by_query: bool = False
    show_error: Callable[[Exception], Response] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"route {self.path}: method {self.method!r} is none of {', '.join(METHODS)}")

    @property
    def methods(self) -> list[str]:
        """The HTTP methods. HEAD is what GET would answer without its body, which the HTTP server leaves out (RFC 9110,
        9.3.2)."""
        return ["GET", "HEAD"] if self.method == "GET" else [self.method]

    def of(self, state: ServerState) -> routing.Route:
        """The route as the router knows it."""
        return _RoutedPath(self.path, _Endpoint(self, state), methods=self.methods)

    async def answer(self, state: ServerState, request: Request) -> Response:
        """The answer to a request to the path. Raises what `as_api_error` explains, and ClientGone."""
        try:
            return await self._answer(state, request)
        except ClientGone:
            raise
        except Exception as error:
            if self.show_error is None:
                raise
            return self.show_error(error)

    async def _answer(self, state: ServerState, request: Request) -> Response:
        REQUEST_KIND.set(self.kind)
        self._check_needs(state.any_accepting)
        if self.access is Access.ADMIN or self.by_query:
            name = request.query_params.get("model")
            if name is not None or len(state.states) > 1:
                state = state.of_model(name)
                self._check_needs(state)
        if self.body is None:
            return await self.handler(state, request)
        body = await read_body(request, self.body, state.config.limits.max_json_depth,
                               beside=query_members(request) if self.access is Access.ADMIN else None)
        if self.access is not Access.ADMIN and len(state.states) > 1:
            state = state.of_model(getattr(body, "model", None))
            self._check_needs(state)
        elif self.checks_model:
            state.check_model(getattr(body, "model", None))
        return await self.handler(state, request, body)

    def _check_needs(self, state: ServerState) -> None:
        if self.needs is Needs.ENGINE:
            state.check_accepting()
        elif self.needs is Needs.MODEL:
            state.check_loaded()


class _Endpoint:
    """Answers the requests to a route. An ASGI app: what a router wraps around a function costs each event of a stream
    another call."""

    def __init__(self, route: Route, state: ServerState):
        self._route, self._state = route, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._route.answer(self._state, Request(scope, receive, send))
        await response(scope, receive, send)


class _RoutedPath(routing.Route):
    """Leaves itself in the scope, whichever Starlette it is."""

    def matches(self, scope: Scope) -> tuple[routing.Match, Scope]:
        match, found = super().matches(scope)
        if match is not routing.Match.NONE:
            found["route"] = self
        return match, found


def access_table(routes: Iterable[Route]) -> dict[str, Access]:
    """Path -> level, which covers all of its methods. Raises ConfigError for a path with two levels, or a route that is
    there twice."""
    table: dict[str, Access] = {}
    seen: set[tuple[str, str]] = set()
    for route in routes:
        if (route.method, route.path) in seen:
            raise ConfigError(f"route {route.method} {route.path} is declared twice")
        seen.add((route.method, route.path))
        if table.setdefault(route.path, route.access) is not route.access:
            raise ConfigError(f"route {route.path}: its methods are declared with different access levels")
    return table
