"""`KeyValueStore`: the metadata store as the cluster's parts use it, whichever `StoreLink` leads to it.

It is asynchronous: the master and the API process of an instance are one event loop each, and a lease should stand for
a loop that turns. Make it within the loop that uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from serving.cluster.key_value import (
    Changes,
    Committed,
    Compare,
    KeyValue,
    Snapshot,
    Write,
    check_commit,
)
from serving.cluster.lease import StoreLease
from serving.cluster.store_errors import (
    CompactedError,
    LeaseLostError,
    StoreClosedError,
    StoreError,
    StoreUnreachableError,
)
from serving.cluster.store_link import StoreLink
from serving.cluster.watch import Watch
from serving.cluster.within import within

REQUEST_S = 3.0  # for an answer. Chosen: etcd writes to a busy disk in less; upstream's leases last as long
PROBE_S = 1.0  # between looks at whether the store answers. Chosen: a state that a person sees is as old at most
_RETRY_S = 0.3  # between tries to connect at the start. Chosen: a store that is just being started is met soon
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreState:
    """Whether the store answers. since_s: since when it is so, as `time.time()` has it. reason: why it does not."""

    is_up: bool
    since_s: float
    reason: str = ""

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_s))
        return f"up since {when}" if self.is_up else f"stale since {when}: {self.reason}"


class KeyValueStore:
    """A store behind a namespace, a prefix that its keys are given there and do not have here.

    Make it, `await start()`, use it, `await close()`; `async with` does both. All methods raise StoreUnreachableError
    or StoreRefusedError, which name the store and the cause. Of a write that was not answered it is not known whether
    it happened.
    """

    def __init__(self, link: StoreLink, *, namespace: bytes = b""):
        self._link, self._namespace = link, namespace
        self._state = StoreState(False, time.time(), "it was not asked yet")
        self._identity, self._revision, self._epoch = "", 0, 0
        self._identifying = asyncio.Lock()
        self._is_closed = False
        self._leases: set[StoreLease] = set()
        self._interruption: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._prober: asyncio.Task[None] | None = None

    @property
    def state(self) -> StoreState:
        """Whether it answers, as of `PROBE_S` and `REQUEST_S` ago at most. While it does not, what watches have told is
        what was last known."""
        return self._state

    @property
    def name(self) -> str:
        """Kind and address, for messages."""
        return self._link.name

    async def __aenter__(self) -> KeyValueStore:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self, wait_s: float = 0.0) -> None:
        """Connect. wait_s: for how long a store that does not answer is asked again; a refusal is final."""
        until_s = time.monotonic() + wait_s
        try:
            while True:
                try:
                    await self.epoch()
                    break
                except StoreUnreachableError:
                    if time.monotonic() >= until_s:
                        raise
                    await asyncio.sleep(_RETRY_S)
        except BaseException:
            await self.close()
            raise
        self._prober = asyncio.create_task(self._probe(), name="store-probe")

    async def close(self) -> None:
        """Let go of it. Leases are not refreshed any more and expire: revoke those whose keys should go at once.
        Whatever is asked after it raises StoreClosedError, and so do watches. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._interrupt()
        if self._prober is not None:
            self._prober.cancel()
            await asyncio.gather(self._prober, return_exceptions=True)
        for lease in self._leases:
            await lease.abandon("the store was closed")
        await self._link.close()

    async def get(self, key: bytes) -> KeyValue | None:
        """The item, or None if there is no such key."""
        found = await self._ask(self._link.read(self._namespace + key, is_prefix=False))
        return next(map(self._shown, found.items), None)

    async def get_prefix(self, prefix: bytes) -> Snapshot:
        """All items whose keys begin with `prefix`, at one revision."""
        found = await self._ask(self._link.read(self._namespace + prefix, is_prefix=True))
        return Snapshot(found.revision, tuple(map(self._shown, found.items)))

    async def put(self, key: bytes, value: bytes, lease: StoreLease | None = None) -> int:
        """Write an item, which ends with the lease if there is one; returns the revision. Raises LeaseLostError."""
        if lease is not None and not lease.is_alive:
            raise LeaseLostError(f"{self.name}: the lease of {key!r} is lost: {lease.lost_reason}")
        return (await self.commit((), (Write(key, value, 0 if lease is None else lease.id),))).revision

    async def delete(self, key: bytes) -> None:
        """Delete an item; one that is not there is no error."""
        await self.commit((), (Write(key, None),))

    async def commit(self, conditions: Sequence[Compare], writes: Sequence[Write]) -> Committed:
        """Write all at one revision if every condition holds, else nothing: a transaction. Raises LeaseLostError if the
        store does not have a lease that it names, ValueError for what no store takes (`check_commit`)."""
        named = tuple(dataclasses.replace(write, key=self._namespace + write.key) for write in writes)
        check_commit(named)
        wanted = tuple(dataclasses.replace(compare, key=self._namespace + compare.key) for compare in conditions)
        return await self._ask(self._link.commit(wanted, named))

    async def grant(self, ttl_s: int) -> StoreLease:
        """A lease of at least so many seconds, refreshed until it is revoked, it is lost or the store is closed."""
        asked_s = time.monotonic()
        lease = StoreLease(self._link, await self._ask(self._link.grant(ttl_s)), asked_s)
        self._leases = {other for other in self._leases if other.is_alive} | {lease}
        return lease

    def watch(self, prefix: bytes, revision: int | None = None) -> Watch:
        """What is under the prefix and how it changes; see `Watch`."""
        return Watch(self, prefix, revision)

    # --- for watches

    @property
    def interruption(self) -> asyncio.Future[None]:
        """See `WatchedStore`."""
        return self._interruption

    async def epoch(self) -> int:
        """See `WatchedStore`. A store that has counted fewer writes than before was restored from a copy."""
        async with self._identifying:
            found = await self._ask(self._link.identify())
            if self._identity and (found.name != self._identity or found.revision < self._revision):
                logger.warning("%s: it is not the store that it was, but wiped or restored (revision %d, before %d)",
                               self.name, found.revision, self._revision)
                self._epoch += 1
                self._interrupt()
            self._identity, self._revision = found.name, found.revision
            return self._epoch

    async def changes(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        """See `WatchedStore`."""
        try:
            async with aclosing(self._link.watch(self._namespace + prefix, revision)) as stream:
                async for found in stream:
                    yield Changes(found.revision, tuple(
                        dataclasses.replace(change, key=change.key[len(self._namespace):],
                                            item=None if change.item is None else self._shown(change.item))
                        for change in found.changes))
        except StoreError as error:
            if not isinstance(error, CompactedError):
                self._note(error)
            raise

    # ---

    async def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        """The answer; what it says about the connection is noted."""
        if self._is_closed:
            question.close()
            raise StoreClosedError(f"{self.name}: this end was closed")
        try:
            answer = await within(REQUEST_S, question)
        except asyncio.TimeoutError:
            if self._is_closed:
                raise StoreClosedError(f"{self.name}: this end was closed") from None
            error = StoreUnreachableError(f"{self.name}: no answer within {REQUEST_S:g} s")
            self._note(error)
            raise error from None
        except StoreError as error:
            self._note(None if isinstance(error, LeaseLostError) else error)
            raise
        self._note(None)
        return answer

    def _note(self, error: StoreError | None) -> None:
        if error is None and not self._state.is_up:
            if self._identity:
                logger.info("%s: it answers again", self.name)
            self._state = StoreState(True, time.time())
            self._interrupt()
        elif error is not None and self._state.is_up:
            logger.warning("%s; going on with what was last known", error)
            self._state = StoreState(False, time.time(), str(error))
        elif error is not None:
            self._state = dataclasses.replace(self._state, reason=str(error))

    def _interrupt(self) -> None:
        """Have watches connect again: a connection that was silent in an outage may never speak again."""
        self._interruption.set_result(None)
        self._interruption = asyncio.get_running_loop().create_future()

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            with contextlib.suppress(StoreError):  # it is noted
                await self.epoch()

    def _shown(self, item: KeyValue) -> KeyValue:
        return dataclasses.replace(item, key=item.key[len(self._namespace):])
