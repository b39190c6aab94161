"""`CallLog`: gives every answer its `X-Request-Id`, and logs a line for each call that has ended."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.observe.call import CALL, REQUEST_ID, Call
from serving.observe.log_rate import AtMost
from serving.security.caller import CALLER

# In the log; the others are counted in one line. Chosen: a flood of refused calls must not fill the disk.
MAX_REFUSALS_PER_SECOND = 50
MAX_PATH_CHARS = 128  # of a path that no route has, in the log
logger = logging.getLogger("xllm.request")


class CallLog:
    """ASGI middleware around everything, so that what fails outside of all routes has its id and its line, too.

    log_requests: else there are ids only. quiet: paths of routes of which only errors are worth a line.
    """

    def __init__(self, app: ASGIApp, *, log_requests: bool, quiet: Collection[str] = ()):
        self.app, self._log_requests, self._quiet = app, log_requests, quiet
        self._refusals = AtMost(MAX_REFUSALS_PER_SECOND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = given_id(scope["headers"])
        call = Call(given or uuid.uuid4().hex, is_given=given is not None)
        CALL.set(call)

        async def listen() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not call.is_answered:
                call.client_left = True
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message["headers"], *_id_headers(scope["path"], call.request_id)]
            elif not message.get("more_body", False):
                call.is_answered = True
            await send(message)

        try:
            await self.app(scope, listen, answer)
        except Exception:
            # Logged, and answered with 500 unless an answer had begun, by the handler of errors (`as_api_error`).
            if not call.is_answered:  # the HTTP server closes the connection
                call.broke_off = True
                raise
        finally:
            if self._log_requests:
                self._write(scope, call)

    def _write(self, scope: Scope, call: Call) -> None:
        route = getattr(scope.get("route"), "path", None)
        outcome, key = call.outcome, CALLER.get().name or None
        is_quiet = (route or scope["path"]) in self._quiet or scope["method"] == "OPTIONS"
        if is_quiet and (outcome in ("finished", "client_left") or call.status == 503):
            return
        level = logging.WARNING if outcome == "failed" else logging.INFO
        if not logger.isEnabledFor(level):
            return
        if outcome == "refused" and key is None and not call.reached_engine and not self._refusals.allow():
            return
        # As it came over the wire, which holds no blank: nothing in it can look like a field.
        shown = route or scope["raw_path"].decode("latin-1")[:MAX_PATH_CHARS]
        logger.log(level, "%s %s %s %s%s", scope["method"], shown, call.status or "-", outcome,
                   self._refusals.complaint(), extra={"fields": {
                       "request_id": call.request_id, "key": key, "method": scope["method"], "route": shown,
                       "status": call.status, "outcome": outcome, **call.fields()},
                       "said": ("method", "route", "status", "outcome")})


def given_id(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The client's own `X-Request-Id`, if it is one that may be shown."""
    value = next((value for name, value in headers if name == b"x-request-id"), b"").decode("latin-1")
    return value if REQUEST_ID.fullmatch(value) else None


def _id_headers(path: str, request_id: str) -> list[tuple[bytes, bytes]]:
    """Anthropic's clients look for it under another name."""
    names = (b"x-request-id", b"request-id") if path.startswith("/v1/messages") else (b"x-request-id",)
    return [(name, request_id.encode()) for name in names]
