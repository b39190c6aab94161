"""What every store does, on a real etcd, on one in this process, and on one that is served over a socket."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncGenerator

import pytest

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.etcd_link import EtcdLink
from serving.cluster.key_value import Changes, Compare, KeyValue, Snapshot, Write, absent, created_at, unchanged
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.store_errors import LeaseLostError, StoreClosedError, StoreUnreachableError
from serving.cluster.watch import Watch

SOON_S = 5.0  # for what comes at once; no test waits for so long


async def following(watch: Watch) -> Snapshot | Changes:
    return await asyncio.wait_for(anext(watch), SOON_S)


def told(event: Snapshot | Changes) -> list[tuple[bytes, bytes | None]]:
    """Keys and values of an event; None: deleted."""
    if isinstance(event, Snapshot):
        return [(item.key, item.value) for item in event.items]
    return [(change.key, change.item and change.item.value) for change in event.changes]


async def test_items(store, site):
    assert store.state.is_up and await store.get(b"a") is None
    first = await store.put(b"a", b"1")
    second = await store.put(b"a", b"")
    assert await store.get(b"a") == KeyValue(b"a", b"", first, second) and second > first
    # As upstream's keys of cached blocks: raw hashes, here with the bytes that have no successor.
    hashes = [b"CACHE:" + bytes([byte]) * 16 for byte in (0, 0x7F, 0xFE, 0xFF)]
    for key in reversed(hashes):
        await store.put(key, key)
    found = await store.get_prefix(b"CACHE:")
    assert [item.key for item in found.items] == hashes and found.revision >= second + 4
    assert [item.key for item in (await store.get_prefix(b"CACHE:\xff\xff")).items] == [hashes[-1]]
    async with site.open(b"elsewhere/") as other:
        assert (await other.get_prefix(b"CACHE:")).items == () and await other.get(b"a") is None
        await other.put(b"a", b"2")
        await other.delete(b"a")
    await store.delete(b"a")
    await store.delete(b"a")
    assert await store.get(b"a") is None
    assert (await store.put(b"a", b"3")) == (await store.get(b"a")).create_revision


async def test_a_commit_is_done_as_a_whole_or_not_at_all(store):
    done = await store.commit([absent(b"a"), absent(b"b")], [Write(b"a", b"1"), Write(b"b", b"1")])
    a, b = await store.get(b"a"), await store.get(b"b")
    assert done.succeeded and a.mod_revision == b.mod_revision == done.revision
    assert not (await store.commit([absent(b"c"), absent(b"b")], [Write(b"c", b"1"), Write(b"a", None)])).succeeded
    assert await store.get(b"c") is None and await store.get(b"a") == a
    put = await store.put(b"a", b"2")
    for condition, holds in ((unchanged(a), False), (created_at(b"a", a.create_revision), True),
                             (Compare(b"a", "value", b"1"), False), (Compare(b"a", "value", b"2"), True),
                             (Compare(b"none", "value", b""), False), (Compare(b"none", "mod_revision", 0), True),
                             (Compare(b"a", "mod_revision", put), True)):
        assert (await store.commit([condition], [Write(b"last", repr(condition).encode())])).succeeded == holds
        assert ((await store.get(b"last")) is not None) == holds
        await store.delete(b"last")
    assert (await store.commit([unchanged(b)], [Write(b"a", None), Write(b"b", b"2")])).succeeded
    assert await store.get(b"a") is None and (await store.get(b"b")).value == b"2"


async def test_what_no_store_takes_is_refused_before_it_is_sent(store):
    for writes, words in (([Write(b"a", b""), Write(b"a", None)], "once"), ([Write(b"a", bytes(2**20))], "bytes"),
                          ([Write(b"%d" % n, b"") for n in range(129)], "129 writes")):
        with pytest.raises(ValueError, match=words):
            await store.commit([], writes)
    assert await store.put(b"large", bytes(2**20 - 100))
    assert len((await store.get(b"large")).value) == 2**20 - 100


async def test_more_items_than_a_page_are_read_at_one_revision(store):
    keys = [b"%04d" % n for n in range(1025)]
    for begin in range(0, 1025, 128):
        await store.commit([], [Write(b"many:" + key, key) for key in keys[begin:begin + 128]])
    found = await store.get_prefix(b"many:")
    assert [item.value for item in found.items] == keys


async def test_a_watch_tells_all_changes_in_their_order(store, site):
    await store.put(b"a:1", b"old")
    async with store.watch(b"a:") as watch, site.open() as other:
        first = await following(watch)
        assert isinstance(first, Snapshot) and told(first) == [(b"a:1", b"old")]
        await other.put(b"b:1", b"not ours")
        await other.commit([], [Write(b"a:2", b"2"), Write(b"b:2", b""), Write(b"a:1", None)])
        both = await following(watch)
        assert isinstance(both, Changes) and sorted(told(both)) == [(b"a:1", None), (b"a:2", b"2")]
        for number in range(50):
            await other.put(b"a:n", b"%d" % number)
        heard: list[tuple[bytes, bytes | None]] = []
        while len(heard) < 50:
            heard += told(await following(watch))
        assert heard == [(b"a:n", b"%d" % number) for number in range(50)]
    async with store.watch(b"a:", both.revision + 1) as watch:  # from there again
        assert told(await following(watch))[0] == (b"a:n", b"0")
    async with store.watch(b"a:", both.revision) as watch:
        assert sorted(told(await following(watch)))[:2] == [(b"a:1", None), (b"a:2", b"2")]


async def test_where_changes_are_not_kept_a_snapshot_comes(store, site):
    """That of everything, so that what was deleted meanwhile is not missed."""
    begin = await store.put(b"a", b"1")
    await store.put(b"b", b"1")
    deleted = (await store.commit([], [Write(b"a", None)])).revision
    async with store.watch(b"", deleted + 1) as up_to_date, store.watch(b"", deleted) as behind:
        site.compact(deleted)
        async with store.watch(b"", begin) as far_behind:
            for watch in (behind, far_behind):
                event = await following(watch)
                assert isinstance(event, Snapshot) and told(event) == [(b"b", b"1")]
            await store.put(b"c", b"1")
            for watch in (up_to_date, behind, far_behind):
                event = await following(watch)
                assert isinstance(event, Changes) and told(event) == [(b"c", b"1")]
            site.compact((await store.get_prefix(b"")).revision)  # disturbs nobody who is up to date
            await store.put(b"d", b"1")
            for watch in (up_to_date, behind, far_behind):
                event = await following(watch)
                assert isinstance(event, Changes) and told(event) == [(b"d", b"1")]


async def test_a_lease_lasts_while_it_is_refreshed_and_its_keys_end_with_it(store, site):
    async with store.watch(b"") as watch:
        assert told(await following(watch)) == []
        crashed = site.open()
        await crashed.start()
        kept, left = await store.grant(3), await crashed.grant(site.lease_s)
        assert (kept.ttl_s, left.ttl_s) == (3, site.lease_s)
        until_s = kept._until_s
        await store.put(b"kept", b"", kept)
        await crashed.put(b"left", b"", left)
        await crashed.put(b"detached", b"", left)
        await crashed.put(b"detached", b"")  # without: it stays
        assert (await store.get(b"kept")).lease == kept.id
        began_s = time.monotonic()
        await crashed.close()  # as a process that dies: nobody refreshes its leases
        assert not left.is_alive
        seen = []
        while (b"left", None) not in seen:
            seen += told(await following(watch))
        assert site.lease_s * 0.6 < time.monotonic() - began_s < site.lease_s + 2
        while kept._until_s == until_s:  # until it is refreshed
            assert time.monotonic() < until_s
            await asyncio.sleep(0.05)
        assert kept.is_alive
        assert {item.key for item in (await store.get_prefix(b"")).items} == {b"kept", b"detached"}
        await kept.revoke()
        assert told(await following(watch)) == [(b"kept", None)]
        assert await kept.wait_lost() == "it was revoked"
        with pytest.raises(LeaseLostError, match="the lease of b'late' is lost: it was revoked"):
            await store.put(b"late", b"", kept)
        with pytest.raises(LeaseLostError, match=r"no .*lease"):  # nor does the store take it
            await store.commit([], [Write(b"late", b"", kept.id)])
        await kept.revoke()


async def test_the_loss_of_a_lease_is_reported(store, site):
    """Somebody revoked it; it is noticed at the next refresh."""
    lease = await store.grant(site.lease_s)
    await store.put(b"a", b"", lease)
    await store._link.revoke(lease.id)
    assert await store.get(b"a") is None
    reason = await asyncio.wait_for(lease.wait_lost(), site.lease_s)
    assert "has no such lease any more" in reason and not lease.is_alive and lease.lost_reason == reason


async def test_the_embedded_store_does_what_etcd_does(shared_etcd):
    """Random commits on both: the same answers, the same items and the same changes."""
    generator, marks = random.Random(18), (b"p/", b"q/")
    etcd, embedded = EtcdLink(shared_etcd.settings, namespace=b"random/"), EmbeddedStore()
    try:
        await etcd.identify()
        begin, begin_embedded = (await etcd.read(b"p/", is_prefix=True)).revision, embedded._revision

        def shifted(item: KeyValue | None, by: int) -> KeyValue | None:
            return item and KeyValue(item.key, item.value, item.create_revision - by, item.mod_revision - by)

        for _ in range(200):
            keys = generator.sample([mark + bytes([n]) for mark in marks for n in (0, 1, 0xFF)], 3)
            writes = tuple(Write(key, generator.choice((None, b"x", b"y"))) for key in keys[:generator.randint(0, 3)])
            held = await embedded.read(keys[0], is_prefix=False)
            created = generator.choice([0, 3, *(item.create_revision for item in held.items)])
            conditions = [Compare(keys[0], "value", b"x"), Compare(keys[0], "create_revision", created)]
            chosen = tuple(generator.sample(conditions, generator.randint(0, 2)))
            same = tuple(Compare(c.key, c.field, c.expected + begin - begin_embedded if c.expected else 0)
                         if isinstance(c.expected, int) else c for c in chosen)
            ours, theirs = await embedded.commit(chosen, writes), await etcd.commit(same, writes)
            assert (ours.succeeded, ours.revision - begin_embedded) == (theirs.succeeded, theirs.revision - begin)
        heard = []
        for link, start in ((embedded, begin_embedded), (etcd, begin)):
            found = [shifted(item, start) for item in (await link.read(b"q/", is_prefix=True)).items]
            last = (await link.commit((), (Write(b"q/end", b""),))).revision
            changes = []
            async for event in link.watch(b"q/", start + 1):
                changes += [(change.key, change.revision - start, shifted(change.item, start))
                            for change in event.changes]
                if changes[-1][1] == last - start:
                    break
            heard.append((found, sorted(changes, key=lambda change: change[1::-1])))
        assert heard[0] == heard[1] and len(heard[0][1]) > 50
    finally:
        await etcd.close()


async def test_whatever_is_asked_after_the_end_says_so(store, site):
    other = site.open()
    await other.start()
    lease = await other.grant(site.lease_s)
    async with other.watch(b"") as watch:
        await following(watch)
        waiting = asyncio.create_task(anext(watch))
        await asyncio.sleep(0.05)
        await other.close()
        await other.close()
        with pytest.raises(StoreClosedError, match=": this end was closed"):
            await asyncio.wait_for(waiting, SOON_S)
    with pytest.raises(StoreClosedError, match=": this end was closed"):
        await other.get(b"a")
    await lease.revoke()
    assert lease.lost_reason == "the store was closed" and await store.get(b"a") is None


async def test_a_watch_that_fails_as_its_reader_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever turn of the event loop: its error is seen, and is not reported when it is collected."""
    reported: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    async with KeyValueStore(EmbeddedStore()) as store:
        for turns in range(8):
            begun, broken = asyncio.Event(), asyncio.Event()

            async def changes(prefix: bytes, revision: int, begun=begun, broken=broken
                              ) -> AsyncGenerator[Changes, None]:
                begun.set()
                await broken.wait()
                raise StoreUnreachableError("the connection is gone")
                yield

            monkeypatch.setattr(store, "changes", changes)
            async with store.watch(b"a", 1) as watch:
                reader = asyncio.ensure_future(watch.__anext__())
                await begun.wait()
                broken.set()
                for _ in range(turns):
                    await asyncio.sleep(0)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            gc.collect()
    assert reported == []
