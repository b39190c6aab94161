"""`EmbeddedStore`: the metadata store in this process, in memory: for one machine, and for tests. It counts, compares,
expires and forgets as etcd does, and passes the same tests."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable

from serving.cluster.key_value import (
    Changes,
    Committed,
    Compare,
    Granted,
    Identity,
    KeyChange,
    KeyValue,
    Snapshot,
    Write,
)
from serving.cluster.store_errors import CompactedError, LeaseLostError

# What is kept of the past, for watches that connect again. Chosen: minutes of a machine's cluster, in a memory that
# nobody misses.
MAX_CHANGES, MAX_CHANGE_BYTES = 10_000, 2**24


class _Expiring:
    """A lease: how long it lasts, until when, on the monotonic clock, and the keys that end with it."""

    def __init__(self, ttl_s: float):
        self.ttl_s, self.until_s = ttl_s, time.monotonic() + ttl_s
        self.keys: set[bytes] = set()


class EmbeddedStore:
    """A `StoreLink`. Make it within the event loop that uses it; several `KeyValueStore`s may.

    It ends with its process: another one has another identity, by which watches notice that all of it is gone.
    """

    name = "the embedded store"

    def __init__(self) -> None:
        self._identity = secrets.token_hex(8)
        self._revision = 1  # as etcd's, when it is empty
        self._items: dict[bytes, KeyValue] = {}
        self._leases: dict[int, _Expiring] = {}
        self._past: deque[KeyChange] = deque()
        self._past_bytes = 0
        self._compacted = 0  # the newest revision whose changes are not all kept
        self._news = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None

    async def identify(self) -> Identity:
        """See `StoreLink`."""
        return Identity(self._identity, self._revision)

    async def read(self, prefix: bytes, *, is_prefix: bool) -> Snapshot:
        """See `StoreLink`."""
        self._expire()
        keys = sorted(key for key in self._items if key.startswith(prefix)) if is_prefix else (
            [prefix] if prefix in self._items else [])
        return Snapshot(self._revision, tuple(self._items[key] for key in keys))

    async def commit(self, conditions: tuple[Compare, ...], writes: tuple[Write, ...]) -> Committed:
        """See `StoreLink`."""
        self._expire()
        if not all(map(self._holds, conditions)):
            return Committed(False, self._revision)
        for write in writes:
            if write.value is not None and write.lease and write.lease not in self._leases:
                raise LeaseLostError(f"{self.name} has no lease {write.lease:x}, which {write.key!r} should end with")
        self._apply(writes)
        return Committed(True, self._revision)

    async def grant(self, ttl_s: int) -> Granted:
        """See `StoreLink`."""
        lease = secrets.randbits(62) + 1
        self._leases[lease] = _Expiring(ttl_s)
        self._await_expiry()
        return Granted(lease, ttl_s)

    async def refresh(self, lease: int) -> float:
        """See `StoreLink`."""
        self._expire()
        found = self._leases.get(lease)
        if found is None:
            return 0.0
        found.until_s = time.monotonic() + found.ttl_s
        return found.ttl_s

    async def revoke(self, lease: int) -> None:
        """See `StoreLink`."""
        if (found := self._leases.pop(lease, None)) is not None:
            self._apply(Write(key, None) for key in sorted(found.keys))

    async def watch(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        """See `StoreLink`."""
        while True:
            found = self.changes(prefix, revision)
            revision = max(revision, found.revision + 1)
            if found.changes:
                yield found
            await self.wait(revision)

    async def close(self) -> None:
        """Nothing is to be let go of: what is stored stays for others that use it."""

    def changes(self, prefix: bytes, revision: int) -> Changes:
        """The changes under a prefix since that revision, itself included, maybe none. Raises CompactedError."""
        if revision <= self._compacted:
            raise CompactedError(f"{self.name}: changes up to revision {self._compacted} are not kept, and those from "
                                 f"{revision} on were asked for")
        since = list(itertools.takewhile(lambda change: change.revision >= revision, reversed(self._past)))
        found = tuple(change for change in reversed(since) if change.key.startswith(prefix))
        return Changes(self._revision, found)

    async def wait(self, revision: int) -> None:
        """Until there is a change at that revision or later."""
        while self._revision < revision:
            await self._news.wait()

    def compact(self, revision: int) -> None:
        """Forget changes up to that revision."""
        while self._past and self._past[0].revision <= revision:
            self._forget_one()
        self._compacted = max(self._compacted, min(revision, self._revision))

    def _holds(self, condition: Compare) -> bool:
        item = self._items.get(condition.key)
        found = (0 if condition.field != "value" else None) if item is None else getattr(item, condition.field)
        return bool(found == condition.expected)

    def _apply(self, writes: Iterable[Write]) -> None:
        revision, changes = self._revision + 1, []
        for write in writes:
            old = self._items.pop(write.key, None)
            if old is not None and old.lease in self._leases:
                self._leases[old.lease].keys.discard(write.key)
            if write.value is not None:
                item = KeyValue(write.key, write.value, revision if old is None else old.create_revision, revision,
                                write.lease)
                self._items[write.key] = item
                if write.lease:
                    self._leases[write.lease].keys.add(write.key)
                changes.append(KeyChange(write.key, revision, item))
            elif old is not None:
                changes.append(KeyChange(write.key, revision, None))
        if changes:
            self._revision = revision
            self._past += changes
            self._past_bytes += sum(map(_size, changes))
            while len(self._past) > MAX_CHANGES or self._past_bytes > MAX_CHANGE_BYTES:
                self.compact(self._past[0].revision)  # a commit's changes go together
            self._news.set()
            self._news = asyncio.Event()

    def _forget_one(self) -> None:
        self._past_bytes -= _size(self._past.popleft())

    def _expire(self) -> None:
        now = time.monotonic()
        for lease in [lease for lease, found in self._leases.items() if found.until_s <= now]:
            keys = self._leases.pop(lease).keys
            self._apply(Write(key, None) for key in sorted(keys))

    def _await_expiry(self) -> None:
        """Have leases expire at their time although nobody asks: watches hear of it."""
        if self._expiry is not None:
            self._expiry.cancel()
        if self._leases:
            next_s = min(found.until_s for found in self._leases.values()) - time.monotonic()
            self._expiry = asyncio.get_running_loop().call_later(max(0.0, next_s), self._expire_and_go_on)

    def _expire_and_go_on(self) -> None:
        self._expire()
        self._await_expiry()


def _size(change: KeyChange) -> int:
    return len(change.key) + (0 if change.item is None else len(change.item.value))
