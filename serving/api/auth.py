"""API keys: everything needs one, once one is set, but for the few paths that say how the server is."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version"})


class ApiKeyGuard:
    """ASGI middleware. Looks at the raw path that routing uses, never at a URL rebuilt from headers."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._allows(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(401, "a valid API key is needed: Authorization: Bearer <key>",
                         headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: no early exit
        return kind.lower() == b"bearer" and any(matches)
