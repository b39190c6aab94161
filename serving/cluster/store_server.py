"""`StoreServer`: hands the embedded store of this process to other processes of this machine."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.store_calls import ANSWERS, CALLS, Follow, StoreAnswer, StoreCall, StoreFailure
from serving.cluster.store_errors import StoreError, StoreUnreachableError
from serving.cluster.store_wire import Socket, listen
from xllm.errors import ConfigError

LOOPBACK = "127.0.0.1"  # it serves this machine; a cluster of several has etcd
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
                call = CALLS.decode(frame)
            except (ValueError, msgspec.DecodeError) as error:
                logger.warning("a client of the embedded store sent what cannot be read: %s", error)
                continue
            if isinstance(call, Follow):
                task = asyncio.create_task(self._answer(client, number, call))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            else:
                await self._answer(client, number, call)

    async def _answer(self, client: bytes, number: bytes, call: StoreCall[StoreAnswer]) -> None:
        answer: StoreAnswer
        try:
            answer = await call.run(self._store)
        except StoreError as error:
            answer = StoreFailure(type(error).__name__, str(error))
        except Exception as error:  # a bug of ours; its client hears of it, and the others are served
            logger.exception("the embedded store failed")
            answer = StoreFailure(StoreUnreachableError.__name__, f"{self._store.name} failed: {type(error).__name__}")
        await self._socket.send_multipart((client, number, ANSWERS.encode(answer)))
