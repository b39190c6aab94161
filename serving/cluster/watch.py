"""`Watch`: the items under a prefix, as they are and as they change, without a gap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from serving.cluster.key_value import Changes, Snapshot
from serving.cluster.store_errors import CompactedError, StoreClosedError, StoreError, StoreRefusedError

_RETRY_S = 0.3  # after a connection that failed. Chosen: what a person does not notice, and few calls in an outage


class WatchedStore(Protocol):
    """What a watch needs of the store."""

    async def epoch(self) -> int:
        """Ask which store answers: another number than before if it is not the one that was known, as after a wipe."""

    async def get_prefix(self, prefix: bytes) -> Snapshot:
        """All of it now."""

    def changes(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        """From that revision on. Raises CompactedError."""

    @property
    def interruption(self) -> asyncio.Future[None]:
        """Done when connections that are open may have gone dead; then there is another one."""


class Watch:
    """Iterate it, within `async with`: a Snapshot first, then Changes.

    After lost connections it goes on with the next change. Where changes are not to be had any more (the store was
    compacted, wiped, or restored to what it was before) another Snapshot comes in their place. An outage is no event:
    `KeyValueStore.state` has it. Raises StoreRefusedError if the store refuses the very first read, StoreClosedError
    once the `KeyValueStore` is closed.

    revision: begin with the changes of that revision instead of with a Snapshot.
    """

    def __init__(self, store: WatchedStore, prefix: bytes, revision: int | None = None):
        self._store, self._prefix, self._revision = store, prefix, revision
        self._epoch: int | None = None
        self._events = self._run()

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._events.aclose()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Snapshot | Changes:
        return await self._events.__anext__()

    async def _run(self) -> AsyncGenerator[Snapshot | Changes, None]:
        has_begun = False
        while True:
            try:
                epoch = await self._store.epoch()
                if self._revision is None or self._epoch not in (None, epoch):
                    snapshot = await self._store.get_prefix(self._prefix)
                    self._revision, self._epoch, has_begun = snapshot.revision + 1, epoch, True
                    yield snapshot
                self._epoch = epoch
                async with aclosing(self._until_interrupted(self._revision)) as stream:
                    is_checked = False
                    async for changes in stream:
                        # Asked after the stream was opened: it is not that of a store which came since.
                        if not is_checked and await self._store.epoch() != self._epoch:
                            break
                        is_checked = has_begun = True
                        self._revision = changes.revision + 1
                        yield changes
            except CompactedError:
                self._revision = None
            except StoreError as error:
                is_final = isinstance(error, StoreRefusedError) and not has_begun
                if is_final or isinstance(error, StoreClosedError):
                    raise
                await asyncio.sleep(_RETRY_S)

    async def _until_interrupted(self, revision: int) -> AsyncGenerator[Changes, None]:
        interruption = self._store.interruption
        async with aclosing(self._store.changes(self._prefix, revision)) as stream:
            while True:
                step = asyncio.ensure_future(_next(stream))
                parties: set[asyncio.Future[Any]] = {step, interruption}
                try:
                    await asyncio.wait(parties, return_when=asyncio.FIRST_COMPLETED)
                finally:  # before the stream is closed
                    if not step.done():
                        step.cancel()
                        await asyncio.gather(step, return_exceptions=True)
                    elif not step.cancelled():
                        step.exception()  # has been seen, also if this one is cancelled
                if step.cancelled():
                    return
                yield step.result()


async def _next(stream: AsyncGenerator[Changes, None]) -> Changes:
    return await stream.__anext__()
