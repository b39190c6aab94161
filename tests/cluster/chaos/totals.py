"""`Totals`: what masters and instances have counted, those included that a fault has ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import httpx

from tests.cluster.chaos.cluster import ChaosCluster, Process

LOOK_S = 1.0  # between looks; what was counted behind the last one is lost with its process


class Totals:
    """`follow` it while faults come."""

    def __init__(self, cluster: ChaosCluster):
        self._cluster = cluster
        self._masters: dict[Process, dict[str, Any]] = {}
        self._landed: dict[Process, float] = {}

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        for master in self._cluster.masters:
            with contextlib.suppress(httpx.HTTPError):
                self._masters[master] = (await master.get().get("/cluster", timeout=10)).json()["totals"]
        for instance in self._cluster.instances:
            process = instance.now
            if process is not None and process.http is not None:
                with contextlib.suppress(httpx.HTTPError, RuntimeError):  # its client may be closed
                    found = await process.gauge("kv_lane_bytes_total", 0.0, lane="land")
                    self._landed[process] = max(found, self._landed.get(process, 0.0))

    async def of_masters(self) -> tuple[Counter[str], Counter[str]]:
        """Calls that went on elsewhere, by why, and handovers, by what came of them; up to now."""
        await self._look()
        recovered, handovers = Counter[str](), Counter[str]()
        for found in self._masters.values():
            handovers.update(found["handovers"])
            recovered.update({**found["recovered"], "given up": found["given_up"], "retried": found["retried"]})
        return recovered, handovers

    @property
    def landed_bytes(self) -> int:
        """Of KV that instances got from others."""
        return int(sum(self._landed.values()))
