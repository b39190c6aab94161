"""`EngineHistory`: keeps the engine's gauges and steps of the last minutes, so that a live view does not begin
empty.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from xllm.client.engine_client import WatchedEngine
from xllm.engine.step_log import StepReport, StepTiming

SAMPLE_INTERVAL_S = 0.5  # chosen: fine enough for a curve, and rare enough to cost nothing
MAX_SAMPLES = 240  # two minutes of them
MAX_STEPS = 2048  # steps that are kept: some seconds of short ones. Chosen: bounds memory
HISTORY_COLUMNS = ("time_s", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens",
                   "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "engine_steps")


class EngineHistory:
    """The last two minutes of gauges and totals, and the last steps. The event loop owns it."""

    def __init__(self) -> None:
        self._rows: deque[tuple[float, ...]] = deque(maxlen=MAX_SAMPLES)
        self._steps: deque[StepTiming] = deque(maxlen=MAX_STEPS)
        self.cursor = (0, 0)  # rows and steps so far

    def take_steps(self, report: StepReport) -> None:
        self._steps.extend((round(end_s, 4), round(time_s, 6), num_tokens, num_seqs)
                           for end_s, time_s, num_tokens, num_seqs in report.recent)
        self.cursor = (self.cursor[0], self.cursor[1] + len(report.recent))

    def sample(self, engine: WatchedEngine) -> None:
        s = engine.stats
        self._rows.append((time.monotonic(), s.num_running, s.num_waiting, s.kv_usage, s.prompt_tokens_total,
                           s.generation_tokens_total, s.prefix_queries_total, s.prefix_hits_total, s.num_steps))
        self.cursor = (self.cursor[0] + 1, self.cursor[1])

    async def run(self, engine: WatchedEngine, also: Callable[[], None]) -> None:
        """Sample until cancelled; `also` is called after each sample."""
        engine.on_steps = self.take_steps
        while True:
            self.sample(engine)
            also()
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def since(self, cursor: tuple[int, int]) -> tuple[list[tuple[float, ...]], list[StepTiming]]:
        """Rows (as `HISTORY_COLUMNS`) and steps (as `STEP_COLUMNS`) that came after an earlier `cursor`, as far as
        they are still here."""
        num_rows, num_steps = (now - then for now, then in zip(self.cursor, cursor, strict=True))
        rows, steps = list(self._rows), list(self._steps)
        return rows[max(0, len(rows) - num_rows):], steps[max(0, len(steps) - num_steps):]
