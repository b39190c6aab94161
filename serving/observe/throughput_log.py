"""`ThroughputLog`: a line every ten seconds about what the engine does, while it does something."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from xllm.client.engine_client import WatchedEngine
from xllm.client.merged_stats import merged_stats
from xllm.stats import EngineStats

INTERVAL_S = 10.0  # between two lines. Chosen: as vLLM's
logger = logging.getLogger("xllm.throughput")


class ThroughputLog:
    """The event loop's. model: its name, where there are others. clock: seconds, for tests."""

    def __init__(self, engine: WatchedEngine, *, model: str | None = None,
                 clock: Callable[[], float] = time.monotonic):
        self._engine, self._clock = engine, clock
        self._more = {} if model is None else {"model": model}
        self._before, self._before_s = self._each(), clock()

    def _each(self) -> list[EngineStats]:
        return [engine.stats for engine in self._engine.engines]

    def fields(self) -> dict[str, Any] | None:
        """What happened since the last call; None: nothing."""
        each, now_s = self._each(), self._clock()
        # An engine process that has taken the place of another counts from 0.
        before = merged_stats([EngineStats() if now.num_steps < then.num_steps else then
                               for now, then in zip(each, self._before, strict=True)])
        now, seconds = merged_stats(each), now_s - self._before_s
        self._before, self._before_s = each, now_s
        prompt_tokens = now.prompt_tokens_total - before.prompt_tokens_total
        generated_tokens = now.generation_tokens_total - before.generation_tokens_total
        if seconds <= 0 or not (prompt_tokens or generated_tokens or now.num_running or now.num_waiting):
            return None
        looked_up = now.prefix_queries_total - before.prefix_queries_total
        found = now.prefix_hits_total - before.prefix_hits_total
        return {**self._more, "prompt_tokens_per_s": round(prompt_tokens / seconds, 1),
                "generated_tokens_per_s": round(generated_tokens / seconds, 1),
                "running": now.num_running, "waiting": now.num_waiting, "kv_usage": round(now.kv_usage, 4),
                "prefix_hit_rate": round(found / looked_up, 4) if looked_up > 0 else None}

    async def run(self) -> None:
        """Log until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            if (fields := self.fields()) is not None:
                logger.info("throughput", extra={"fields": fields})
