"""`/`: the web console. A fixed table of files, read once; nothing is looked up by a path that a client sends."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response

from serving.api.errors import ApiError
from serving.api.gate import Access
from serving.api.route import Needs, Route
from serving.api.state import ServerState

FOLDER = Path(__file__).resolve().parents[2] / "web"
MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
               ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}

# Scripts and styles from here only, none inline; no frames, no plugins, no form that leaves; requests to here only.
CONTENT_SECURITY_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'"))
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",  # ask each time, get 304 while nothing changed
}


class Asset:
    """A file of the console, in memory, with the headers that it goes out with."""

    def __init__(self, path: Path):
        self.content = path.read_bytes()
        self.tag = f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'
        self.headers = {**HEADERS, "Content-Type": MEDIA_TYPES[path.suffix], "ETag": self.tag}

    def answer(self, request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.tag in known:
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)


def read_assets() -> dict[str, Asset]:
    return {path.name: Asset(path) for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}


ASSETS = read_assets()


async def page(state: ServerState, request: Request) -> Response:
    return ASSETS["index.html"].answer(request)


async def asset(state: ServerState, request: Request) -> Response:
    name = request.path_params["name"]
    if name not in ASSETS:
        raise ApiError(404, f"Not Found: {request.method} /web/{name[:64]}")
    return ASSETS[name].answer(request)


ROUTES = (
    Route("GET", "/", Access.PUBLIC, None, page, Needs.NOTHING, is_quiet=True),
    Route("GET", "/web/{name}", Access.PUBLIC, None, asset, Needs.NOTHING, is_quiet=True, is_listed=False),
)
