"""Elections: of several that campaign for a key, one leads while its lease lasts.

The key is created by a compare-and-set commit under the winner's lease; whoever does not win waits until it is deleted.
As in etcd's own recipe (client/v3/concurrency) and Chubby's sequencers (Burrows, OSDI 2006), the revision at which the
key was created is the fencing token: later leaders of one store have larger ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

from serving.cluster.key_value import Changes, Compare, KeyValue, Snapshot, Write, absent, created_at
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.lease import StoreLease
from serving.cluster.store_errors import LeaseLostError, StoreClosedError, StoreError, StoreRefusedError

LEASE_S = 3  # as upstream's; a standby takes over within this and two seconds
_RETRY_S = 0.3  # after a store that did not answer. Chosen: as watches
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Leadership:
    """A won election; get it from `Election.campaign`. token: the key's revision, for fencing."""

    def __init__(self, store: KeyValueStore, key: bytes, token: int, lease: StoreLease):
        self.token = token
        self._store, self._key, self._lease = store, key, lease
        self._reason = ""
        self._over = asyncio.Event()
        self._tasks = [asyncio.create_task(self._follow_lease(), name="leader-lease"),
                       asyncio.create_task(self._follow_key(), name="leader-key")]

    @property
    def is_current(self) -> bool:
        """Whether this one leads. False before another one can win, except where somebody deletes the key by hand."""
        return not self._reason and self._lease.is_alive

    @property
    def guard(self) -> Compare:
        """A condition for commits that the leader alone may make: the store refuses those of one that was deposed."""
        return created_at(self._key, self.token)

    async def wait_lost(self) -> str:
        """Wait until this one does not lead any more; returns the reason."""
        await self._over.wait()
        return self._reason

    async def resign(self) -> None:
        """Let another one lead, at once if the store answers."""
        await self._end("it resigned")
        await self._lease.revoke()

    async def _follow_lease(self) -> None:
        self._lose(f"its lease was lost: {await self._lease.wait_lost()}")

    async def _follow_key(self) -> None:
        with contextlib.suppress(StoreRefusedError, StoreClosedError):  # then the lease is not refreshed either
            await _first(self._store, self._key,
                         lambda item: None if item is not None and item.create_revision == self.token else True)
            self._lose(f"the key {self._key!r} was deleted, or is another's")
            await self._lease.revoke()

    def _lose(self, reason: str) -> None:
        if not self._reason:
            self._reason = reason
            logger.info("leadership of %r (token %d) ends: %s", self._key, self.token, reason)
            self._over.set()

    async def _end(self, reason: str) -> None:
        self._lose(reason)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Election:
    """What one candidate needs. key: what is campaigned for. name: what it holds if this one wins, for others to read.

    Names tell candidates apart for people; two of one name are two candidates.
    """

    def __init__(self, store: KeyValueStore, key: bytes, name: bytes, *, lease_s: int = LEASE_S):
        self._store, self._key, self._name, self._lease_s = store, key, name, lease_s

    async def leader(self) -> bytes | None:
        """The name of who leads; None: nobody."""
        item = await self._store.get(self._key)
        return None if item is None else item.value

    async def campaign(self) -> Leadership:
        """Wait until this one leads; an outage of the store is waited out. Raises StoreRefusedError,
        StoreClosedError."""
        lease: StoreLease | None = None
        try:
            while True:
                try:
                    item = await self._store.get(self._key)
                    # An earlier try may have won without an answer.
                    if item is not None and lease is not None and lease.is_alive and item.lease == lease.id:
                        won, lease = Leadership(self._store, self._key, item.create_revision, lease), None
                        return won
                    if item is not None:
                        await _first(self._store, self._key, lambda item: True if item is None else None)
                    if lease is None or not lease.is_alive:
                        lease = await self._store.grant(self._lease_s)
                    done = await self._store.commit((absent(self._key),), (Write(self._key, self._name, lease.id),))
                    if done.succeeded:
                        won, lease = Leadership(self._store, self._key, done.revision, lease), None
                        return won
                except LeaseLostError:
                    continue
                except (StoreRefusedError, StoreClosedError):
                    raise
                except StoreError:  # the store's state says it
                    await asyncio.sleep(_RETRY_S)
        finally:
            if lease is not None:
                await lease.revoke()


async def _first(store: KeyValueStore, key: bytes, judge: Callable[[KeyValue | None], T | None]) -> T:
    """What `judge` says of the key's item (None: it is not there), as soon as that is not None."""
    async with store.watch(key) as watch:
        async for event in watch:
            for item in _states(event, key):
                if (found := judge(item)) is not None:
                    return found
    raise AssertionError("a watch does not end")


def _states(event: Snapshot | Changes, key: bytes) -> list[KeyValue | None]:
    """The key's items, one after the other; a watch of it tells of longer keys, too."""
    if isinstance(event, Changes):
        return [change.item for change in event.changes if change.key == key]
    return [next((item for item in event.items if item.key == key), None)]
