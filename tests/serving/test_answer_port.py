"""`AnswerPort`: an answer is what uvicorn would write, in fewer writes."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import h11
import pytest
from starlette.types import Receive, Scope, Send

from serving.api.answer_port import HELD_BYTES
from serving.api.sse import ClientGone, until_disconnect
from tests.serving.written_transport import Written, connected


async def answered(parts: list[list[bytes]], *, length: int | None = None, head: bytes = b"GET / HTTP/1.1",
                   through: bool = True, pauses: bool = False) -> Written:
    """An answer whose parts are written in so many turns of the event loop, the last one as its end. through: parts go
    past the middlewares where they may. pauses: the reader takes nothing for a while."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [] if length is None else [(b"content-length", str(length).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for turn, several in enumerate(parts):
            for part in several:
                is_last = turn == len(parts) - 1 and part is several[-1]
                if is_last or not through or not scope["xllm.put"](part):
                    await send({"type": "http.response.body", "body": part, "more_body": not is_last})
            for _ in range(2):
                await asyncio.sleep(0)

    connection, transport = connected(app)
    if pauses:
        connection.pause_writing()
        asyncio.get_running_loop().call_later(0.01, connection.resume_writing)
    connection.data_received(head + b"\r\nHost: x\r\n\r\n")
    await asyncio.gather(*connection.tasks)
    await asyncio.sleep(0)
    connection.connection_lost(None)
    return transport


def body_of(data: bytes, method: str = "GET") -> tuple[bytes, bytes]:
    """The body that a client reads, and how it was framed."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    found = b""
    while isinstance(event := client.next_event(), h11.Data):
        found += event.data
    assert isinstance(event, h11.EndOfMessage)
    return found, dict(response.headers).get(b"transfer-encoding", b"")


async def test_a_whole_answer_is_one_write() -> None:
    transport = await answered([[b"whole"]], length=5)
    assert len(transport.writes) == 1
    assert body_of(transport.writes[0]) == (b"whole", b"")


async def test_a_stream_is_a_write_a_turn() -> None:
    transport = await answered([[b"one", b"two"], [b"three"], [b"", b"x" * 300], [b"end"]])
    assert len(transport.writes) == 4
    assert all(body in write for body, write in zip((b"two", b"three", b"x" * 300, b"end"), transport.writes))
    assert body_of(b"".join(transport.writes)) == (b"onetwothree" + b"x" * 300 + b"end", b"chunked")


async def test_a_head_that_nothing_follows_goes_out_by_itself() -> None:
    transport = await answered([[], [b"end"]])
    assert len(transport.writes) == 2 and transport.writes[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert body_of(b"".join(transport.writes)) == (b"end", b"chunked")


@pytest.mark.parametrize("through", [True, False], ids=["past-middlewares", "as-messages"])
@pytest.mark.parametrize("pauses", [True, False], ids=["reader-pauses", "reader-reads"])
async def test_readers_that_pause(through: bool, pauses: bool) -> None:
    transport = await answered([[b"one"], [b"two"], [b"end"]], through=through, pauses=pauses)
    assert body_of(b"".join(transport.writes)) == (b"onetwoend", b"chunked")


async def test_little_is_held() -> None:
    transport = await answered([[b"x" * HELD_BYTES, b"end"]])
    assert len(transport.writes) == 2
    assert body_of(b"".join(transport.writes))[0] == b"x" * HELD_BYTES + b"end"


async def test_head_and_old_clients_get_no_chunks() -> None:
    transport = await answered([[b"one"], [b"end"]], head=b"HEAD / HTTP/1.1")
    assert b"one" not in b"".join(transport.writes)
    assert body_of(b"".join(transport.writes), "HEAD") == (b"", b"")
    transport = await answered([[b"one"], [b"end"]], head=b"GET / HTTP/1.0")
    assert b"".join(transport.writes).endswith(b"\r\n\r\noneend") and transport.is_closed


@pytest.mark.parametrize("is_late", [False, True], ids=["while-it-is-awaited", "before"])
async def test_a_client_that_leaves_is_noticed(is_late: bool) -> None:
    """Also behind a body so large that reading was stopped: who does not read sees no end."""
    has_body, ends = asyncio.Event(), list[str]()

    async def work() -> None:
        ends.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        transport.is_paused = True
        connection.flow.read_paused = True  # as with a last piece that comes while it is waited for
        has_body.set()
        if is_late:
            await asyncio.sleep(0.01)
        try:
            await until_disconnect(scope, receive, work())
        except ClientGone:
            ends.append("gone")

    connection, transport = connected(app)
    connection.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    await has_body.wait()
    await asyncio.sleep(0)
    assert transport.is_paused is is_late
    connection.connection_lost(None)
    await asyncio.gather(*connection.tasks)
    assert ends == ["begun", "cancelled", "gone"]


async def test_who_has_answered_is_not_disturbed() -> None:
    """What ends in time is given, and nobody is told when the connection ends later."""
    results = list[int]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        results.append(await until_disconnect(scope, receive, asyncio.sleep(0, 7)))
        await asyncio.sleep(0.01)
        results.append(8)

    connection, _ = connected(app)
    connection.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.sleep(0.005)
    connection.connection_lost(None)
    await asyncio.gather(*connection.tasks)
    assert results == [7, 8]


async def test_a_call_that_has_ended_is_gone() -> None:
    """At once, without a garbage collection."""
    cycles = list[weakref.ref[Any]]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        cycles.append(weakref.ref(receive.__self__))  # type: ignore[attr-defined]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    connection, _ = connected(app)
    gc.disable()
    try:
        for _ in range(2):  # a connection keeps its last one
            connection.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.gather(*connection.tasks)
            await asyncio.sleep(0)
        assert [cycle() is None for cycle in cycles] == [True, False]
    finally:
        gc.enable()
        connection.connection_lost(None)
