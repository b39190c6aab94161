"""`Connection`: uvicorn's HTTP/1.1 protocol with bounds on how long a peer may take, and on how many peers there are.

uvicorn waits without a limit for a request's head, for its body and for a reader; peers that open connections and say
little (slow-loris), or read nothing, would hold sockets and memory as long as they like. Its parser, llhttp, which is
several times as fast as one in Python, has no bounds of its own and knows less of HTTP than it reads: what it lets
pass is refused here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from functools import partial
from typing import cast

import httptools
import msgspec
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from serving.api.answer_port import AnswerPort, answer_through_port
from serving.api.connections import BODY, HEAD, WRITE, Connections
from serving.api.errors import invalid

# Bytes a second that a reader must take, on average over write_timeout. Chosen: slower than any modem.
SLOWEST_READER = 1024
KEPT_PLACE = "kept_place"  # in the scope's state: this connection is beyond max_connections
# Requests that a peer sends behind one that is not answered yet. Chosen: hardly any client sends more than a few, and
# a read of 256 KiB has room for thousands.
MAX_QUEUED = 64
BODY_FIELDS = (b"content-length", b"transfer-encoding")


class Connection(HttpToolsProtocol):
    """Subclasses made by `connection_class` know the others. max_unread: bytes that may come without a head being
    whole, or anything of a body: heads, trailers and the extensions of chunks may have no end."""

    others: Connections
    max_unread: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, AnswerPort(transport)))
        self.app = partial(answer_through_port, self.app)  # type: ignore[assignment, arg-type]
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._num_untaken = 0  # bytes that the peer had not taken when the write timer was set
        self._num_unread, self._has_read = 0, False  # see `max_unread`
        self._is_in_body = False  # from a request's head to its end
        self._framing, self._repeats_head = list[tuple[bytes, bytes]](), False  # see `_without_upgrade`
        self._wrong = ""  # what was found to be wrong; nothing more is read
        self._running: RequestResponseCycle | None = None
        self.app_state = {**self.app_state, KEPT_PLACE: not self.others.enter(self)}
        self._keep(HEAD, self.others.head_timeout_s(), not transport.is_closing())

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._wrong:
            return
        self._has_read = False
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._refuse(self._wrong or f"this is no valid HTTP request: {error}")
        self._num_unread = 0 if self._has_read else self._num_unread + len(data)
        if self._num_unread > self.max_unread and not self._wrong:
            self._refuse(f"{self._num_unread} bytes came, and neither a whole head nor any of a body")
        self._look_at_request()

    def _parse(self, data: bytes) -> None:
        """Raises HttpParserError. No other protocol is offered: who asks for one (RFC 9110, 7.8) is answered in this
        one. Java's HttpClient does so with every call."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0]:])

    def _without_upgrade(self, rest: bytes) -> bytes:
        """What is to be parsed where a parser took all that follows a head for another protocol: the head again, as far
        as it says how long the body is, and the rest."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn: such data are dropped
        if not self._framing:
            return rest
        self._repeats_head = True
        return b"".join((b"POST / HTTP/1.1\r\n", *(b"%b: %b\r\n" % field for field in self._framing), b"\r\n", rest))

    # --- llhttp's calls; what they raise, `feed_data` raises as HttpParserError

    def on_message_begin(self) -> None:
        if not self._repeats_head:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._repeats_head:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_body:  # else a trailer, which nobody asks for, and which must not look like a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._repeats_head:
            self._check_head()
            super().on_headers_complete()
        self._has_read, self._is_in_body, self._repeats_head = True, True, False

    def on_body(self, body: bytes) -> None:
        self._has_read = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._framing = []
        if self.parser.should_upgrade():
            self._framing = [(name, value) for name, value in self.headers if name in BODY_FIELDS]
        if not self._framing:
            self._is_in_body = False
            super().on_message_complete()

    def _check_head(self) -> None:
        version, num_hosts = self.parser.get_http_version(), sum(name == b"host" for name, _ in self.headers)
        if version not in ("1.0", "1.1"):
            self._wrong = f"HTTP/{version} is not served, HTTP/1.1 is"
        elif num_hosts > 1 or (version == "1.1" and not num_hosts):
            self._wrong = f"a request of HTTP/1.1 has one Host header, this one has {num_hosts}"  # RFC 9112, 3.2
        elif self.parser.get_method() == b"CONNECT":
            self._wrong = "CONNECT is not served: this is no proxy"
        elif not self.url.startswith(b"/") or b"#" in self.url:  # what a proxy may read otherwise than this server
            self._wrong = "a request's target is a path, with a query or without, and no fragment"
        elif len(self.pipeline) >= MAX_QUEUED:
            self._wrong = f"more than {MAX_QUEUED} requests wait for the answer to another on this connection"
        if self._wrong:
            raise ValueError(self._wrong)

    # --- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Of requests that were sent together, the next one's turn comes in here."""
        super().on_response_complete()
        if self._wrong and self.cycle.response_complete and not self.transport.is_closing():
            self.send_400_response(self._wrong)
        self._look_at_request()

    def _refuse(self, wrong: str) -> None:
        """Answer what came before, say what is wrong, and close."""
        self._wrong = wrong
        if self._is_in_body and self.cycle.response_complete:  # it has its answer: a second one would be another's
            self.transport.close()
        elif self._is_in_body:
            self._drop_request()
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.send_400_response(wrong)

    def _drop_request(self) -> None:
        """The request whose body is being read is wrong itself."""
        self._is_in_body, cycle, running = False, self.cycle, self._running
        assert running is not None
        if cycle is not running:  # it was behind others, whose answers go on
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else running
            return
        is_answering = cycle.response_started
        cycle.disconnected = cycle.response_complete = True
        cycle.message_event.set()
        if is_answering:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm(WRITE)
        self._look_at_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.others.leave(self)
        for name in (HEAD, BODY, WRITE):
            self._disarm(name)
        if self._running is not None and not self._running.response_complete:  # uvicorn tells the newest one only
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        cast(AnswerPort, self.transport).on_lost()

    def send_400_response(self, msg: str) -> None:
        """As every other error of the API is written."""
        body = msgspec.json.encode(invalid(msg).body())
        head = {b"content-type": b"application/json", b"connection": b"close",
                b"content-length": str(len(body)).encode(), b"x-request-id": uuid.uuid4().hex.encode()}
        lines = [b"%b: %b\r\n" % field for field in (*self.server_state.default_headers, *head.items())]
        self.transport.write(b"".join((STATUS_LINE[400], *lines, b"\r\n", body)))
        self.transport.close()

    def end(self, reason: str) -> None:
        """Close the connection now, whatever is unsent."""
        self.others.closed[reason] += 1
        self.transport.abort()

    def _look_at_request(self) -> None:
        is_answered = self.cycle is None or self.cycle.response_complete
        # Who reads an answer is not asked for more.
        headless = is_answered and not self._is_in_body and not self.flow.write_paused
        self.others.note_head(self, headless and not self.transport.is_closing())
        self._keep(HEAD, self.others.head_timeout_s(), headless)
        self._keep(BODY, self.others.settings.body_timeout, self._is_in_body)

    def _watch_reader(self) -> None:
        """A reader may be slow, not still: what it takes in each write_timeout counts."""
        self._num_untaken = self.transport.get_write_buffer_size()
        self._arm(WRITE, self.others.settings.write_timeout, self._judge_reader)

    def _judge_reader(self) -> None:
        num_taken = self._num_untaken - self.transport.get_write_buffer_size()
        if num_taken >= SLOWEST_READER * self.others.settings.write_timeout:
            self._watch_reader()
        else:
            self.end(WRITE)

    def _keep(self, name: str, seconds: float, wanted: bool) -> None:
        """A timer runs from when its state was entered, whatever trickles in meanwhile."""
        if not wanted:
            self._disarm(name)
        elif name not in self._timers:
            self._arm(name, seconds, lambda: self.end(name))

    def _arm(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._disarm(name)
        if seconds:
            self._timers[name] = self.loop.call_later(seconds, then)

    def _disarm(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


def connection_class(others: Connections, max_unread: int) -> Callable[..., asyncio.Protocol]:
    """For uvicorn's `http`."""
    return type("BoundConnection", (Connection,), {"others": others, "max_unread": max_unread})
