"""Decides who may call which route: the access levels, and the gate that checks each request against them.

A path that no `Route` declares does not exist, whatever is mounted behind it; `create_app` refuses to start when the
two disagree. The path is looked at as it came over the wire and as the router will read it; both must name a declared
route, and the stricter level counts. No URL is ever rebuilt from headers.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.body import check_head, declares_too_much, refuse_body
from serving.api.connection import KEPT_PLACE
from serving.api.errors import ApiError
from serving.api.text_work import TextWork
from serving.limits import LimitSettings
from serving.observe.metrics.refusals import QUOTA, Refusals
from serving.security.caller import CALLER
from serving.security.hosts import HostRule
from serving.security.keys import NOBODY, Caller, KeyRing
from xllm.errors import ConfigError


class Access(enum.IntEnum):
    """Who may call a route. PUBLIC: everybody; it is for what a load balancer asks. USER: everybody on a server
    without API keys, else their owners. ADMIN: owners of an admin key only; without one the route is closed. MONITOR,
    for what tells of all callers together: everybody on a server without API keys, else owners of an admin key or of
    one with the option `metrics`, and a server's only caller."""

    PUBLIC = 0
    USER = 1
    MONITOR = 2
    ADMIN = 3


_PARAMETER = re.compile(r"\{\w+(:path)?\}")


class RouteTable:
    """Path -> access level. Raises ConfigError for a level that is not one."""

    def __init__(self, routes: dict[str, Access]):
        for path, level in routes.items():
            if not isinstance(level, Access):
                raise ConfigError(f"route {path}: {level!r} is not an access level")
        self._templates = [(_pattern(path), level) for path, level in routes.items() if "{" in path]
        self._fixed = {path: max([level, *self._of_templates(path)]) for path, level in routes.items()
                       if "{" not in path}

    def level(self, raw_path: str, path: str) -> Access | None:
        """raw_path: as it came; path: as routing reads it (percent-decoded). None: no such route."""
        level = self._level(raw_path)
        return level if level is None or raw_path == path else max(level, self._level(path) or level)

    def _level(self, path: str) -> Access | None:
        if (fixed := self._fixed.get(path)) is not None:
            return fixed
        return max(self._of_templates(path), default=None)

    def _of_templates(self, path: str) -> list[Access]:
        return [level for pattern, level in self._templates if pattern.fullmatch(path)]


def _pattern(template: str) -> re.Pattern[str]:
    """Parameters match one segment, `:path` ones any; as in the router."""
    pieces, at = [], 0
    for match in _PARAMETER.finditer(template):
        pieces += [re.escape(template[at:match.start()]), "(?s:.+)" if match[1] else "[^/]+"]
        at = match.end()
    return re.compile("".join(pieces) + re.escape(template[at:]))


def declared_paths(routes: Iterable[Any]) -> set[str]:
    """The paths of routes. Raises ConfigError for something mounted that does not say its path."""
    paths = set()
    for route in routes:
        if not isinstance(route, Route):  # a mount or a nested router would bring paths that nobody sees here
            raise ConfigError(f"{route!r} is not a plain route: its access level cannot be declared")
        paths.add(route.path)
    return paths


def check_declared(paths: set[str], table: dict[str, Access]) -> None:
    """Raise ConfigError for routes without an access level."""
    levels = RouteTable(table)
    if missing := sorted(path for path in paths - table.keys() if "{" in path or levels.level(path, path) is None):
        raise ConfigError(f"no access level is declared for {', '.join(missing)}: add a line to ROUTES "
                          "of its module in serving/api/")


class AccessGate:
    """ASGI middleware, the outermost but for CORS: what it does not let through reaches nothing.

    In this order: a head within its limits, a sane Host, a declared path, a key for its level, the key's quota, a body
    that is not too large by what the head says (`read_body` counts it as it comes). It
    leaves the caller in `CALLER` and the limits in the scope (`xllm.limits`), and
    what reads large bodies beside the event loop (`xllm.text_work`).
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, hosts: HostRule, limits: LimitSettings,
                 routes: dict[str, Access], refusals: Refusals | None = None,
                 text_work: TextWork | None = None):
        self.app, self._text_work = app, text_work
        self._keys, self._hosts, self._limits, self._table = keys, hosts, limits, RouteTable(routes)
        self._refusals = refusals or Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route speaks anything else
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            self._admit(scope)
            if declares_too_much(scope, self._limits):
                raise await refuse_body(receive, self._limits)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        scope["xllm.limits"], scope["xllm.text_work"] = self._limits, self._text_work
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        check_head(scope, self._limits)
        if complaint := self._hosts.complaint(scope["headers"]):
            raise complaint
        level = self._table.level(scope["raw_path"].decode("latin-1"), scope["path"])
        caller = NOBODY if level is Access.PUBLIC else self._identify(scope["headers"], level)
        CALLER.set(caller)  # refusals from here on are counted for this caller
        if level is None:
            raise ApiError(404, f"Not Found: {scope['method']} {scope['path'][:256]}")
        if level is Access.USER and scope.get("state", {}).get(KEPT_PLACE):
            raise ApiError(503, "too many connections", headers={"Retry-After": "1", "Connection": "close"})
        if level is not Access.PUBLIC and scope["method"] == "POST" and (refused := caller.quota.enter()):
            what, wait_s = refused
            self._refusals.note(QUOTA, caller)
            raise ApiError(429, f"this key may use {what}; come back in {wait_s} s",
                           headers={"Retry-After": str(wait_s)})

    def _identify(self, headers: list[tuple[bytes, bytes]], level: Access | None) -> Caller:
        """The owner of the key. Raises ApiError 401 or 403. An unknown path asks for a key first, like any other."""
        key = presented_key(headers)
        caller = None if key is None else self._keys.find(key)
        if level is Access.ADMIN:
            if not self._keys.has_admin_keys:
                raise ApiError(403, "this route is closed: the server was started without --admin-api-key")
            if caller is not None and not caller.is_admin:
                raise ApiError(403, "this route needs an admin key")
        elif caller is None and not self._keys.has_user_keys:
            return NOBODY
        if caller is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer <key>",
                           headers={"WWW-Authenticate": "Bearer"})
        if level is Access.MONITOR and not caller.may_monitor:
            raise ApiError(403, "this route tells of all callers: it needs an admin key, or one with the option "
                           "metrics")
        return caller


def presented_key(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The key of a request, from `Authorization: Bearer` or `X-Api-Key`; None if there is none or they disagree."""
    found = set()
    for name, value in headers:
        if name == b"authorization":
            kind, _, key = value.partition(b" ")
            found.add(key.strip() if kind.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            found.add(value.strip())
    return found.pop() or None if len(found) == 1 else None
