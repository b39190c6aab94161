"""`Supervisor`: starts the engine again when it has died or hangs, so that a fault costs only the requests that it had.

An engine whose step takes longer than `step_timeout` is ended by force, with the step's number as the reason. Restarts
are bounded within a window: a fault that comes back at once would otherwise be repeated for ever, model load included.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from serving.config import ResilienceSettings
from xllm.client.process import ProcessClient
from xllm.errors import XllmError

LOOK_S = 0.1  # between two looks at the engine. Chosen: a fault is noticed that late
# Before a restart: four times as long each time within the window. Chosen: a passing fault costs little, a lasting one
# does not keep the machine busy.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
logger = logging.getLogger("xllm.supervisor")


class Supervisor:
    """Watches one engine. `run` returns when the engine is dead for good; cancel it to stop watching. name: what log
    lines call it."""

    def __init__(self, engine: ProcessClient, settings: ResilienceSettings, name: str = "the engine"):
        self._engine, self._settings, self._name = engine, settings, name
        self._restarts_s: deque[float] = deque()  # when, within the window
        self.num_restarts = 0

    async def run(self) -> None:
        """Watch the engine: end one that is stuck, start one that died again. Returns when it is dead for good."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._engine.dead_reason is None:
                self._end_if_stuck()
            elif not await self._restart(self._engine.dead_reason):
                return

    def _end_if_stuck(self) -> None:
        limit_s, silent_s = self._settings.step_timeout, self._engine.silent_for_s()
        if limit_s and self._engine.is_up and silent_s > limit_s:
            self._engine.end_process(f"no progress for {silent_s:.1f} s since step {self._engine.stats.num_steps} "
                                     f"(step_timeout {limit_s:g} s)")

    async def _restart(self, reason: str) -> bool:
        now = time.monotonic()
        while self._restarts_s and now - self._restarts_s[0] > self._settings.engine_restart_window:
            self._restarts_s.popleft()
        limit = self._settings.engine_restarts
        if len(self._restarts_s) >= limit:
            again = f" {limit} times within {self._settings.engine_restart_window:g} s" if limit else ""
            logger.error("%s stopped%s: %s; /health says so until a restart", self._name, again, reason)
            return False
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 4**len(self._restarts_s))
        self._restarts_s.append(now)
        self.num_restarts += 1
        logger.error("%s stopped: %s; it is started again (restart %d of at most %d within %g s)", self._name, reason,
                     len(self._restarts_s), limit, self._settings.engine_restart_window)
        try:
            await self._engine.restart(reason, pause_s)
            logger.info("%s is back after %.1f s", self._name, time.monotonic() - now)
        except XllmError as error:
            logger.error("%s did not come back: %s", self._name, error)
        return True
