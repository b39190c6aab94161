"""Bounds on a request's head and body, checked before anything is built from it. The table is `serving/limits.py`."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from serving.api.errors import ApiError, invalid
from serving.api.sse import ClientGone
from serving.api.text_work import TextWork
from serving.api.types import Body, parse
from serving.limits import FIELD_LIMITS, LimitSettings

# From which a body is parsed in a thread. Chosen: smaller ones take the event loop well below a millisecond.
LARGE_BODY_BYTES = 2**16
# Of a body that is too large, so many limits are read and thrown away before the connection is closed. Chosen: clients
# see why up to there, and a stream without an end is not followed.
DISCARD_FACTOR = 8
# Matches from any quote to the string's end or the body's, so that no input makes it scan anything twice.
_JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


def check_head(scope: Scope, limits: LimitSettings) -> None:
    """Raise ApiError 414 or 431 for a head that is too large. `Connection` stops a head that never ends."""
    if len(scope["raw_path"]) + len(scope["query_string"]) > limits.max_url_bytes:
        raise ApiError(414, f"path and query are longer than {limits.max_url_bytes} bytes")
    headers = scope["headers"]
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        # RFC 9112, 6.1: another party may have read the other one, and would take the body for a request.
        raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other", headers={"Connection": "close"})
    if len(headers) > limits.max_headers:
        raise ApiError(431, f"more than {limits.max_headers} headers")
    if sum(len(name) + len(value) for name, value in headers) > limits.max_header_bytes:
        raise ApiError(431, f"the headers are larger than {limits.max_header_bytes} bytes")


def declares_too_much(scope: Scope, limits: LimitSettings) -> bool:
    """Whether the head says that the body is larger than one may be."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return len(declared) > 20 or (declared.isdigit() and int(declared) > limits.max_body_bytes)


async def refuse_body(receive: Receive, limits: LimitSettings) -> ApiError:
    """413 for a body that is too large, once the rest of it is read and dropped, within reason: a server that closes
    on unread data resets the connection, and the client never sees why."""
    num_bytes, more = 0, True
    while more and num_bytes < limits.max_body_bytes * DISCARD_FACTOR:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)
    return ApiError(413, f"the request body is larger than {limits.max_body_bytes} bytes",
                    headers={"Connection": "close"})


async def read_body(request: Request, kind: type[Body], max_depth: int, *,
                    beside: dict[str, Any] | None = None) -> Body:
    """The body, a JSON object of that type; a long one is read and checked beside the event loop.

    beside: members that are given elsewhere and that the body goes before; it may then be left out.

    Raises:
        ApiError: 415, 413, or 400 naming the field. ClientGone: the client left before the end.
    """
    limits: LimitSettings = request.scope.get("xllm.limits") or LimitSettings()
    if beside is None:
        _check_type(request)
    whole = await _whole(request, limits)
    if beside is not None and whole:
        _check_type(request)

    def read() -> Body:
        content = {} if beside is not None and not whole else _read(whole, limits, max_depth)
        return parse({**(beside or {}), **content}, kind)

    text_work: TextWork | None = request.scope.get("xllm.text_work")
    if text_work is None or len(whole) <= LARGE_BODY_BYTES:
        return read()
    return await text_work.run(len(whole), read)


def _check_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, got {media_type or 'none'!r}")


async def _whole(request: Request, limits: LimitSettings) -> bytes:
    """The body, counted while it streams in. Raises ApiError 413."""
    parts, num_bytes = list[bytes](), 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > limits.max_body_bytes:
                raise await refuse_body(request.receive, limits)
            parts.append(part)
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(parts)


def _read(body: bytes, limits: LimitSettings, max_depth: int) -> dict[str, Any]:
    _check_size(body, limits)
    try:
        content = json.loads(body)
    except RecursionError:
        raise invalid(f"the JSON body is nested deeper than {max_depth} levels") from None
    except ValueError as error:  # malformed, not UTF-8, or an integer of thousands of digits
        raise invalid(f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise invalid("the body must be a JSON object")
    if body.count(b"[") + body.count(b"{") > max_depth:  # only then can it be deeper
        _check_depth(content, max_depth)
    _check_strings(content, escapes=b"\\u" in body)
    check_fields(content, limits)
    return content


def _check_size(body: bytes, limits: LimitSettings) -> None:
    """Refuse a body of too many values: every `[]` of its three bytes takes twenty times that once it is built."""
    text = body
    num_containers = text.count(b"[") + text.count(b"{")
    num_nodes = 1 + text.count(b",") + num_containers
    if num_nodes > limits.max_json_nodes or num_containers > limits.max_json_containers:
        text = _JSON_STRING.sub(b"", body)  # what stands in strings does not count
        num_containers = text.count(b"[") + text.count(b"{")
        num_nodes = 1 + text.count(b",") + num_containers
    if num_containers > limits.max_json_containers:
        raise invalid(f"the JSON body holds more than {limits.max_json_containers} lists and objects")
    if num_nodes > limits.max_json_nodes:
        raise invalid(f"the JSON body holds more than {limits.max_json_nodes} values")


def check_fields(content: dict[str, Any], limits: LimitSettings) -> None:
    """The bounds on single fields: the value of a number, the length of anything else."""
    for name, value in content.items():
        if (limit := FIELD_LIMITS.get(name)) is None:
            continue
        most = getattr(limits, limit)
        if type(value) is int and value > most:
            raise invalid(f"{name} must be at most {most}", name)
        if isinstance(value, (list, dict)) and len(value) > most:
            raise invalid(f"{name} may have at most {most} entries", name)


def _check_depth(content: dict[str, Any], max_depth: int) -> None:
    for name, value in content.items():
        level, depth = [value], 1
        while level:
            depth += 1
            if depth > max_depth + 1:
                raise invalid(f"{name[:64]} is nested deeper than {max_depth} levels", name[:64])
            level = [child for parent in level if isinstance(parent, (list, dict))
                     for child in (parent.values() if isinstance(parent, dict) else parent)
                     if isinstance(child, (list, dict))]


def _check_strings(content: dict[str, Any], *, escapes: bool) -> None:
    """Refuse lone surrogates (only escapes can make them) and non-finite numbers at the top level."""
    for name, value in content.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise invalid(f"{name} must be a finite number", name)
        if escapes and _has_surrogate([name, value]):
            shown = name.encode(errors="replace").decode()
            raise invalid(f"{shown} is not valid Unicode: it holds a lone surrogate", shown)


def _has_surrogate(value: Any) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                return True
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += [child for child in item if isinstance(child, (str, list, dict))]
    return False
