"""`AnswerPort`: writes the answers of one connection in few system calls: one costs as much as making a chunk.

uvicorn writes the head, the body and the end of an answer one by one. Here what is written together goes out together.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

HELD_BYTES = 2**16  # Chosen: as much as a transport takes before it asks its writer to pause


def _nothing() -> None:
    return


class AnswerPort:
    """An `asyncio.Transport` that can hold back what is written to it."""

    def __init__(self, transport: asyncio.Transport):
        self._transport = transport
        self._held, self._num_held, self._is_holding = list[bytes](), 0, False
        self.on_lost: Callable[[], None] = _nothing  # called when the connection is lost
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def hold(self) -> None:
        """Hold back what is written until `release`, up to HELD_BYTES."""
        self._is_holding = True

    def release(self) -> None:
        """Write what was held back. Idempotent."""
        self._is_holding = False
        if self._held:
            data, self._held, self._num_held = b"".join(self._held), [], 0
            self._transport.write(data)

    def write(self, data: bytes) -> None:
        if not self._is_holding:
            self._transport.write(data)
            return
        self._held.append(data)
        self._num_held += len(data)
        if self._num_held > HELD_BYTES:
            self.release()

    def close(self) -> None:
        self.release()
        self._transport.close()

    def abort(self) -> None:
        self._held, self._num_held = [], 0
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + self._num_held


class _Answer:
    """ASGI's `send` of one request, and who is told that its client has gone."""

    def __init__(self, cycle: RequestResponseCycle, port: AnswerPort):
        self._cycle, self._port = cycle, port
        self._ends_with_connection = False  # the body has no length, and a peer of HTTP/1.0 knows no chunks

    async def send(self, message: Message) -> None:
        cycle = self._cycle
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif not message.get("more_body", False):
            await self._end(message)
        elif not self.put(message.get("body", b"")):
            await cycle.send(message)  # type: ignore[arg-type]

    def put(self, part: bytes) -> bool:
        """Write a part of a stream, behind which more comes, without waiting. False: it has to be sent."""
        cycle = self._cycle
        if (not cycle.response_started or cycle.response_complete or cycle.flow.write_paused
                or cycle.scope["method"] == "HEAD"):
            return False
        try:
            cycle.send({"type": "http.response.body", "body": part, "more_body": True}).send(None)
        except StopIteration:  # it has ended: it waits only while writing is paused
            return True
        raise AssertionError("a part was held back")

    def watch(self, gone: Callable[[], None]) -> Callable[[], None]:
        """Have `gone` called as soon as the client disconnects, soon if it has. Returns what ends that. At most one
        watches at a time."""
        if self._cycle.disconnected:
            return asyncio.get_running_loop().call_soon(gone).cancel
        self._cycle.flow.resume_reading()  # a large body may have stopped it, and who does not read sees no end
        self._port.on_lost = gone
        return self._stop_watching

    def _stop_watching(self) -> None:
        self._port.on_lost = _nothing

    async def _begin(self, message: Message) -> None:
        """The head goes out with what follows at once, or else by itself."""
        cycle = self._cycle
        if cycle.scope["http_version"] == "1.0" and not any(name.lower() == b"content-length"
                                                            for name, _ in message.get("headers", ())):
            self._ends_with_connection = True
            cycle.chunked_encoding, cycle.expected_content_length = False, sys.maxsize
        self._port.hold()
        asyncio.get_running_loop().call_soon(self._port.release)
        await cycle.send(message)  # type: ignore[arg-type]

    async def _end(self, message: Message) -> None:
        if self._cycle.flow.write_paused and not self._cycle.disconnected:  # nothing may be held for so long
            await self._cycle.flow.drain()
        if self._ends_with_connection:
            self._cycle.expected_content_length = len(message.get("body", b""))
        self._port.hold()
        try:
            await self._cycle.send(message)  # type: ignore[arg-type]
        finally:
            self._port.release()


async def answer_through_port(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Have the app answer a request of a connection whose transport is an `AnswerPort`. send: uvicorn's. It leaves in
    the scope (`xllm.put`) what a stream's parts may be given to: no middleware has anything to do with them, and each
    of those that they pass costs as much as writing an event. And what tells of the client's end without a task that
    listens for it (`xllm.watch`)."""
    cycle: RequestResponseCycle = send.__self__  # type: ignore[attr-defined]
    port: Any = cycle.transport
    answer = _Answer(cycle, port)
    scope["xllm.put"], scope["xllm.watch"] = answer.put, answer.watch
    try:
        await app(scope, receive, answer.send)
    finally:  # the cycle has the scope: all of a call would wait for the garbage collector
        del scope["xllm.put"], scope["xllm.watch"]
