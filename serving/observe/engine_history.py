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
from xllm.shown import shown_in
from xllm.stats import EngineStats

SAMPLE_INTERVAL_S = 0.5  # chosen: fine enough for a curve, and rare enough to cost nothing
MAX_SAMPLES = 240  # two minutes of them
MAX_STEPS = 2048  # steps that are kept: some seconds of short ones. Chosen: bounds memory
HISTORY = ("num_running", "num_waiting", "kv_usage", "prompt_tokens_total", "generation_tokens_total",
           "prefix_queries_total", "prefix_hits_total", "num_steps")  # of `EngineStats`
HISTORY_COLUMNS = ("time_s", *(shown_in(EngineStats)[name].key for name in HISTORY))


def history_row(stats: EngineStats, now_s: float) -> tuple[float, ...]:
    """As `HISTORY_COLUMNS`."""
    return (now_s, *(getattr(stats, name) for name in HISTORY))


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
        self._rows.append(history_row(engine.stats, time.monotonic()))
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
