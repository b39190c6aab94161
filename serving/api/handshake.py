"""`Handshake`: a new TLS connection until its handshake is done; only then there is an HTTP connection.

asyncio reports no connection before that: peers that open many and say nothing would hold files that are not counted,
each for a minute. Here such a connection is a peer like any other that waits for a head.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from serving.api.connections import HEAD, Connections


class Handshake(asyncio.Protocol):
    """make: the protocol that takes over."""

    def __init__(self, others: Connections, context: ssl.SSLContext, make: Callable[[], asyncio.Protocol]):
        self._others, self._context, self._make = others, context, make
        self._task: asyncio.Task[None] | None = None
        self._early = b""  # what came with the end of the handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.pause_reading()  # the first bytes are not for this protocol
        self._seconds = self._others.head_timeout_s() or None
        self._others.enter(self)
        self._task = asyncio.get_running_loop().create_task(self._shake_hands())

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.leave(self)

    def end(self, reason: str) -> None:
        """Close it now."""
        self._others.closed[reason] += 1
        self._transport.abort()
        if self._task is not None:
            self._task.cancel()

    async def _shake_hands(self) -> None:
        if self._transport.is_closing():
            return
        try:
            encrypted = await asyncio.wait_for(asyncio.get_running_loop().start_tls(
                self._transport, self, self._context, server_side=True), self._seconds)
        except asyncio.TimeoutError:
            self.end(HEAD)
        except OSError:  # no TLS, another version, no certificate, gone: nothing that a server could mend
            self._transport.abort()
        else:
            if encrypted is not None:
                self._hand_over(encrypted)
        finally:
            self._others.leave(self)

    def _hand_over(self, encrypted: asyncio.Transport) -> None:
        self._others.leave(self)
        protocol = self._make()
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        if self._early:
            protocol.data_received(self._early)


def with_tls(others: Connections, context: ssl.SSLContext,
             connection: Callable[..., asyncio.Protocol]) -> Callable[..., asyncio.Protocol]:
    """For uvicorn's `http`: connections that begin with a handshake."""
    return lambda **options: Handshake(others, context, lambda: connection(**options))
