"""`Registration`: keeps an instance's record in the metadata store for as long as the instance lives."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable

from serving.cluster.instance_record import ROLES, BadRecordError, InstanceRecord, instance_key, read_record
from serving.cluster.key_value import KeyValue, Write, absent, unchanged
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.lease import StoreLease
from serving.cluster.store_errors import LeaseLostError, StoreClosedError, StoreError, StoreUnreachableError
from serving.cluster.within import within
from xllm.errors import XllmError

LEASE_S = 3  # as upstream's
CHECK_S = 0.5  # between looks at the record. As upstream's
START_S = 60.0  # for a store that does not answer at the start. As upstream's 30 tries of 2 s
TAKEN_S = 1.0  # beyond the lease, in which a predecessor's record goes. Chosen: a store that is late
_TELL_S = 5.0  # between log lines while the store is waited for. Chosen: a person sees that it goes on
logger = logging.getLogger("xllm.cluster")


class NameTakenError(XllmError):
    """Another instance lives under this name."""


async def start_store(store: KeyValueStore, wait_s: float = START_S) -> None:
    """Connect, and say what is waited for. Raises StoreUnreachableError after `wait_s`, StoreRefusedError at once."""
    until_s = time.monotonic() + wait_s

    async def tell() -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            logger.warning("the metadata store does not answer yet: %s; it is tried for %.0f s more",
                           store.state.reason, max(0.0, until_s - time.monotonic()))

    telling = asyncio.create_task(tell(), name="store-wait")
    try:
        await store.start(wait_s)
    finally:
        telling.cancel()


class Registration:
    """Make it, `await start()`, at the end `drain()` and `await close()`. The store is its owner's to start and close.

    describe(): the record as it is now, but for `register_ts_ms` and `draining`, which are written here; None: there is
    no engine, and what is written stays. It is asked every `CHECK_S`, and what has changed, or is missing as after a
    lost lease or in a store that was wiped, is written again. While the store does not answer, nothing else is done.
    """

    def __init__(self, store: KeyValueStore, describe: Callable[[], InstanceRecord | None], *, lease_s: int = LEASE_S):
        self._store, self._describe, self._lease_s = store, describe, lease_s
        self._lease: StoreLease | None = None
        self._since_ms: dict[str, int] = {}  # of our incarnations, by when each was registered first
        self._is_draining = False
        self._wake = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._said = ""
        self.is_registered = False  # as of the last look

    async def start(self, wait_s: float = START_S) -> None:
        """Write the record. A record of another life under this name may be that of a predecessor which was killed: its
        lease gets the time to end. Raises NameTakenError, StoreError after `wait_s` without an answer."""
        begun_s = time.monotonic()
        while True:
            try:
                other = await self._reconcile()
            except StoreUnreachableError:
                if time.monotonic() - begun_s > wait_s:
                    raise
                other = None
            if self.is_registered or self._describe() is None:  # the engine has died since: the keeper goes on
                break
            if other is not None:
                if time.monotonic() - begun_s > self._lease_s + TAKEN_S:
                    raise NameTakenError(f"{_taken(other)}: end it, or give this one another --instance-name")
                self._say(f"{_taken(other)}: waiting for its lease to end")
            await asyncio.sleep(CHECK_S / 2)
        self._keeper = asyncio.create_task(self._keep(), name="registration")

    def drain(self) -> None:
        """Have the record say that the instance takes no more requests."""
        self._is_draining = True
        self._wake.set()

    async def close(self) -> None:
        """Delete the record, at once if the store answers. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self.is_registered = False
        if self._lease is not None:
            lease, self._lease = self._lease, None
            await lease.revoke()

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(CHECK_S, self._wake.wait())
            self._wake.clear()
            try:
                other = await self._reconcile()
            except StoreClosedError:
                return
            except StoreError as error:  # the store has said so
                self.is_registered = self._lease is not None and self._lease.is_alive
                logger.debug("the record is not looked after: %s", error)
            except Exception:
                logger.exception("looking after the record failed")
            else:
                if other is not None:
                    self._say(f"{_taken(other)}, so that this one is not registered any more")

    async def _reconcile(self) -> KeyValue | None:
        """Have the store say what is so. Returns the item of another instance that has the name."""
        if (record := self._current()) is None:
            return None
        if self._lease is None or not self._lease.is_alive:
            self._lease = await self._store.grant(self._lease_s)
        write = Write(record.key, record.encode(), self._lease.id)
        item = await self._store.get(record.key)
        if item is not None and (item.value, item.lease) == (write.value, write.lease):
            self.is_registered = True
            return None
        if item is not None and not self._is_ours(item):
            self.is_registered = False
            return item
        conditions = [unchanged(item)] if item is not None else [
            absent(instance_key(role, record.name)) for role in ROLES]
        try:
            done = await self._store.commit(conditions, [write])
        except LeaseLostError:  # it was wiped; the next look grants another one
            self._lease, self.is_registered = None, False
            return None
        if not done.succeeded:
            self.is_registered = False
            return await self._other(record)
        if item is None:
            logger.info("registered as %s in %s", record.key.decode(), self._store.name)
        self.is_registered, self._said = True, ""
        return None

    def _current(self) -> InstanceRecord | None:
        record = self._describe()
        if record is None:
            return None
        since_ms = self._since_ms.setdefault(record.incarnation_id, time.time_ns() // 1_000_000)
        return dataclasses.replace(record, register_ts_ms=since_ms, draining=self._is_draining)

    async def _other(self, record: InstanceRecord) -> KeyValue | None:
        """Who has the name, in whichever role."""
        for role in ROLES:
            item = await self._store.get(instance_key(role, record.name))
            if item is not None and not self._is_ours(item):
                return item
        return None

    def _is_ours(self, item: KeyValue) -> bool:
        """Also of a write that was not answered."""
        try:
            return read_record(item.key, item.value).incarnation_id in self._since_ms
        except BadRecordError:
            return False

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            logger.warning("%s", text)


def _taken(item: KeyValue) -> str:
    try:
        other = read_record(item.key, item.value)
    except BadRecordError as error:
        return f"the key {item.key.decode(errors='replace')} is taken by what is no record ({error})"
    return (f"the instance name {other.name!r} is taken: {item.key.decode()} is incarnation {other.incarnation_id} at "
            f"{other.rpc_address}")
