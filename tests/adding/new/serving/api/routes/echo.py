"""`POST /v1/echo`: says what was said."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from serving.api.errors import invalid, json_response
from serving.api.gate import Access
from serving.api.route import Route
from serving.api.state import ServerState
from serving.api.types import StrictBody


class EchoBody(StrictBody):
    text: str


async def create_echo(state: ServerState, request: Request, body: EchoBody) -> Response:
    most = state.config.http.max_echo_chars
    if len(body.text) > most:
        raise invalid(f"text must have at most {most} characters (--max-echo-chars)", "text")
    return json_response({"echo": body.text})


ROUTES = (Route("POST", "/v1/echo", Access.USER, EchoBody, create_echo),)
