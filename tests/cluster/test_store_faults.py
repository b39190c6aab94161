"""A store that is stopped, restarted, wiped, or out of reach: what is said of it, and that nothing is missed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from serving.cluster import embedded as embedded_module
from serving.cluster import key_value_store, served_link
from serving.cluster.embedded import EmbeddedStore
from serving.cluster.etcd_link import open_etcd
from serving.cluster.etcd_settings import EtcdSettings
from serving.cluster.key_value import Changes, Snapshot
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.served_link import ServedLink
from serving.cluster.store_errors import StoreRefusedError, StoreUnreachableError
from serving.cluster.store_server import StoreKey, StorePlace, StoreServer
from serving.cluster.store_wire import connect
from tests.cluster.etcd_process import EtcdProcess, stop
from tests.cluster.test_contract import following, told
from tests.parallel.test_meeting import free_port
from xllm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BACK_S = 5.0  # for a store to be found again


class ServedProcess:
    """An embedded store in a process of its own, with the face of `EtcdProcess`; it forgets everything as it ends."""

    def __init__(self) -> None:
        self._key, self._port = StoreKey.new(), free_port()
        self.place = StorePlace(self._port, self._key.public.decode())
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.served_process", str(self._port), self._key.public.decode(),
             self._key.secret.decode()], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdout.readline() == b"serving\n"

    def pause(self) -> None:
        assert self.process is not None
        stop(self.process)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(params=["etcd", "served"])
def remote(request: pytest.FixtureRequest) -> Iterator[EtcdProcess | ServedProcess]:
    made = request.getfixturevalue("etcd") if request.param == "etcd" else ServedProcess()
    made.start()
    yield made
    made.kill()


def opened(remote: EtcdProcess | ServedProcess) -> KeyValueStore:
    return open_etcd(remote.settings) if isinstance(remote, EtcdProcess) else KeyValueStore(ServedLink(remote.place))


async def until_up(store: KeyValueStore) -> None:
    until_s = time.monotonic() + BACK_S
    while not store.state.is_up:
        assert time.monotonic() < until_s, str(store.state)
        await asyncio.sleep(0.05)


async def test_a_store_that_is_stopped_is_said_to_be_stale_and_nothing_is_missed(remote, monkeypatch):
    monkeypatch.setattr(key_value_store, "REQUEST_S", 0.5)
    async with opened(remote) as store, store.watch(b"") as watch:
        assert told(await following(watch)) == []
        lease = await store.grant(1)
        began_s = time.time()
        remote.pause()
        with pytest.raises(StoreUnreachableError, match=r"127\.0\.0\.1:\d+: no answer within 0.5 s"):
            await store.put(b"maybe", b"")
        assert not store.state.is_up and began_s < store.state.since_s <= time.time()
        assert str(store.state).startswith("stale since 20") and "no answer within 0.5 s" in str(store.state)
        assert "it was not refreshed within 1 s (" in await asyncio.wait_for(lease.wait_lost(), 3)
        remote.go_on()
        await until_up(store)
        await store.put(b"a", b"1")
        events = []
        while (b"a", b"1") not in events:
            events += told(await following(watch))
        assert events in ([(b"maybe", b""), (b"a", b"1")], [(b"a", b"1")])


async def test_a_restarted_etcd_is_found_again_and_a_watch_goes_on(etcd):
    etcd.start()
    async with opened(etcd) as store, store.watch(b"") as watch:
        lease = await store.grant(30)
        await store.put(b"a", b"1", lease)
        assert told(await following(watch)) == [(b"a", b"1")]
        etcd.kill()
        until_s = time.monotonic() + BACK_S
        while "Connection refused" not in store.state.reason:  # at first the connection breaks
            assert time.monotonic() < until_s
            with pytest.raises(StoreUnreachableError, match=r"etcd at 127\.0\.0\.1:\d+: no connection: "):
                await store.put(b"b", b"")
        etcd.start()
        await until_up(store)
        await store.put(b"b", b"2", lease)
        event = await following(watch)
        assert isinstance(event, Changes) and told(event) == [(b"b", b"2")] and lease.is_alive


async def fill(store: KeyValueStore) -> None:
    async with store:
        for number in range(20):
            await store.put(b"new", b"%d" % number)


async def test_a_wiped_etcd_is_told_as_a_snapshot_even_if_it_has_counted_on(etcd):
    """Its revision is beyond that of the old one as it is met again."""
    etcd.start()
    async with opened(etcd) as store, store.watch(b"") as watch:
        lease = await store.grant(2)
        await store.put(b"old", b"1", lease)
        assert told(await following(watch)) == [(b"old", b"1")]
        etcd.kill()
        etcd.wipe()
        port, etcd.port = etcd.port, free_port()  # out of the sight of `store`
        await fill(opened(etcd.start()))
        etcd.kill()
        etcd.port = port
        etcd.start()
        event = await following(watch)
        assert isinstance(event, Snapshot) and told(event) == [(b"new", b"19")]
        assert await asyncio.wait_for(lease.wait_lost(), 3)


async def test_another_embedded_store_in_the_place_of_the_last_is_told_as_a_snapshot():
    key = StoreKey.new()
    server = StoreServer(EmbeddedStore(), key=key)
    async with KeyValueStore(ServedLink(server.place)) as store, store.watch(b"") as watch:
        lease = await store.grant(3)
        await store.put(b"old", b"1", lease)
        assert told(await following(watch)) == [(b"old", b"1")]
        await server.close()
        other = EmbeddedStore()
        await fill(KeyValueStore(other))
        server = StoreServer(other, port=server.place.port, key=key)
        event = await following(watch)
        assert isinstance(event, Snapshot) and told(event) == [(b"new", b"19")]
        assert "has no such lease" in await asyncio.wait_for(lease.wait_lost(), 3)
    await server.close()


async def test_another_member_of_etcd_takes_over(tmp_path, monkeypatch):
    monkeypatch.setattr(key_value_store, "REQUEST_S", 0.5)
    peers = [(f"m{n}", f"http://127.0.0.1:{free_port()}") for n in range(3)]
    members = [EtcdProcess(tmp_path, peers=[peers[n], *peers[:n], *peers[n + 1:]]) for n in range(3)]
    try:
        for member in members:
            member.start(is_awaited=False)
        for member in members:
            member.await_ready()
        settings = EtcdSettings(addresses=("127.0.0.1:1", *(member.address for member in members)))
        async with open_etcd(settings) as store, store.watch(b"") as watch:  # nothing listens at the first
            lease = await store.grant(3)
            await store.put(b"a", b"1", lease)
            assert told(await following(watch)) == [(b"a", b"1")]
            members[0].pause()  # the one that is spoken to
            with contextlib.suppress(StoreUnreachableError):
                await store.put(b"b", b"1")
            await until_up(store)
            members[0].kill()
            await store.put(b"b", b"2", lease)
            heard: list = []
            while (b"b", b"2") not in heard:
                heard += told(await following(watch))
            assert lease.is_alive and members[0].address not in store.name
    finally:
        for member in members:
            member.kill()


async def test_a_blocked_process_knows_at_once_that_its_lease_is_over():
    store = KeyValueStore(EmbeddedStore())
    async with store:
        lease = await store.grant(1)
        assert lease.is_alive
        time.sleep(1.1)
        assert not lease.is_alive and "this process did not run meanwhile" in lease.lost_reason
        assert "this process did not run meanwhile" in await asyncio.wait_for(lease.wait_lost(), 1)


async def test_the_embedded_store_keeps_a_bounded_past(monkeypatch):
    monkeypatch.setattr(embedded_module, "MAX_CHANGES", 10)
    async with KeyValueStore(EmbeddedStore()) as store:
        begin = await store.put(b"a", b"")
        revisions = [await store.put(b"b", b"%d" % number) for number in range(20)]
        async with store.watch(b"", revisions[-10]) as watch:
            assert len(told(await following(watch))) == 10
        for old in (begin, revisions[-11]):
            async with store.watch(b"", old) as watch:
                event = await following(watch)
                assert isinstance(event, Snapshot) and told(event) == [(b"a", b""), (b"b", b"19")]
        monkeypatch.setattr(embedded_module, "MAX_CHANGE_BYTES", 1000)
        large = await store.put(b"c", bytes(900))
        await store.put(b"c", bytes(901))
        async with store.watch(b"", large) as watch:
            assert isinstance(await following(watch), Snapshot)


async def test_the_served_store_hears_those_with_its_key_only(monkeypatch):
    monkeypatch.setattr(served_link, "CONNECT_S", 0.25)
    store = EmbeddedStore()
    server = StoreServer(store)
    try:
        other = StorePlace(server.place.port, StoreKey.new().public.decode())
        with pytest.raises(StoreRefusedError, match=r"embedded store at 127.0.0.1:\d+ refused this process's key"):
            await KeyValueStore(ServedLink(other)).start()
        nobody = StorePlace(free_port(), server.place.key)
        with pytest.raises(StoreUnreachableError, match=r"127.0.0.1:\d+: no connection, nothing listens there"):
            await KeyValueStore(ServedLink(nobody)).start()
        with pytest.raises(ConfigError, match="CURVE public key of 40 characters"):
            ServedLink(StorePlace(server.place.port, "guess"))
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1"):
            StoreServer(store, port=server.place.port)
        assert server.place.key not in repr(server.place)
        # One that has the key and sends rubbish harms nobody.
        context = zmq.asyncio.Context()
        raw, events = connect(context, "127.0.0.1", server.place.port, server.place.key, events=zmq.EVENT_CLOSED)
        async with KeyValueStore(ServedLink(server.place)) as client:
            for frames in ((b"",), (b"1", b""), (b"1", b"\xff"), (b"1", b"\x02\x93"), (b"1", b"\x00", b"more"),
                           (b"1", bytes(2**22))):
                await asyncio.wait_for(raw.send_multipart(frames), 3)
            await client.put(b"a", b"1")
            assert (await client.get(b"a")).value == b"1"
        raw.disable_monitor()
        events.close()
        raw.close(linger=0)
        context.term()
    finally:
        await server.close()


async def test_a_connection_that_stands_at_once_is_noticed(monkeypatch):
    """It is made by a thread of its own, which is quicker where this one has to wait for a processor."""
    watch_events = zmq.asyncio.Socket.get_monitor_socket

    def late(self, events):
        time.sleep(0.1)
        return watch_events(self, events)

    monkeypatch.setattr(zmq.asyncio.Socket, "get_monitor_socket", late)
    monkeypatch.setattr(served_link, "CONNECT_S", 0.5)
    server = StoreServer(EmbeddedStore())
    async with KeyValueStore(ServedLink(server.place)) as store:
        assert await store.put(b"a", b"1")
    await server.close()
