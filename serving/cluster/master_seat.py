"""`MasterSeat`: a master's place in the metadata store: its own key, and the election of who writes for all."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping

from serving.cluster.election import Election, Leadership
from serving.cluster.key_value import MAX_COMMIT_WRITES, Write
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.lease import StoreLease
from serving.cluster.store_errors import LeaseLostError, StoreClosedError, StoreError
from xllm.stats import EngineStats

SERVICE = b"XLLM:SERVICE:"  # before a master's address
LEADER_KEY = SERVICE + b"MASTER"
LOAD = b"XLLM:LOADMETRICS:"  # before an instance's name
LEASE_S = 3  # as upstream's
LOAD_S = 3.0  # between writes of loads. As upstream's
_CHECK_S = 0.5  # between looks at the own key. Chosen: as instances
logger = logging.getLogger("xllm.cluster")


class MasterSeat:
    """Make it, `start()`, `await close()`. All masters serve; the one that leads writes what each instance has to do.

    address: HOST:PORT of this master, which its key and, if it leads, the leader's have. loads(): by instance.
    """

    def __init__(self, store: KeyValueStore, address: str, loads: Callable[[], Mapping[str, EngineStats]], *,
                 load_s: float = LOAD_S):
        self._store, self._loads, self._load_s = store, loads, load_s
        self._address = address.encode()
        self._election = Election(store, LEADER_KEY, self._address, lease_s=LEASE_S)
        self._lease: StoreLease | None = None
        self._leadership: Leadership | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_leader(self) -> bool:
        """Whether this one writes."""
        return self._leadership is not None and self._leadership.is_current

    async def leader(self) -> str | None:
        """The address of the one that leads; None: nobody. Raises StoreError."""
        found = await self._election.leader()
        return None if found is None else found.decode(errors="replace")

    def start(self) -> None:
        """Begin. Outages of the store are waited out."""
        self._tasks = [asyncio.create_task(self._again(self._keep), name="master-key"),
                       asyncio.create_task(self._again(self._lead), name="master-election")]

    async def close(self) -> None:
        """Let another one lead, and delete the key, at once if the store answers. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._lease is not None:
            await self._lease.revoke()
            self._lease = None

    async def _again(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except StoreClosedError:
                return
            except StoreError as error:  # the store has said so
                logger.debug("this master's keys are not looked after: %s", error)
            except Exception:
                logger.exception("looking after this master's keys failed")
            await asyncio.sleep(_CHECK_S)

    async def _keep(self) -> None:
        """Have the own key there."""
        if self._lease is None or not self._lease.is_alive:
            self._lease = await self._store.grant(LEASE_S)
        lease = self._lease
        key = SERVICE + self._address
        item = await self._store.get(key)
        if item is None or item.lease != lease.id:
            try:
                await self._store.put(key, self._address, lease)
            except LeaseLostError:  # it was wiped
                self._lease = None

    async def _lead(self) -> None:
        """Until it is deposed, once it was elected."""
        leadership = self._leadership = await self._election.campaign()
        logger.info("this master leads (token %d)", leadership.token)
        lost = asyncio.create_task(leadership.wait_lost())
        try:
            while not lost.done():
                try:
                    await self._write_loads(leadership)
                except StoreClosedError:
                    raise
                except StoreError as error:  # it leads on as long as its lease lives
                    logger.debug("loads are not written: %s", error)
                await asyncio.wait({lost}, timeout=self._load_s)
            logger.warning("this master leads no more: %s", lost.result())
        finally:
            lost.cancel()
            self._leadership = None
            await leadership.resign()

    async def _write_loads(self, leadership: Leadership) -> None:
        """Under this master's own lease: what a dead one said of loads does not stay."""
        if (lease := self._lease) is None or not lease.is_alive:
            return  # the next time
        writes = [Write(LOAD + name.encode(), _load(stats), lease.id) for name, stats in self._loads().items()]
        known = {write.key for write in writes}
        writes += [Write(item.key, None) for item in (await self._store.get_prefix(LOAD)).items
                   if item.key not in known]
        for begin in range(0, len(writes), MAX_COMMIT_WRITES):
            await self._store.commit((leadership.guard,), writes[begin:begin + MAX_COMMIT_WRITES])


def _load(stats: EngineStats) -> bytes:
    """In upstream's words."""
    return json.dumps({"waiting_requests_num": stats.num_waiting,
                       "gpu_cache_usage_perc": round(stats.kv_usage, 4)}).encode()
