"""`EventStream`: whatever happens to the connection, the generation behind it is closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.types import Message

from serving.api.sse import DONE, EventStream, event, named


@pytest.mark.parametrize("write", [event, named])
def test_readers_of_lines_find_whole_events(write: Callable[[dict[str, Any]], bytes]) -> None:
    """Whatever `str.splitlines` takes for the end of a line, and characters whose bytes look alike."""
    ends = [chr(code) for code in range(0x110000) if len(f"a{chr(code)}b".splitlines()) > 1]
    assert {"\u0085", "\u2028", "\u2029", "\n", "\x1c"} <= set(ends)
    content = {"type": "x", "text": "".join(ends), "alike": "\u2027\u202a\u0084\u0086\u00c2\u0385 \\u2028 😀"}
    lines = write(content).decode().splitlines()
    assert lines.pop() == "" and lines[:-1] in ([], ["event: x"])
    assert json.loads(lines[-1].removeprefix("data: ")) == content


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


async def _events(error: Exception | None, ends: list[str]) -> AsyncGenerator[dict[str, int], None]:
    try:
        yield {"number": 1}
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
    assert connection.sent[1] == event({"number": 1}) and connection.sent[-1] == DONE
    assert b'"code":500' in connection.sent[-2]
    assert b"secret" not in b"".join(connection.sent)
    assert "generation" in ends
