"""`CallerLog`: counts what each caller of a server with keys has used, for that caller to see."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.observe.engine_history import MAX_SAMPLES, history_row
from serving.observe.request_log import RequestRecord
from xllm.stats import EngineStats


@dataclass(slots=True)
class CallerFigures:
    """Totals since the start, and the last two minutes of them as rows of `HISTORY_COLUMNS`."""

    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    cached_by_tier: Counter[str] = field(default_factory=Counter)  # prompt tokens, by where their KV was
    num_running: int = 0
    num_waiting: int = 0
    num_rows: int = 0  # so far
    rows: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))

    def stats(self) -> EngineStats:
        """The engine's stats for the caller's eyes: what it used itself; what is the server's, or others could be told
        from, is zero or left out."""
        return EngineStats(
            num_running=self.num_running, num_waiting=self.num_waiting, prompt_tokens_total=self.prompt_tokens,
            cached_prompt_tokens_total=self.prompt_tokens_cached, generation_tokens_total=self.generation_tokens,
            preemptions_total=self.num_preemptions, prefix_queries_total=self.prompt_tokens,
            prefix_hits_total=self.prompt_tokens_cached, cached_tokens_by_tier_total=dict(self.cached_by_tier),
            kv_disk_up=None, kv_store_up=None)

    def since(self, num_rows: int) -> list[tuple[float, ...]]:
        """Rows after the first `num_rows`, as far as they are still here."""
        rows = list(self.rows)
        return rows[max(0, len(rows) - (self.num_rows - num_rows)):]


class CallerLog:
    """Single-threaded: the event loop's. There are as many callers as the server has names of keys."""

    def __init__(self) -> None:
        self._figures: dict[str, CallerFigures] = {}

    def of(self, name: str) -> CallerFigures:
        if (found := self._figures.get(name)) is None:
            found = self._figures[name] = CallerFigures()
        return found

    def note_end(self, record: RequestRecord) -> None:
        """Add a request that has ended to its caller's figures."""
        figures = self.of(record.caller)
        figures.prompt_tokens_cached += record.num_cached_tokens
        figures.num_preemptions += record.num_preemptions
        if record.cached_by_tier:
            figures.cached_by_tier.update(record.cached_by_tier)

    def sample(self, open_records: Sequence[RequestRecord]) -> None:
        """Add a row for each caller that has been here."""
        waiting = Counter(record.caller for record in open_records if record.scheduled_s is None)
        begun = Counter(record.caller for record in open_records)
        now_s = time.monotonic()
        for name, figures in self._figures.items():
            figures.num_waiting, figures.num_running = waiting[name], begun[name] - waiting[name]
            figures.rows.append(history_row(figures.stats(), now_s))
            figures.num_rows += 1
