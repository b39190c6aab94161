"""Writes server-sent events, and notices that a client has gone."""

from __future__ import annotations

import asyncio
import enum
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import msgspec
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api.errors import as_api_error
from serving.observe.call import CALL

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
LINE_ENDS = {"\u0085".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventForm(enum.Enum):
    """What the events of a stream look like. PLAIN: data alone, `[DONE]` at the end. BARE: data alone. NAMED: events
    bear their type as their name, and the last of them ends the stream."""

    PLAIN = enum.auto()
    BARE = enum.auto()
    NAMED = enum.auto()


class ClientGone(Exception):
    """The client closed its connection: the call is over."""


def event(content: dict[str, Any]) -> bytes:
    """An event without a name: `data: JSON`."""
    return b"data: " + escape_line_ends(msgspec.json.encode(content)) + b"\n\n"


def named(content: dict[str, Any]) -> bytes:
    """An event whose name is its type."""
    return f"event: {content['type']}\ndata: ".encode() + escape_line_ends(msgspec.json.encode(content)) + b"\n\n"


def escape_line_ends(encoded: bytes) -> bytes:
    """JSON, or a part of it that ends between two characters, without a byte that any reader of lines takes for a
    line's end (evalscope#1642): the standard ends lines at CR and LF only, but the readers of httpx and requests split
    where `str.splitlines` does. JSON escapes the control characters among those; the other three are escaped here."""
    if encoded.isascii():
        return encoded
    for character, escaped in LINE_ENDS.items():
        encoded = encoded.replace(character, escaped)
    return encoded


async def until_disconnect(scope: Scope, receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it and raise ClientGone as soon as the client disconnects.

    To be called once the request body has been read. It is awaited in the running task, and a connection that tells of
    its end (`answer_port.py`) is listened to without another one: tasks are a good part of what a short call costs.
    """
    task, gone = asyncio.current_task(), False
    assert task is not None

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    stop = scope.get("xllm.watch", partial(_watch, receive))(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not gone:
            raise
        if sys.version_info >= (3, 11):
            task.uncancel()
        if (call := CALL.get()) is not None:
            call.client_left = True
        raise ClientGone from None
    finally:
        stop()


def _watch(receive: Receive, gone: Callable[[], None]) -> Callable[[], object]:
    """Have `gone` called when the client disconnects, by any server's word. Returns what ends that."""
    listener = asyncio.ensure_future(_disconnected(receive))
    listener.add_done_callback(lambda done: None if done.cancelled() else gone())
    return listener.cancel


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class MadeWhileSent(Response):
    """A response whose body a generator makes while it is sent; the generator is closed when the client leaves.

    on_end: called when all is over; a generator that was never begun does not run its `finally`.
    """

    def __init__(self, made: AsyncGenerator[Any, None], on_end: Callable[[], None] = lambda: None,
                 headers: Mapping[str, str] | None = None):
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._made, self._on_end = made, on_end
        self._put: Callable[[bytes], bool] = lambda part: False  # see `answer_port.py`

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._put = scope.get("xllm.put", self._put)
        try:
            await until_disconnect(scope, receive, self._pump(send))
        except ClientGone:
            pass
        finally:
            self._on_end()
            await self._made.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for part in self._made:
            if not self._put(part):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class LastEvents(list[dict[str, Any]]):
    """The last events of a stream; there may be none. Nothing comes behind them."""


class EventStream(MadeWhileSent):
    """Sends each event that a generator makes, data for JSON, or several together; bytes, the parts of a large one, go
    out as they are.

    An exception of the generator becomes an event (`show_error`).
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any] | list[dict[str, Any]] | bytes, None],
                 on_end: Callable[[], None], *, form: EventForm = EventForm.PLAIN,
                 show_error: Callable[[Exception], dict[str, Any]] = lambda error: as_api_error(error).body()):
        super().__init__(events, on_end, EVENT_HEADERS)
        self._encode = named if form is EventForm.NAMED else event
        self._done = DONE if form is EventForm.PLAIN else b""
        self._show_error = show_error

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = b""
        try:
            async for made in self._made:
                body = made if isinstance(made, bytes) else self._encoded(made)
                if isinstance(made, LastEvents):
                    last = body
                elif body and not self._put(body):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except Exception as error:  # the status line is out: the error travels as an event
            shown = self._encode(self._show_error(error))
            await send({"type": "http.response.body", "body": shown, "more_body": True})
        await send({"type": "http.response.body", "body": last + self._done, "more_body": False})

    def _encoded(self, made: dict[str, Any] | list[dict[str, Any]]) -> bytes:
        if isinstance(made, dict):
            return self._encode(made)
        return self._encode(made[0]) if len(made) == 1 else b"".join(map(self._encode, made))
