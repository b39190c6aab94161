"""`StoreServer`: hands the embedded store of this process to other processes of this machine."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.key_value import Changes
from serving.cluster.store_errors import StoreError, StoreUnreachableError
from serving.cluster.store_wire import (
    ANSWERS,
    QUESTIONS,
    Commit,
    Follow,
    Grant,
    Identify,
    Read,
    Refresh,
    Refreshed,
    Revoke,
    Revoked,
    Socket,
    StoreAnswer,
    StoreFailure,
    StoreQuestion,
    listen,
)
from serving.cluster.within import within
from xllm.errors import ConfigError

LOOPBACK = "127.0.0.1"  # it serves this machine; a cluster of several has etcd
MAX_WAIT_S = 10.0  # of a `Follow`. Chosen: so long a client that is gone is remembered
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StorePlace:
    """Where the store of another process is. key: lets in whoever has it, so it is a secret."""

    port: int
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoreKey:
    """A CURVE key pair of a server."""

    public: bytes
    secret: bytes = field(repr=False)

    @staticmethod
    def new() -> StoreKey:
        """A random one."""
        return StoreKey(*zmq.curve_keypair())


class StoreServer:
    """Make it within the event loop of the store. `place` is what clients need.

    port: 0: any free one. key: None: a new one. With port and key of a server that has ended, its clients find this one
    by themselves. Raises ConfigError if the port is taken.
    """

    def __init__(self, store: EmbeddedStore, *, port: int = 0, key: StoreKey | None = None):
        key = key or StoreKey.new()
        self._store = store
        self._context = zmq.asyncio.Context()
        try:
            self._socket: Socket
            self._socket, port = listen(self._context, LOOPBACK, port, key.secret)
        except zmq.ZMQError as error:
            self._context.term()
            raise ConfigError(f"the embedded store cannot listen on {LOOPBACK}:{port}: {error}") from None
        self.place = StorePlace(port, key.public.decode())
        self._answering: set[asyncio.Task[None]] = set()
        self._reader = asyncio.create_task(self._read(), name="store-server")

    async def close(self) -> None:
        """Serve no more; the store stays."""
        tasks = [self._reader, *self._answering]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()

    async def _read(self) -> None:
        while True:
            parts = await self._socket.recv_multipart()
            try:
                client, number, frame = parts
                question = QUESTIONS.decode(frame)
            except (ValueError, msgspec.DecodeError) as error:
                logger.warning("a client of the embedded store sent what cannot be read: %s", error)
                continue
            if isinstance(question, Follow):
                task = asyncio.create_task(self._answer(client, number, question))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            else:
                await self._answer(client, number, question)

    async def _answer(self, client: bytes, number: bytes, question: StoreQuestion) -> None:
        try:
            answer = await self._answer_to(question)
        except StoreError as error:
            answer = StoreFailure(type(error).__name__, str(error))
        except Exception as error:  # a bug of ours; its client hears of it, and the others are served
            logger.exception("the embedded store failed")
            answer = StoreFailure(StoreUnreachableError.__name__, f"{self._store.name} failed: {type(error).__name__}")
        await self._socket.send_multipart((client, number, ANSWERS.encode(answer)))

    async def _answer_to(self, question: StoreQuestion) -> StoreAnswer:
        store = self._store
        if isinstance(question, Identify):
            return await store.identify()
        if isinstance(question, Read):
            return await store.read(question.prefix, is_prefix=question.is_prefix)
        if isinstance(question, Commit):
            if time.monotonic() > question.until_s:
                raise StoreUnreachableError(f"{store.name}: a write came too late and was not done")
            return await store.commit(question.conditions, question.writes)
        if isinstance(question, Grant):
            return await store.grant(question.ttl_s)
        if isinstance(question, Refresh):
            return Refreshed(await store.refresh(question.lease))
        if isinstance(question, Revoke):
            await store.revoke(question.lease)
            return Revoked()
        return await self._follow(question)

    async def _follow(self, question: Follow) -> Changes:
        store = self._store
        if (await store.identify()).name != question.identity:
            raise StoreUnreachableError(f"{store.name} is not the one that the watch began with")
        until_s = time.monotonic() + min(question.wait_s, MAX_WAIT_S)
        revision = question.revision
        while True:
            found = store.changes(question.prefix, revision)
            revision = max(revision, found.revision + 1)
            if found.changes or time.monotonic() >= until_s:
                return found
            try:
                await within(until_s - time.monotonic(), store.wait(revision))
            except asyncio.TimeoutError:
                continue
