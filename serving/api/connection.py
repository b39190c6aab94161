"""`Connection`: uvicorn's HTTP/1.1 protocol with bounds on how long a peer may take, and on how many peers there are.

uvicorn waits without a limit for a request's head, for its body and for a reader; peers that open connections and say
little (slow-loris), or read nothing, would hold sockets and memory as long as they like.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from functools import partial
from typing import cast

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.api.answer_port import AnswerPort, answer_through_port
from serving.api.connections import BODY, HEAD, WRITE, Connections
from serving.api.errors import invalid

# Bytes a second that a reader must take, on average over write_timeout. Chosen: slower than any modem.
SLOWEST_READER = 1024
KEPT_PLACE = "kept_place"  # in the scope's state: this connection is beyond max_connections


class Connection(H11Protocol):
    """Subclasses made by `connection_class` know the others."""

    others: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, AnswerPort(transport)))
        self.app = partial(answer_through_port, self.app)  # type: ignore[assignment, arg-type]
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._num_unread = 0  # bytes that the peer had not taken when the write timer was set
        self.app_state = {**self.app_state, KEPT_PLACE: not self.others.enter(self)}
        self._keep(HEAD, self.others.head_timeout_s(), not transport.is_closing())

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look_at_request()

    def on_response_complete(self) -> None:
        """Pipelined requests are read in here, without data coming in."""
        super().on_response_complete()
        self._look_at_request()

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
        super().connection_lost(exc)
        cast(AnswerPort, self.transport).on_lost()

    def send_400_response(self, msg: str) -> None:
        """As every other error of the API is written."""
        body = msgspec.json.encode(invalid(msg).body())
        head = h11.Response(status_code=400, headers=[(b"content-type", b"application/json"), (b"connection", b"close"),
                                                      (b"content-length", str(len(body)).encode()),
                                                      (b"x-request-id", uuid.uuid4().hex.encode())])
        events = (head, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def end(self, reason: str) -> None:
        """Close the connection now, whatever is unsent."""
        self.others.closed[reason] += 1
        self.transport.abort()

    def _look_at_request(self) -> None:
        state = self.conn.their_state
        headless = state is h11.IDLE and not self.flow.write_paused  # who reads an answer is not asked for more
        self.others.note_head(self, headless and not self.transport.is_closing())
        self._keep(HEAD, self.others.head_timeout_s(), headless)
        self._keep(BODY, self.others.settings.body_timeout, state is h11.SEND_BODY)

    def _watch_reader(self) -> None:
        """A reader may be slow, not still: what it takes in each write_timeout counts."""
        self._num_unread = self.transport.get_write_buffer_size()
        self._arm(WRITE, self.others.settings.write_timeout, self._judge_reader)

    def _judge_reader(self) -> None:
        num_taken = self._num_unread - self.transport.get_write_buffer_size()
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


def connection_class(others: Connections) -> Callable[..., asyncio.Protocol]:
    """For uvicorn's `http`."""
    return type("BoundConnection", (Connection,), {"others": others})
