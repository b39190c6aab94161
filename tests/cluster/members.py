"""Instances without HTTP: a gate over an engine of this process, and a registration; and a master's view of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from serving.cluster.engine_gate import EngineGate
from serving.cluster.instance_link import LinkSettings, MemberState
from serving.cluster.instance_record import InstanceRecord
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.registration import Registration
from serving.cluster.registry import Member, Registry
from tests.llm.gated import KEYS, WatchedLocal
from xllm.client.cluster_keys import ClusterKeys
from xllm.client.gate_wire import PROTOCOL, ServedModel
from xllm.client.remote import RemoteClient


class Instance:
    """open() lets clients in and registers. model: as its greeting says."""

    def __init__(self, engine: WatchedLocal, store: KeyValueStore, name: str, *, fingerprint: str = "f1",
                 type: int = 0, keys: ClusterKeys = KEYS):
        self.name, self.type = name, type
        self.model = ServedModel(("demo",), fingerprint)
        self.gate = EngineGate(engine, [engine], keys, Path("/"))
        self.registration = Registration(store, self.describe, lease_s=1)
        self.engine = engine

    @property
    def has_lease(self) -> bool:
        lease = self.registration._lease
        return lease is not None and lease.is_alive

    def describe(self) -> InstanceRecord | None:
        if not self.gate.incarnation:
            return None
        return InstanceRecord(
            name=self.name, rpc_address=self.gate.address, incarnation_id=self.gate.incarnation, register_ts_ms=0,
            type=self.type, http_address="127.0.0.1:8000", model_names=self.model.names,
            fingerprint=self.model.fingerprint, protocol=PROTOCOL, version="1", max_model_len=512, block_size=16)

    async def open(self) -> Instance:
        self.gate.listen("127.0.0.1:0")
        self.gate.open(self.model)
        await self.registration.start()
        return self

    async def close(self) -> None:
        await self.registration.close()
        self.gate.close()

    async def die(self) -> None:
        """As a killed process: its lease is not refreshed, its connections are closed."""
        registration = self.registration
        assert registration._keeper is not None and registration._lease is not None
        registration._keeper.cancel()
        await registration._lease.abandon("the process is gone")
        self.gate.close()


class Master:
    """A registry, and what it has said."""

    def __init__(self, store: KeyValueStore, *, keys: ClusterKeys = KEYS, silence_s: float = 5.0):
        self.joined: dict[str, RemoteClient] = {}
        self.left: list[tuple[str, str]] = []
        self.registry = Registry(store, LinkSettings(keys, silence_s=silence_s, last_retry_s=0.5),
                                 on_join=self._join, on_leave=self._leave)

    def _join(self, name: str, client: RemoteClient, record: InstanceRecord) -> None:
        assert name not in self.joined and client.is_up and client.incarnation == record.incarnation_id
        self.joined[name] = client

    def _leave(self, name: str, reason: str) -> None:
        assert self.joined.pop(name).dead_reason is not None
        self.left.append((name, reason))

    def member(self, name: str) -> Member | None:
        return next((member for member in self.registry.members() if member.name == name), None)

    def state(self, name: str) -> MemberState | None:
        member = self.member(name)
        return None if member is None else member.state

    async def sees(self, name: str, state: MemberState | None, reason: str = "") -> None:
        """Wait for it. reason: how that begins."""
        await self.until(lambda: self.state(name) is state and (
            state is None or self.member(name).reason.startswith(reason)))

    async def until(self, condition: Callable[[], object], timeout_s: float = 8.0) -> None:
        started_s = time.monotonic()
        while not condition():
            assert time.monotonic() - started_s < timeout_s, (self.registry.members(), self.left)
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def master_of(store: KeyValueStore, **options: object) -> AsyncIterator[Master]:
    master = Master(store, **options)  # type: ignore[arg-type]
    await master.registry.start()
    try:
        yield master
    finally:
        await master.registry.close()
        assert not master.joined


class Instances:
    """Makes them, and ends them with the test."""

    def __init__(self, engine: WatchedLocal):
        self._engine = engine
        self.made: list[Instance] = []

    async def __call__(self, store: KeyValueStore, name: str, **options: object) -> Instance:
        instance = Instance(self._engine, store, name, **options)  # type: ignore[arg-type]
        self.made.append(instance)
        return await instance.open()
