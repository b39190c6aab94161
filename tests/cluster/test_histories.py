"""Histories of concurrent clients, checked when they are over: of each store, of etcd as it fails; and that the
checkers find what is wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncGenerator, Callable

import pytest

from serving.cluster import embedded, key_value_store
from serving.cluster.embedded import EmbeddedStore
from serving.cluster.etcd_link import EtcdLink
from serving.cluster.etcd_settings import EtcdSettings
from serving.cluster.key_value import (
    Changes,
    Committed,
    Compare,
    Granted,
    KeyChange,
    KeyValue,
    Snapshot,
    Write,
    absent,
)
from serving.cluster.served_link import ServedLink
from serving.cluster.store_link import StoreLink
from serving.cluster.store_server import StorePlace, StoreServer
from tests.cluster.chaos.bad_network import BadNetwork
from tests.cluster.etcd_process import EtcdProcess
from tests.cluster.linearizable import NEVER
from tests.cluster.recording_link import Commit, Operation, Reading, Revoke
from tests.cluster.store_load import CLIENTS, StoreLoad
from tests.cluster.store_model import Belief, StoreModel, Watched, complaints_of_leaders, register_complaint

ALL = os.environ.get("HISTORIES_ALL") == "1"  # `make nightly`: longer, and with more seeds
SECONDS, SEEDS = (20.0, 3) if ALL else (0.8, 1)


async def judge(load: StoreLoad, seconds: float = SECONDS) -> None:
    complaints = await load.run(seconds)
    unknown = sum(operation.answer is None for operation in load.history.operations)
    print(f"{len(load.history.operations)} operations ({unknown} unanswered), {len(load.reigns)} reigns, "
          f"{len(load.leases)} leases, {sum(len(watched.events) for watched in load.watches)} events of watches")
    assert not complaints, "\n".join(complaints[:20])
    assert len(load.history.operations) > 100 * seconds and load.reigns and load.leases


@pytest.fixture(autouse=True)
def _nothing_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that has happened is read at the end."""
    monkeypatch.setattr(embedded, "MAX_CHANGES", 10**6)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_embedded_store(seed: int) -> None:
    store = EmbeddedStore()
    await judge(StoreLoad(lambda client: store, b"h/", seed))


@pytest.mark.parametrize("kind", ["etcd", "served"])
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_store_behind_networks_that_break(etcd: EtcdProcess, kind: str, seed: int,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client has a network of its own; connections break, and are silent for longer than is waited for; etcd is
    killed and started again."""
    monkeypatch.setattr(key_value_store, "REQUEST_S", 0.4)
    networks: dict[str, BadNetwork] = {}
    server: StoreServer | None = None
    if kind == "etcd":
        etcd.start()
        target = etcd.address
    else:
        server = StoreServer(EmbeddedStore())
        target = f"127.0.0.1:{server.place.port}"
    for name in ("auditor", *(f"{what}-{number}" for what, count in CLIENTS.items() for number in range(count))):
        networks[name] = await BadNetwork(target).open()

    def make(client: str) -> StoreLink:
        address = networks[client].address
        if server is None:
            return EtcdLink(EtcdSettings(addresses=(f"http://{address}",)), namespace=b"h/")
        return ServedLink(StorePlace(int(address.rpartition(":")[2]), server.place.key))

    faults = asyncio.create_task(_harm(networks, etcd if kind == "etcd" else None, SECONDS * 1.5))
    try:
        await judge(StoreLoad(make, b"h/", seed), SECONDS * 2)
    finally:
        faults.cancel()
        await asyncio.gather(faults, return_exceptions=True)
        for network in networks.values():
            await network.close()
        if server is not None:
            await server.close()


async def _harm(networks: dict[str, BadNetwork], etcd: EtcdProcess | None, seconds: float) -> None:
    """One after the other; whole again at the end."""
    victims = [networks[name] for name in ("write-0", "watch-1", "lease-0", "campaign-1", "watch-0")]
    pause_s = 0.12
    for turn in range(max(1, int(seconds / (len(victims) * pause_s + 0.6)))):
        for victim in victims:
            victim.cut()
            await asyncio.sleep(pause_s)
        silent = victims[turn % len(victims)]
        silent.is_swallowing = True
        await asyncio.sleep(0.5)
        silent.is_swallowing = False
        silent.cut()
        if etcd is not None and turn % 3 == 0:
            etcd.kill()
            await asyncio.sleep(0.1)
            await asyncio.to_thread(etcd.start)


# --- the checkers


def item(key: bytes, value: bytes, revision: int, lease: int = 0, created: int | None = None) -> KeyValue:
    return KeyValue(key, value, revision if created is None else created, revision, lease)


A1, A2, B2 = item(b"a", b"1", 11), item(b"a", b"2", 12, created=11), item(b"b", b"2", 12)
L3 = item(b"l", b"", 13, lease=7)
MODEL = StoreModel(Snapshot(10, ()), [
    KeyChange(b"a", 11, A1), KeyChange(b"a", 12, A2), KeyChange(b"b", 12, B2), KeyChange(b"l", 13, L3),
    KeyChange(b"l", 14, None)])
GOOD = [
    Operation("p", Commit((absent(b"a"),), (Write(b"a", b"1"),)), Committed(True, 11), 1.0, 1.2),
    Operation("q", Commit((absent(b"a"),), (Write(b"a", b"9"),)), Committed(False, 11), 1.1, 1.3),
    Operation("p", Reading(b"", True), Snapshot(11, (A1,)), 1.4, 1.5),
    Operation("q", Commit((Compare(b"a", "mod_revision", 11),), (Write(b"a", b"2"), Write(b"b", b"2"))), None, 1.6,
              NEVER),
    Operation("p", Reading(b"b", False), Snapshot(12, (B2,)), 1.7, 1.8),
    Operation("p", Commit((), (Write(b"l", b"", 7),)), Committed(True, 13), 1.9, 2.0),
    Operation("q", Reading(b"l", False), Snapshot(14, ()), 3.1, 3.2),
]


def but(number: int, **changed: object) -> list[Operation]:
    return [dataclasses.replace(operation, **changed) if place == number else operation  # type: ignore[arg-type]
            for place, operation in enumerate(GOOD)]


def test_a_good_history_has_no_complaint() -> None:
    assert MODEL.complaints(GOOD, [Belief("p", 7, 1.9, 3.0)]) == []
    assert MODEL.complaints([*GOOD, Operation("q", Revoke(7), True, 3.0, 3.05)], [Belief("p", 7, 1.9, 3.15)]) == []


@pytest.mark.parametrize(("history", "leases", "words"), [
    (but(0, answer=Committed(True, 12)), [], "p's commit answered 12, where its writes are not"),
    (but(0, answer=Committed(True, 10)), [], "p's commit answered 10, where its writes are not"),
    (but(0, asked=Commit((Compare(b"a", "value", b"0"),), (Write(b"a", b"1"),))), [], "conditions did not hold"),
    ([*GOOD[:4], Operation("r", GOOD[3].asked, Committed(True, 12), 1.6, 1.65), *GOOD[4:],
      Operation("s", GOOD[3].asked, Committed(True, 12), 1.6, 1.65)], [], "s's commit and r's answered 12"),
    (but(1, answer=Committed(False, 10)), [], "q's commit was refused at 10, where its conditions held"),
    (but(2, answer=Snapshot(11, ())), [], "p read at 11 what was not so"),
    (but(2, answer=Snapshot(12, (A1,))), [], "p read at 12 what was not so"),
    (but(4, answer=Snapshot(11, ()), begun_s=2.1, ended_s=2.2), [],
     "p was told of 11, after somebody had been told of 13"),
    (but(3, asked=Commit((), (Write(b"a", b"3"), Write(b"b", b"2")))), [], "nobody did what happened at 12"),
    (but(3, asked=Commit((absent(b"a"),), (Write(b"a", b"2"), Write(b"b", b"2")))), [],
     "nobody did what happened at 12"),
    (GOOD[1:], [], "nobody did what happened at 11"),
    (GOOD, [Belief("p", 7, 1.9, 3.3)], "p believed in a lease 0.100 s after its keys were gone"),
])
def test_a_wrong_history_is_found_out(history: list[Operation], leases: list[Belief], words: str) -> None:
    complaints = MODEL.complaints(history, leases)
    assert complaints and any(words in complaint for complaint in complaints), complaints


def test_a_key_that_goes_without_a_lease_or_alone_is_found_out() -> None:
    for gone in ([KeyChange(b"a", 13, None)], [KeyChange(b"l", 14, None)]):
        both = [KeyChange(b"a", 11, A1), KeyChange(b"l", 12, item(b"l", b"", 12, 7)),
                KeyChange(b"m", 13, item(b"m", b"", 13, 7))]
        model = StoreModel(Snapshot(10, ()), [*both[:2 if gone[0].key == b"a" else 3], *gone])
        writes = [Operation("p", Commit((), (Write(change.key, change.item.value, change.item.lease),)),
                            Committed(True, change.revision), float(change.revision), change.revision + 0.5)
                  for change in both]
        writes = writes[:2] if gone[0].key == b"a" else writes
        assert any("nobody did what happened" in complaint for complaint in model.complaints(writes))


A_CHANGES = MODEL.of_revision


@pytest.mark.parametrize(("events", "words"), [
    ([Snapshot(10, ()), Changes(11, tuple(A_CHANGES[11])), Changes(14, tuple(
        change for revision in (12, 13, 14) for change in A_CHANGES[revision]))], None),
    ([Changes(14, tuple(MODEL._changes))], None),
    ([Snapshot(12, (A2, B2)), Changes(14, tuple(A_CHANGES[13] + A_CHANGES[14]))], None),
    ([Snapshot(11, ())], "told a state at 11 that was not so"),
    ([Snapshot(14, (A2, B2)), Snapshot(12, (A2, B2))], "went back from 14 to 12"),
    ([Snapshot(10, ()), Changes(12, tuple(A_CHANGES[12]))], "told 2 changes for the 3 between 10 and 12"),
    ([Snapshot(11, (A1,)), Changes(12, tuple(A_CHANGES[12][:1])), Changes(13, tuple(A_CHANGES[13]))],
     "told 1 changes for the 2 between 11 and 12"),
    ([Snapshot(10, ()), Changes(12, tuple(A_CHANGES[12] + A_CHANGES[11]))], "told 3 changes"),
    ([Snapshot(11, (A1,)), Changes(11, tuple(A_CHANGES[11]))], "told 1 changes for the 0 between 11 and 11"),
    ([Snapshot(12, (A2, B2)), Changes(13, tuple(A_CHANGES[13]))], "ended before 1 changes from 14 on"),
])
def test_a_wrong_watch_is_found_out(events: list[Snapshot | Changes], words: str | None) -> None:
    start = 11 if isinstance(events[0], Changes) else None
    complaints = MODEL.complaints_of_watch(Watched(b"", start, events))
    assert complaints == [] if words is None else any(words in complaint for complaint in complaints), complaints


def reading(value: bytes | None, begun_s: float, ended_s: float) -> Operation:
    items = () if value is None else (item(b"r", value, 1),)
    return Operation("r", Reading(b"r", False), Snapshot(1, items), begun_s, ended_s)


def writing(value: bytes | None, begun_s: float, ended_s: float, *, was: bytes | None = None,
            done: bool = True) -> Operation:
    conditions = () if was is None else (Compare(b"r", "value", was),)
    answer = None if ended_s == NEVER else Committed(done, 1)
    return Operation("w", Commit(conditions, (Write(b"r", value),)), answer, begun_s, ended_s)


@pytest.mark.parametrize(("history", "is_fine"), [
    ([writing(b"1", 0, 1), reading(b"1", 2, 3)], True),
    ([writing(b"1", 0, 3), reading(None, 1, 2)], True),
    ([writing(b"1", 0, 3), reading(b"1", 1, 2), reading(b"1", 2.5, 4)], True),
    ([writing(b"1", 0, NEVER), reading(None, 1, 2), reading(b"1", 3, 4)], True),
    ([writing(b"1", 0, NEVER), reading(None, 1, 2)], True),
    ([writing(b"1", 0, 1), writing(b"2", 0, 1), reading(b"1", 2, 3), writing(b"3", 2, 5, was=b"2", done=False)], True),
    ([writing(b"1", 0, 1), reading(None, 2, 3)], False),  # stale
    ([writing(b"1", 0, 3), reading(b"1", 1, 2), reading(None, 2.5, 4)], False),  # there, and away again
    ([writing(b"1", 0, 1), writing(b"2", 2, 3, was=b"1", done=False)], False),  # refused without a reason
    ([writing(b"1", 0, 1), writing(b"2", 2, 5, was=b"1"), writing(b"3", 2, 5, was=b"1")], False),  # both won
    ([writing(b"1", 0, NEVER), reading(b"1", 1, 2), reading(None, 3, 4)], False),
    ([writing(b"1", 5, NEVER), reading(b"1", 1, 2)], False),  # before it was begun
])
def test_a_register_is_judged_without_revisions(history: list[Operation], is_fine: bool) -> None:
    complaint = register_complaint(b"r", history)
    assert (complaint is None) == is_fine, complaint


def test_two_leaders_at_a_time_are_found_out() -> None:
    assert complaints_of_leaders([Belief("a", 5, 1.0, 2.0), Belief("b", 6, 2.1, 3.0), Belief("c", 7, 2.5)]) == []
    assert complaints_of_leaders([Belief("a", 5, 1.0, 2.0), Belief("b", 6, 1.9, 3.0)]) == [
        "a and b led at a time, for 0.100 s"]
    assert complaints_of_leaders([Belief("a", 5, 1.0, 2.0), Belief("b", 5, 2.1, 3.0)]) == [
        "the token of b is 5, and before it was 5"]


class _Forgetful(EmbeddedStore):
    """Of each twenty commits it answers one, and does not do it."""

    num_commits = 0

    async def commit(self, conditions: tuple[Compare, ...], writes: tuple[Write, ...]) -> Committed:
        self.num_commits += 1
        if self.num_commits % 20 == 0:
            return Committed(True, self._revision)
        return await super().commit(conditions, writes)


class _Stale(EmbeddedStore):
    """A reading in three is of what was before the last write."""

    _before: tuple[int, dict[bytes, KeyValue]] = (1, {})
    num_readings = 0

    def _apply(self, writes) -> None:
        self._before = self._revision, dict(self._items)
        super()._apply(writes)

    async def read(self, prefix: bytes, *, is_prefix: bool) -> Snapshot:
        self.num_readings += 1
        if self.num_readings % 3 or is_prefix:
            return await super().read(prefix, is_prefix=is_prefix)
        revision, items = self._before
        return Snapshot(revision, tuple(item for key, item in items.items() if key == prefix))


@pytest.mark.parametrize(("make", "words"), [(_Forgetful, "where its writes are not"),
                                            (_Stale, "after somebody had been told")])
async def test_a_store_that_is_wrong_is_found_out(make: Callable[[], EmbeddedStore], words: str) -> None:
    store = make()
    complaints = await StoreLoad(lambda client: store, b"h/", 0).run(0.3)
    assert any(words in complaint for complaint in complaints), complaints[:5]
    assert make is _Stale or any("none of these can be next" in complaint for complaint in complaints), complaints[:5]


class _Careless(EmbeddedStore):
    """It does not compare."""

    def _holds(self, condition: Compare) -> bool:
        return True


class _Parting(EmbeddedStore):
    """Its watches tell a change at a time."""

    async def watch(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        async for found in super().watch(prefix, revision):
            for change in found.changes:
                yield Changes(change.revision, (change,))


class _Hasty(EmbeddedStore):
    """Leases end before their time."""

    async def grant(self, ttl_s: int) -> Granted:
        return Granted((await super().grant(ttl_s=0.2)).lease, ttl_s)  # type: ignore[arg-type]

    async def refresh(self, lease: int) -> float:
        return 1.0


@pytest.mark.parametrize(("make", "words", "seconds"), [
    (_Careless, "although its conditions did not hold", 0.3), (_Parting, "a watch of", 0.3),
    (_Hasty, "believed in a lease", 1.0)])
async def test_a_store_that_breaks_a_promise_is_found_out(make: Callable[[], EmbeddedStore], words: str,
                                                         seconds: float) -> None:
    store = make()
    complaints = await StoreLoad(lambda client: store, b"h/", 0).run(seconds)
    assert any(words in complaint for complaint in complaints), complaints[:5]
