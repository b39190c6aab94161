"""HTTP as it goes over the wire, for requests that no client library would send."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

ALICE, BOB, CAROL, ROOT_KEY = (f"{name}-key-0123456789" for name in ("alice", "bob", "carol", "root"))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def send(url: str, head: bytes, body: bytes = b"", *, timeout_s: float = 20.0) -> tuple[int, bytes]:
    """Send bytes as they are; returns the status (0: none came) and all that came until the server closed."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout_s) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):  # a server that gives up on unread data resets the connection
            connection.sendall(head + body)
            while chunk := connection.recv(65536):
                received += chunk
    status = int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/") else 0
    return status, received


def request(url: str, method: str, target: str, headers: Iterable[tuple[str, str]] = (), body: bytes = b"",
            *, host: str | None = "127.0.0.1") -> tuple[int, bytes]:
    """One request whose target and headers are sent exactly as given."""
    lines = [f"{method} {target} HTTP/1.1", "Connection: close"]
    lines += [f"Host: {host}"] if host is not None else []
    lines += [f"{name}: {value}" for name, value in headers]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return send(url, "\r\n".join([*lines, "", ""]).encode("latin-1"), body)


def scope(method: str, path: str, *, raw_path: str | None = None, headers: Sequence[tuple[str, str]] = (),
          query: str = "") -> dict[str, Any]:
    """An ASGI scope as a server makes it; raw_path: where it is not what `path` says."""
    return {"type": "http", "method": method, "path": path, "raw_path": (raw_path or path).encode("latin-1"),
            "query_string": query.encode(), "root_path": "", "scheme": "http", "http_version": "1.1",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}


async def call(app: Any, asked: dict[str, Any], body: bytes = b"") -> tuple[int, dict[str, Any]]:
    """Run an ASGI app on one request; returns the status and the JSON body."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def keep(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(asked, receive, keep)
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content) if content else {}
