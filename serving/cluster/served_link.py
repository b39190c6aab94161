"""`ServedLink`: the way to an embedded store in another process of this machine. The other end: `store_server.py`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from serving.cluster.key_value import Changes, Committed, Compare, Granted, Identity, Snapshot, Write
from serving.cluster.store_calls import (
    ANSWERS,
    CALLS,
    Commit,
    Follow,
    Grant,
    Identify,
    Read,
    Refresh,
    Revoke,
    StoreCall,
    StoreFailure,
)
from serving.cluster.store_errors import StoreClosedError, StoreError, StoreRefusedError, StoreUnreachableError
from serving.cluster.store_server import LOOPBACK, StorePlace
from serving.cluster.store_wire import connect
from serving.cluster.within import within
from xllm.errors import ConfigError

CONNECT_S = 2.0  # for the connection to stand. Chosen: some tries
COMMIT_S = 3.0  # within which a write is done or not at all. Chosen: so long its sender waits for an answer
FOLLOW_S = 5.0  # for which a watch waits for changes, before it asks again. Chosen: a server that died is noticed then
_FOLLOW_SLACK_S = 3.0  # for that answer to come. Chosen: as for any other
R = TypeVar("R")
logger = logging.getLogger(__name__)
_BROKEN = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_REFUSED = (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH)


class ServedLink:
    """A `StoreLink`. Make it within the event loop that uses it. Raises ConfigError for what is no key."""

    def __init__(self, place: StorePlace):
        self.name = f"the embedded store at {LOOPBACK}:{place.port}"
        self._context = zmq.asyncio.Context()
        try:
            self._socket, self._monitor = connect(self._context, LOOPBACK, place.port, place.key,
                                                  events=zmq.EVENT_HANDSHAKE_SUCCEEDED | _BROKEN | _REFUSED)
        except ValueError as error:
            self._context.term()
            raise ConfigError(str(error)) from None
        self._identity = ""
        self._numbers = itertools.count(1)
        self._waiting: dict[bytes, asyncio.Future[Any]] = {}
        self._is_up = asyncio.Event()
        self._is_refused = self._has_connected = self._is_closed = False
        self._tasks = [asyncio.create_task(self._read(), name="store-answers"),
                       asyncio.create_task(self._observe(), name="store-connection")]

    async def identify(self) -> Identity:
        """See `StoreLink`."""
        found = await self._ask(Identify())
        self._identity = found.name
        return found

    async def read(self, prefix: bytes, *, is_prefix: bool) -> Snapshot:
        """See `StoreLink`."""
        return await self._ask(Read(prefix, is_prefix))

    async def commit(self, conditions: tuple[Compare, ...], writes: tuple[Write, ...]) -> Committed:
        """See `StoreLink`."""
        return await self._ask(Commit(conditions, writes, time.monotonic() + COMMIT_S))

    async def grant(self, ttl_s: int) -> Granted:
        """See `StoreLink`."""
        return await self._ask(Grant(ttl_s))

    async def refresh(self, lease: int) -> float:
        """See `StoreLink`."""
        return await self._ask(Refresh(lease))

    async def revoke(self, lease: int) -> None:
        """See `StoreLink`."""
        await self._ask(Revoke(lease))

    async def watch(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        """See `StoreLink`."""
        identity = self._identity
        while True:
            call = Follow(prefix, revision, FOLLOW_S, identity)
            try:
                found = await within(FOLLOW_S + _FOLLOW_SLACK_S, self._ask(call))
            except asyncio.TimeoutError:
                raise StoreUnreachableError(f"{self.name}: a watch was not answered") from None
            revision = max(revision, found.revision + 1)
            if found.changes:
                yield found

    async def close(self) -> None:
        """See `StoreLink`."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail("this end was closed")
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    async def _ask(self, call: StoreCall[R]) -> R:
        if self._is_closed:
            raise StoreClosedError(f"{self.name}: this end was closed")
        try:
            if not self._is_up.is_set():
                await within(CONNECT_S, self._is_up.wait())
        except asyncio.TimeoutError:
            raise self._not_connected() from None
        number = next(self._numbers).to_bytes(8, "big")
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            try:
                await self._socket.send_multipart((number, CALLS.encode(call)), zmq.NOBLOCK)
            except zmq.Again:
                raise self._not_connected() from None
            found = await answer
        finally:
            del self._waiting[number]
        if isinstance(found, StoreFailure):
            raise found.error()
        result: R = found  # of the call with that number
        return result

    def _not_connected(self) -> StoreError:
        if self._is_refused:
            return StoreRefusedError(f"{self.name} refused this process's key: it is not that of the server there")
        cause = "the connection is lost" if self._has_connected else "no connection, nothing listens there"
        return StoreUnreachableError(f"{self.name}: {cause}")

    async def _read(self) -> None:
        while True:
            parts = await self._socket.recv_multipart()
            try:
                number, frame = parts
                answer = ANSWERS.decode(frame)
            except (ValueError, msgspec.DecodeError) as error:
                logger.error("%s sent what cannot be read: %s", self.name, error)
                continue
            if (waiting := self._waiting.get(number)) is not None and not waiting.done():
                waiting.set_result(answer)

    async def _observe(self) -> None:
        """Follow the connection: what was asked over one that broke is not answered any more."""
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_refused, self._has_connected = False, True
                self._is_up.set()
                continue
            # A server that cannot read the greeting hangs up without a word, once the connection stands.
            self._is_refused = bool(event & _REFUSED) or (self._is_refused and event == zmq.EVENT_DISCONNECTED)
            self._is_up.clear()
            self._fail("the connection broke")

    def _fail(self, why: str) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(StoreUnreachableError(f"{self.name}: {why}"))
