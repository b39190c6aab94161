"""What llhttp lets pass, or leaves to others, is bounded and refused by the connection that it parses for."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from tests.serving.written_transport import MAX_UNREAD, connected

ASKED = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class App:
    """Answers with what it was asked, once `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.asked, self.ends = list[tuple[str, bytes, dict[bytes, bytes]]](), list[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, message = b"", {"more_body": True}
        while message.get("more_body", False):
            message = await receive()
            body += message.get("body", b"")
        if message["type"] == "http.disconnect":
            self.ends.append("gone")
            return
        self.asked.append((scope["path"], body, dict(scope["headers"])))
        await self.go.wait()
        said = scope["path"].encode() + body
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-length", str(len(said)).encode())]})
        await send({"type": "http.response.body", "body": said})


async def told(data: bytes | list[bytes], app: Any = None) -> tuple[str, bool, App]:
    """(all that was written for these bytes, which come in one piece or in several, whether the connection was closed
    then, the app)."""
    app = app or App()
    connection, transport = connected(app)
    for piece in [data] if isinstance(data, bytes) else data:
        if not transport.is_closed:
            connection.data_received(piece)
            for _ in range(4):
                await asyncio.sleep(0)
    for _ in range(20):  # where it waits for more of a body, its task stays
        await asyncio.sleep(0.0005)
        if not connection.tasks:
            break
    is_closed = transport.is_closed
    connection.connection_lost(None)
    await asyncio.gather(*connection.tasks)
    return b"".join(transport.writes).decode(), is_closed, app


def refusal(text: str) -> str:
    """What the last answer says is wrong."""
    head, _, body = text.rpartition("\r\n\r\n")
    assert "HTTP/1.1 400 Bad Request\r\n" in head and "connection: close" in head
    return str(json.loads(body)["error"]["message"])


@pytest.mark.parametrize(("data", "wrong"), [
    (b"GET / HTTP/1.1\r\n\r\n", "one Host header, this one has 0"),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "one Host header, this one has 2"),
    (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", "one Host header, this one has 2"),
    (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", r"HTTP/2.0 is not served"),
    (b"GET / HTTP/0.9\r\n\r\n", r"HTTP/0.9 is not served"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "no valid HTTP request"),
    (b"CONNECT inside:22 HTTP/1.1\r\nHost: inside:22\r\n\r\nSSH-2.0", "CONNECT is not served"),
    (b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n", "target is a path"),
    (b"GET http://x/health HTTP/1.1\r\nHost: x\r\n\r\n", "target is a path"),
    (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "target is a path"),
    (b"GET /health#/ HTTP/1.1\r\nHost: x\r\n\r\n", "target is a path"),
    (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", "no valid HTTP request"),
    (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", "no valid HTTP request"),
    (b"GET / HTTP/1.1\nHost: a\n\n", "no valid HTTP request"),
    (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", "no valid HTTP request"),
    (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", "no valid HTTP request"),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", "no valid HTTP request"),
    (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", "Content-Length"),
    (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx", "Content-Length"),
    (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     "Transfer-Encoding"),
    (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", "Transfer-Encoding|chunked"),
    (CHUNKED + b"zz\r\n", "no valid HTTP request"),
    (CHUNKED + b"2\r\nabc\r\n0\r\n\r\n", "no valid HTTP request"),
    (CHUNKED + b"fffffffffffffffff\r\n", "no valid HTTP request"),
    (b"\x16\x03\x01\x02\x00", "no valid HTTP request"),
])
async def test_what_is_wrong_is_said_once_and_nothing_else_is_read(data: bytes, wrong: str) -> None:
    for pieces in (data, [data[i:i + 1] for i in range(len(data))]):
        text, is_closed, app = await told(pieces)
        assert re.search(wrong, refusal(text)), text
        assert len(re.findall(r"HTTP/1\.1 \d", text)) == 1 and is_closed and not app.asked


@pytest.mark.parametrize("endless", [
    [b"GET / HTTP/1.1\r\nHost: x\r\n", b"X: " + b"y" * 4093],
    [b"GET /", b"y" * 4096],
    [b"\r\n" * 2048],
    [CHUNKED, b"0" * 4096],
    [CHUNKED + b"1;", b"y" * 4096],
    [CHUNKED + b"0\r\n", b"X: " + b"y" * 4090 + b"\r\n"],
    [CHUNKED + b"0\r\nX: ", b"y" * 4096],
], ids=["headers", "url", "blank-lines", "chunk-size", "chunk-extension", "trailers", "trailer"])
async def test_what_has_no_end_is_ended(endless: list[bytes]) -> None:
    *first, more = endless
    num_enough = MAX_UNREAD // len(more) + 2
    text, is_closed, app = await told([*first, *[more] * (num_enough - 4)])
    assert not text and not is_closed
    text, is_closed, app = await told([*first, *[more] * num_enough])
    assert re.search("neither a whole head nor any of a body|no valid HTTP", refusal(text)) and is_closed
    assert not app.asked


async def test_a_long_body_is_no_endless_head() -> None:
    body = b"x" * (MAX_UNREAD * 3)
    chunks = [b"1000\r\n%b\r\n" % body[at:at + 4096] for at in range(0, len(body), 4096)]
    _, _, app = await told([CHUNKED, *chunks, b"0\r\n\r\n"])
    assert [len(asked[1]) for asked in app.asked] == [len(body)]


async def test_trailers_are_no_headers() -> None:
    _, _, app = await told([CHUNKED + b"2\r\n{}\r\n0\r\n", b"Authorization: Bearer x\r\n", b"X: y\r\n\r\n"])
    (path, body, headers), = app.asked
    assert (path, body) == ("/", b"{}") and headers.keys() == {b"host", b"transfer-encoding"}


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
async def test_who_asks_for_another_protocol_is_answered_in_this_one(protocol: bytes) -> None:
    """As Java's HttpClient does with each call of a connection, body or none."""
    head = b"/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\n"
    posted, got = b"POST " + head + b"Content-Length: 2\r\n\r\n{}", b"GET " + head + b"\r\n"
    for data in ([posted, posted, got, posted], posted + got + posted + posted, [posted[:-1], posted[-1:] + got]):
        text, _, app = await told(data)
        wanted = [b"{}", b"{}", b"", b"{}"] if isinstance(data, list) and len(data) == 4 else (
            [b"{}", b"", b"{}", b"{}"] if isinstance(data, bytes) else [b"{}", b""])
        assert [asked[1] for asked in app.asked] == wanted
        assert text.count("200 OK") == len(wanted) and "400" not in text


async def test_requests_that_come_together_are_answered_in_their_order() -> None:
    text, _, _ = await told(b"".join(ASKED % i for i in range(20)))
    assert re.findall(r"/(\d+)(?=HTTP|$)", text) == [str(i) for i in range(20)]


async def test_too_many_that_come_together_are_answered_and_then_refused() -> None:
    app = App()
    app.go.clear()
    asyncio.get_running_loop().call_later(0.001, app.go.set)
    text, is_closed, _ = await told(b"".join(ASKED % i for i in range(2000)), app)
    assert text.count("200 OK") == 65 and "wait for the answer to another" in refusal(text) and is_closed


@pytest.mark.parametrize("bad", [b"nonsense\r\n\r\n", CHUNKED + b"zz\r\n", b"GET / HTTP/1.1\r\n\r\n"],
                         ids=["nonsense", "its-body", "no-host"])
async def test_what_is_wrong_behind_a_call_waits_for_its_answer(bad: bytes) -> None:
    app = App()
    app.go.clear()
    asyncio.get_running_loop().call_later(0.001, app.go.set)
    text, is_closed, _ = await told([ASKED % 1 + ASKED % 2, bad, ASKED % 3], app)
    assert text.startswith("HTTP/1.1 200 OK") and text.count("200 OK") == 2 and is_closed
    assert refusal(text) and [asked[0] for asked in app.asked] == ["/1", "/2"]


async def test_a_body_that_goes_wrong_while_it_is_read() -> None:
    text, is_closed, app = await told([CHUNKED, b"2\r\n{}\r\n", b"zz\r\n"])
    assert refusal(text) and is_closed and app.ends == ["gone"] and not app.asked


async def test_an_answer_that_has_begun_is_not_mixed_with_a_refusal() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    text, is_closed, _ = await told([CHUNKED, b"zz\r\n"], app)
    assert text.count("HTTP/1.1 ") == 1 and text.endswith("\r\n\r\no") and is_closed


async def test_the_one_that_is_answered_hears_that_the_client_has_gone() -> None:
    """Also where others wait behind it."""
    ends = list[str]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ends.append(scope["path"])

    connection, _ = connected(app)
    connection.data_received(ASKED % 1 + ASKED % 2)
    await asyncio.sleep(0)
    connection.connection_lost(None)
    await asyncio.wait_for(asyncio.gather(*connection.tasks), 5)
    assert ends == ["/1"]


async def test_what_was_answered_early_is_read_to_its_end() -> None:
    """A call that is refused by its head: the body comes nevertheless, then the next call."""
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    text, is_closed, _ = await told([CHUNKED, b"zz\r\n", ASKED % 1], app)
    assert text.count("HTTP/1.1 ") == 1 and " 413 " in text and is_closed, "no second answer to one call"
    text, is_closed, _ = await told([b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n", b"GET ", b"/ HT",
                                     ASKED % 1], app)
    assert text.count(" 413 ") == 2 and " 400 " not in text and not is_closed


async def test_nothing_is_taken_for_a_call_behind_the_last_one() -> None:
    text, is_closed, app = await told(b"GET /1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + ASKED % 2)
    assert [asked[0] for asked in app.asked] == ["/1"] and text.count("HTTP/1.1 ") == 1 and is_closed
