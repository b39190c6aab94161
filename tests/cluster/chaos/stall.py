"""`Stall`: how much this machine's other work holds the chaos run up."""

from __future__ import annotations

import asyncio
import time

STALLED_S = 1.0  # in all, above which what comes too late says nothing about the cluster
TICK_S = 0.05


class Stall:
    """How long this process has had to wait for its turn on a busy machine: what `follow` sleeps over what it asks
    for."""

    def __init__(self) -> None:
        self._over: list[tuple[float, float]] = []  # when, and how long

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            begun_s = time.monotonic()
            await asyncio.sleep(TICK_S)
            over_s = time.monotonic() - begun_s - TICK_S
            if over_s > TICK_S:
                self._over.append((begun_s, over_s))

    def since(self, begun_s: float) -> float:
        """Seconds."""
        return sum(over_s for at_s, over_s in self._over if at_s >= begun_s)
