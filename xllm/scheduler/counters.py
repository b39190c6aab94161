"""`Counters`: the scheduler's totals, for metrics."""

from __future__ import annotations

import dataclasses

from xllm.request import FinishReason


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since the start, for metrics."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=lambda: {r.value: 0 for r in FinishReason})
