"""An engine of this process behind a gate on the loopback, and clients of it: `RemoteClient`s and raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import zmq
import zmq.asyncio

from serving.cluster.engine_gate import EngineGate
from xllm.client.cluster_keys import ClusterKeys, cluster_keys
from xllm.client.gate_wire import HELLO, Hello, ServedModel, greeting
from xllm.client.local import LocalClient
from xllm.client.remote import RemoteClient
from xllm.engine.core import EngineCore
from xllm.engine.step_log import StepReport

KEYS = cluster_keys(b"a secret of enough bytes")
MODEL = ServedModel(("demo",), "a fingerprint")


class WatchedLocal(LocalClient):
    """A `LocalClient` with what a server wants to know of its engine besides. silent_s: what it says of that."""

    phase, restarting_after, steps = "ready", None, StepReport()

    def __init__(self, core: EngineCore):
        super().__init__(core)
        self.on_steps: Callable[[StepReport], None] = lambda steps: None
        self.silent_s = 0.0

    @property
    def is_up(self) -> bool:
        return self.dead_reason is None

    @property
    def engines(self) -> tuple[WatchedLocal, ...]:
        return (self,)

    def silent_for_s(self) -> float:
        return self.silent_s


class GatedClient(RemoteClient):
    """Connected to `gate`, which serves `engine`."""

    engine: WatchedLocal
    gate: EngineGate


@contextlib.asynccontextmanager
async def gate_of(engine: WatchedLocal, address: str = "127.0.0.1:0") -> AsyncIterator[EngineGate]:
    gate = EngineGate(engine, [engine], KEYS, Path("/"))
    gate.listen(address)
    gate.open(MODEL)
    try:
        yield gate
    finally:
        gate.close()


@contextlib.asynccontextmanager
async def gated_client(engine: WatchedLocal) -> AsyncIterator[GatedClient]:
    async with gate_of(engine) as gate:
        client = GatedClient(gate.address, KEYS)
        client.engine, client.gate = engine, gate
        await client.connect()
        try:
            yield client
        finally:
            client.close()


class RawPeer:
    """A connection that sends what it is told to, and reads only when it is told to."""

    def __init__(self, address: str, keys: ClusterKeys | None = KEYS):
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.instance_public)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.client_public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.client_secret)
        self._socket.connect(f"tcp://{address}")
        self.num_sent_bytes = 0  # behind the greeting

    def send(self, *parts: bytes) -> None:
        self.num_sent_bytes += 0 if parts[-1].startswith(HELLO) else len(parts[-1])
        self._socket.send_multipart(parts)

    async def read(self, timeout_s: float = 5.0) -> bytes:
        """The next frame. Raises asyncio.TimeoutError."""
        frame: bytes = await asyncio.wait_for(self._socket.recv(), timeout_s)
        return frame

    async def greet(self) -> bytes:
        self.send(greeting(HELLO, Hello("raw")))
        return await self.read()

    async def farewell(self, timeout_s: float = 5.0) -> str:
        """The reason why it was dropped; what comes before is read and forgotten."""
        while not (frame := await self.read(timeout_s)).startswith(b"G"):
            pass
        return frame[1:].decode()

    def close(self) -> None:
        self._socket.close()
