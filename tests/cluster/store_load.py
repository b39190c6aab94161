"""Many clients of one store at a time, some behind bad networks, and the history of what they did."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Callable

from serving.cluster.election import Election
from serving.cluster.key_value import Changes, Compare, KeyChange, KeyValue, Snapshot, Write, absent, unchanged
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.store_errors import StoreError
from serving.cluster.store_link import StoreLink
from tests.cluster.recording_link import RecordingLink, StoreHistory
from tests.cluster.store_model import Belief, StoreModel, Watched, complaints_of_leaders, register_complaint

REGISTERS = tuple(b"r:%d" % number for number in range(4))
ACCOUNTS = tuple(b"t:%d" % number for number in range(3))
LEASE_S = 1
CLIENTS = {"write": 5, "transfer": 2, "lease": 2, "campaign": 3, "watch": 3}


class StoreLoad:
    """make(client): a link for a client of this name. namespace: of all keys."""

    def __init__(self, make: Callable[[str], StoreLink], namespace: bytes, seed: int):
        self._make, self._namespace, self._rng = make, namespace, random.Random(seed)
        self.history = StoreHistory()
        self.leases: list[Belief] = []
        self.reigns: list[Belief] = []
        self.watches: list[Watched] = []
        self._until_s = 0.0

    @contextlib.asynccontextmanager
    async def _open(self, client: str) -> AsyncIterator[KeyValueStore]:
        store = KeyValueStore(RecordingLink(self._make(client), self.history, client), namespace=self._namespace)
        await store.start(10)
        try:
            yield store
        finally:
            await store.close()

    @property
    def _is_on(self) -> bool:
        return time.monotonic() < self._until_s

    async def run(self, seconds: float) -> list[str]:
        """Play, and check; returns what is wrong."""
        async with self._open("auditor") as auditor:
            start = await auditor.get_prefix(b"")
            self._until_s = time.monotonic() + seconds
            players = [asyncio.create_task(play(f"{what}-{number}")) for what, play in (
                ("write", self._write), ("transfer", self._transfer), ("lease", self._lease),
                ("campaign", self._campaign)) for number in range(CLIENTS[what])]
            watchers = [asyncio.create_task(self._watch(f"watch-{number}", prefix, first)) for number, (prefix, first)
                        in enumerate(((b"", None), (b"r:", start.revision + 1), (b"t:", start.revision + 1)))]
            await asyncio.gather(*players)
            last = await _end(auditor)
            await asyncio.wait_for(asyncio.gather(*watchers), 10)
            changes = await _all_changes(auditor, start.revision + 1, last)
        return self._judge(start, changes)

    def _judge(self, start: Snapshot, changes: list[KeyChange]) -> list[str]:
        # Links see the namespace, stores and watches do not.
        model = StoreModel(_named(start, self._namespace), [_renamed(change, self._namespace) for change in changes])
        own = StoreModel(start, changes)
        found = model.complaints(self.history.operations, self.leases)
        for watched in self.watches:
            found += own.complaints_of_watch(watched)
        found += complaints_of_leaders(self.reigns)
        known_s = model.known_s(self.history.operations)
        found += [complaint for key in REGISTERS if (complaint := register_complaint(
            self._namespace + key, self.history.operations, known_s)) is not None]
        return found

    # --- players

    async def _write(self, client: str) -> None:
        """Registers: reads, writes, deletions and comparisons with what was read last."""
        rng, number = random.Random(self._rng.random()), 0
        async with self._open(client) as store:
            while self._is_on:
                key, number = rng.choice(REGISTERS), number + 1
                value = f"{client}/{number}".encode()
                with contextlib.suppress(StoreError):
                    kind = rng.random()
                    if kind < 0.3:
                        await store.put(key, value)
                        await asyncio.sleep(rng.random() * 0.01)
                        continue
                    item = await store.get(key)
                    condition = absent(key) if item is None else Compare(key, "value", item.value)
                    if kind < 0.4:
                        await store.commit([condition], [Write(key, None)])
                    elif kind > 0.6:
                        await store.commit([condition], [Write(key, value)])
                await asyncio.sleep(rng.random() * 0.01)

    async def _transfer(self, client: str) -> None:
        """Several keys in one transaction, if none of them has changed since they were read."""
        rng, number = random.Random(self._rng.random()), 0
        async with self._open(client) as store:
            while self._is_on:
                number += 1
                with contextlib.suppress(StoreError):
                    found = {item.key: item for item in (await store.get_prefix(b"t:")).items}
                    keys = rng.sample(ACCOUNTS, 2)
                    conditions = [unchanged(found[key]) if key in found else absent(key) for key in keys]
                    values = [None if rng.random() < 0.1 else f"{client}/{number}".encode() for _ in keys]
                    await store.commit(conditions, [Write(key, value) for key, value in zip(keys, values)])
                await asyncio.sleep(rng.random() * 0.02)

    async def _lease(self, client: str) -> None:
        """Keys under leases that are revoked, or left alone as by a process that dies."""
        rng, number = random.Random(self._rng.random()), 0
        async with self._open(client) as store:
            while self._is_on:
                number += 1
                with contextlib.suppress(StoreError):
                    lease = await store.grant(LEASE_S)
                    belief = Belief(client, lease.id, time.monotonic())
                    self.leases.append(belief)
                    for place in range(2):
                        await store.put(b"l:%s/%d/%d" % (client.encode(), number, place), b"", lease)
                    if rng.random() < 0.6:  # nobody refreshes it
                        lease._keeper.cancel()
                    until_s = time.monotonic() + rng.random() * 2 * LEASE_S
                    while time.monotonic() < until_s and self._is_on:
                        belief.note(lease.is_alive, time.monotonic())
                        await asyncio.sleep(0.01)
                    if rng.random() < 0.3:
                        await lease.revoke()
                    else:
                        await lease.abandon("the process is gone")

    async def _campaign(self, client: str) -> None:
        """Lead for a while, write as a leader, and resign, or vanish."""
        rng = random.Random(self._rng.random())
        async with self._open(client) as store:
            while self._is_on:
                election = Election(store, b"e:MASTER", client.encode(), lease_s=LEASE_S)
                campaign = asyncio.create_task(election.campaign())
                while self._is_on and not campaign.done():
                    await asyncio.wait({campaign}, timeout=0.05)
                if not campaign.done():
                    campaign.cancel()
                    await asyncio.gather(campaign, return_exceptions=True)
                    return
                won = campaign.result()
                reign = Belief(client, won.token, time.monotonic())
                self.reigns.append(reign)
                until_s = time.monotonic() + rng.random() * 0.4
                while time.monotonic() < until_s and won.is_current:
                    reign.note(won.is_current, time.monotonic())
                    with contextlib.suppress(StoreError):
                        await store.commit([won.guard], [Write(b"e:led", str(won.token).encode())])
                    await asyncio.sleep(0.01)
                if rng.random() < 0.6:
                    await won.resign()
                else:
                    await won._end("its process is gone")
                    await won._lease.abandon("its process is gone")
                    with contextlib.suppress(StoreError):  # it comes late
                        await store.commit([won.guard], [Write(b"e:led", b"late %d" % won.token)])

    async def _watch(self, client: str, prefix: bytes, revision: int | None) -> None:
        watched = Watched(prefix, revision)
        self.watches.append(watched)
        ends = {b"r:end", b"t:end"}
        async with self._open(client) as store, store.watch(prefix, revision) as watch:
            async for event in watch:
                watched.events.append(event)
                keys = {item.key for item in event.items} if isinstance(event, Snapshot) else {
                    change.key for change in event.changes}
                if ends & keys:
                    return


async def _end(store: KeyValueStore) -> int:
    """Write what watches end with, once; returns the revision."""
    while True:
        with contextlib.suppress(StoreError):
            await store.commit([absent(b"r:end")], [Write(prefix + b"end", b"end") for prefix in (b"r:", b"t:")])
            if (item := await store.get(b"r:end")) is not None:
                return item.mod_revision
        await asyncio.sleep(0.05)


async def _all_changes(store: KeyValueStore, revision: int, last: int) -> list[KeyChange]:
    """Told by a client that has seen nothing of it."""
    found: list[KeyChange] = []
    async with store.watch(b"", revision) as watch:
        async for event in watch:
            assert isinstance(event, Changes), "the store has forgotten its past"
            found += event.changes
            if event.revision >= last:
                return [change for change in found if change.revision <= last]
    raise AssertionError("a watch does not end")


def _named(snapshot: Snapshot, namespace: bytes) -> Snapshot:
    return Snapshot(snapshot.revision, tuple(_item(item, namespace) for item in snapshot.items))


def _renamed(change: KeyChange, namespace: bytes) -> KeyChange:
    item = None if change.item is None else _item(change.item, namespace)
    return KeyChange(namespace + change.key, change.revision, item)


def _item(item: KeyValue, namespace: bytes) -> KeyValue:
    return dataclasses.replace(item, key=namespace + item.key)
