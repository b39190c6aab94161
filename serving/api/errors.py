"""`ApiError`, and the shape of every error of the API: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from serving.observe.call import CALL
from serving.observe.log_rate import note_logged
from serving.security.paths import hide_paths
from xllm.client.engine_client import EngineAwayError, EngineBusyError, RequestTimeoutError
from xllm.errors import EngineDeadError, ModelError, RequestError

logger = logging.getLogger("xllm.api")
RETRY_AFTER_S = 5  # that a client is told to wait. Chosen: loading and restarts take about that long with small models

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    413: "invalid_request_error", 415: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error",
    503: "service_unavailable_error", 504: "timeout_error",
}


class ApiError(Exception):
    """An answer other than 200. `param` names the field of the request that is at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "internal_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> Response:
        """The error as an HTTP response."""
        return json_response(self.body(), self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with `content` as JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def invalid(message: str, param: str | None = None) -> ApiError:
    """An ApiError 400 about the field `param`."""
    return ApiError(400, message, param=param)


def unavailable(message: str) -> ApiError:
    """An ApiError 503 with Retry-After."""
    return ApiError(503, message, headers={"Retry-After": str(RETRY_AFTER_S)})


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception. What is not ours to explain becomes a bare 500, with its traceback in the log.

    Messages from below the API may name files of this machine: their folders are taken out.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, str(error))
    if isinstance(error, EngineBusyError):
        return unavailable(hide_paths(str(error)))
    if isinstance(error, RequestError) and error.field == "lora":  # unloaded since the model's name was looked up
        return ApiError(404, hide_paths(str(error)), param="model")
    if isinstance(error, RequestError):
        return invalid(hide_paths(str(error)), error.field)
    if isinstance(error, EngineAwayError):
        return unavailable(hide_paths(str(error)))
    if isinstance(error, EngineDeadError):
        return ApiError(503, hide_paths(f"the engine stopped: {error}"))
    if isinstance(error, ModelError):
        return invalid(hide_paths(str(error)))
    if isinstance(error, HTTPException):
        message = error.detail or HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, message, headers=dict(error.headers or {}))
    logger.error("unexpected error", exc_info=error)
    note_logged(error)
    call = CALL.get()
    where = "" if call is None else f" under the request id {call.request_id}"
    return ApiError(500, f"internal error; the server's log says more{where}")


@contextmanager
def renaming(names: Mapping[str, str], places: Sequence[str]) -> Iterator[None]:
    """Errors about a chat, in the words of the API that it was translated from. Raises ApiError for what is refused.

    names: patterns of a chat's paths to what the API calls them; the first that fits counts. places: of each of the
    chat's messages, where it came from.
    """
    try:
        yield
    except (ApiError, RequestError, ModelError) as error:
        raise _renamed(as_api_error(error), names, places) from None


def _renamed(error: ApiError, names: Mapping[str, str], places: Sequence[str]) -> ApiError:
    path = error.message.partition(":")[0]
    numbered = re.fullmatch(r"messages\.(\d+)(.*)", path)
    if numbered and int(numbered[1]) < len(places):
        own = places[int(numbered[1])] + numbered[2]
        message = own + error.message.removeprefix(path)
    else:
        own = names.get(error.param or "", error.param or "")
        pattern = next((name for name in names if re.match(rf"(?:{name})\b", error.message)), None)
        message = error.message if pattern is None else re.sub(pattern, names[pattern], error.message, count=1)
    return ApiError(error.status, message, param=own.partition(".")[0] or None, headers=error.headers)


def install_handlers(app: Starlette) -> None:
    """Have the app answer every exception in the API's error shape (`as_api_error`)."""
    async def handle(request: Request, error: Exception) -> Response:
        answer = as_api_error(error)
        if answer.status in (404, 405) and isinstance(error, HTTPException):
            answer.message = f"{answer.message}: {request.method} {request.url.path}"
        return answer.response()

    for kind in (ApiError, RequestError, EngineDeadError, ModelError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
