"""`StoreLease`: a lease that is refreshed in the background for as long as this process's event loop runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from serving.cluster.key_value import Granted
from serving.cluster.store_errors import StoreError
from serving.cluster.store_link import StoreLink
from serving.cluster.within import within

_REFRESHES = 3  # in a lease's time. Chosen: one may be lost, and another one late
_RETRY_S = 0.2  # after one that failed. Chosen: several tries fit into what is left of a lease of 2 s
logger = logging.getLogger(__name__)


class StoreLease:
    """Get one from `KeyValueStore.grant`. What is put under it is deleted by the store when it ends.

    It counts as lost, for good, once its time is over since a refresh was last *sent*, on this process's monotonic
    clock: before the store lets it end. A process that was stopped, or whose event loop was blocked, finds that out
    from `is_alive` as it runs again, before it has spoken to anybody.
    """

    def __init__(self, link: StoreLink, granted: Granted, asked_s: float):
        """asked_s: when the lease was asked for, on the `time.monotonic()` clock."""
        self.id, self.ttl_s = granted.lease, granted.ttl_s
        self._link = link
        self._until_s = asked_s + granted.ttl_s
        self._lost_reason = ""
        self._lost = asyncio.Event()
        self._keeper = asyncio.create_task(self._keep(), name=f"lease-{self.id:x}")

    @property
    def is_alive(self) -> bool:
        """Whether what was put under it is still there, but for what others have deleted."""
        return not self._lost_reason and time.monotonic() < self._until_s

    @property
    def lost_reason(self) -> str:
        """Why it was lost; empty while it is alive."""
        return "" if self.is_alive else self._lost_reason or self._overdue("")

    async def wait_lost(self) -> str:
        """Wait until the lease is lost or revoked; returns the reason."""
        await self._lost.wait()
        return self._lost_reason

    async def revoke(self) -> None:
        """End it now. If the store does not answer it is not refreshed any more, and expires."""
        await self.abandon("it was revoked")
        with contextlib.suppress(StoreError, asyncio.TimeoutError):
            await within(self.ttl_s, self._link.revoke(self.id))

    async def abandon(self, reason: str) -> None:
        """Stop refreshing it, as a process that dies does."""
        self._lose(reason)
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)

    async def _keep(self) -> None:
        try:
            self._lose(await self._refresh())
        except Exception as error:  # a bug of ours; who waits for the loss hears of it
            logger.exception("refreshing a lease failed")
            self._lose(f"it is not refreshed any more: {type(error).__name__}")

    async def _refresh(self) -> str:
        """Again and again; returns why the lease is lost."""
        cause, pause_s = "", self.ttl_s / _REFRESHES
        while True:
            await asyncio.sleep(min(pause_s, max(0.0, self._until_s - time.monotonic())))
            asked_s = time.monotonic()
            if asked_s >= self._until_s:
                return self._overdue(cause)
            try:
                # No try takes all of the time that is left: the next one may go to another member of the store.
                left_s = await within(min(self._until_s - asked_s, self.ttl_s / _REFRESHES),
                                      self._link.refresh(self.id))
            except StoreError as error:
                cause, pause_s = str(error), _RETRY_S
            except asyncio.TimeoutError:
                cause, pause_s = cause or f"{self._link.name}: no answer", 0.0
            else:
                if left_s <= 0:
                    return f"{self._link.name} has no such lease any more"
                self._until_s, cause, pause_s = asked_s + left_s, "", left_s / _REFRESHES

    def _overdue(self, cause: str) -> str:
        return f"it was not refreshed within {self.ttl_s:g} s ({cause or 'this process did not run meanwhile'})"

    def _lose(self, reason: str) -> None:
        self._lost_reason = self._lost_reason or reason
        self._lost.set()
