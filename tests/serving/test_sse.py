"""`EventStream`: whatever happens to the connection, the generation behind it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from serving.api.sse import DONE, EventStream


class Connection:
    """An ASGI connection whose client leaves when told to; `stalls` makes every send wait for ever."""

    def __init__(self, *, stalls: bool = False):
        self.left = asyncio.Event()
        self.sent: list[bytes] = []
        self._stalls = stalls

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._stalls:
            await asyncio.Event().wait()
        self.sent.append(message.get("body", b""))


async def _events(error: Exception | None, ends: list[str]) -> AsyncGenerator[bytes, None]:
    try:
        yield b"data: 1\n\n"
        if error is not None:
            raise error
        await asyncio.Event().wait()
    finally:
        ends.append("events")


@pytest.mark.parametrize("stalls", [False, True], ids=["in-the-middle", "before-the-first-event"])
async def test_a_client_that_leaves_ends_it(stalls: bool) -> None:
    connection, ends = Connection(stalls=stalls), []
    stream = EventStream(_events(None, ends), lambda: ends.append("generation"))
    task = asyncio.create_task(stream({"type": "http"}, connection.receive, connection.send))
    await asyncio.sleep(0.01)
    connection.left.set()
    await task
    assert "generation" in ends
    assert ("events" in ends) is not stalls, "a generator that never began has nothing to end"


async def test_a_cancelled_response_ends_it() -> None:
    connection, ends = Connection(stalls=True), []
    stream = EventStream(_events(None, ends), lambda: ends.append("generation"))
    task = asyncio.create_task(stream({"type": "http"}, connection.receive, connection.send))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends == ["generation"]


async def test_an_error_becomes_an_event() -> None:
    connection, ends = Connection(), []
    await EventStream(_events(ValueError("secret"), ends), lambda: ends.append("generation"))(
        {"type": "http"}, connection.receive, connection.send)
    assert connection.sent[-1] == DONE
    assert b'"code":500' in connection.sent[-2]
    assert b"secret" not in b"".join(connection.sent)
    assert "generation" in ends
