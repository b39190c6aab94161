"""`Connection`: uvicorn's HTTP/1.1 protocol with bounds on how long a peer may take, and on how many peers there are.

uvicorn waits for ever for a request's head, for its body and for a reader; whoever opens connections and says little
(slow-loris), or reads nothing, would hold sockets and memory as long as they like.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.api.errors import invalid
from serving.config import END_REASONS, ConnectionSettings

HEAD, BODY, WRITE, FULL = END_REASONS


class Connection(H11Protocol):
    """Subclasses made by `connection_class` know the settings."""

    settings: ConnectionSettings
    closed: Counter[str]  # connections that were ended here, by reason

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        if len(self.connections) > self.settings.max_connections:
            self._end(FULL)
        else:
            self._arm(HEAD, self.settings.head_timeout)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        state = self.conn.their_state
        self._keep(HEAD, self.settings.head_timeout, state is h11.IDLE)
        self._keep(BODY, self.settings.body_timeout, state is h11.SEND_BODY)

    def on_response_complete(self) -> None:
        """Pipelined requests are read in here, without data coming in."""
        super().on_response_complete()
        self._keep(BODY, self.settings.body_timeout, self.conn.their_state is h11.SEND_BODY)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm(WRITE, self.settings.write_timeout)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm(WRITE)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in (HEAD, BODY, WRITE):
            self._disarm(name)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As every other error of the API is written."""
        body = msgspec.json.encode(invalid(msg).body())
        head = h11.Response(status_code=400, headers=[(b"content-type", b"application/json"), (b"connection", b"close"),
                                                      (b"content-length", str(len(body)).encode())])
        events = (head, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _keep(self, name: str, seconds: float, wanted: bool) -> None:
        """A timer runs from when its state was entered, whatever trickles in meanwhile."""
        if not wanted:
            self._disarm(name)
        elif name not in self._timers:
            self._arm(name, seconds)

    def _arm(self, name: str, seconds: float) -> None:
        self._disarm(name)
        if seconds:
            self._timers[name] = self.loop.call_later(seconds, self._end, name)

    def _disarm(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    def _end(self, reason: str) -> None:
        self.closed[reason] += 1
        self.transport.abort()


def connection_class(settings: ConnectionSettings, closed: Counter[str]) -> Callable[..., H11Protocol]:
    """For uvicorn's `http`. closed: counts what ends here."""
    return type("BoundConnection", (Connection,), {"settings": settings, "closed": closed})
