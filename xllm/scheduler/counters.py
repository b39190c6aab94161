"""`Counters`: the scheduler's totals, for metrics."""

from __future__ import annotations

import dataclasses

import numpy as np

from xllm.request import FinishReason
from xllm.scheduler.step_cost import StepCost


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since the start: tokens, unless the name says otherwise. Written by the scheduler's parts."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0  # preemptions whose KV was copied to host memory
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafts: int = 0  # rows that were given drafts, over all steps
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: list[int] = dataclasses.field(default_factory=list)  # in the draft; sized by the scheduler
    hits_by_tier: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(("l1", "l2", "l3", "l4"), 0))
    finished: dict[str, int] = dataclasses.field(default_factory=lambda: {r.value: 0 for r in FinishReason})

    def note_drafts(self, num_drafts_S: np.ndarray, num_accepted_S: np.ndarray) -> None:
        """Count a step's drafts and how many of them each row accepted; a row accepts its first ones. int32 [S]."""
        self.drafts += int(np.count_nonzero(num_drafts_S))
        self.draft_tokens += int(num_drafts_S.sum())
        self.accepted_tokens += int(num_accepted_S.sum())
        for position in range(int(num_accepted_S.max(initial=0))):
            self.accepted_by_position[position] += int(np.count_nonzero(num_accepted_S > position))


RATE_WEIGHT = 0.1  # of the newest step in a running mean; chosen: about the last ten steps decide
# Chosen: a step of fewer tokens is mostly decode rows, and says nothing about how fast prompts are computed.
MIN_PREFILL_TOKENS = 64


@dataclasses.dataclass(slots=True)
class StepRates:
    """Running means over the steps so far; 0 before the first."""

    cost: StepCost = dataclasses.field(default_factory=StepCost)
    step_s: float = 0.0
    prefill_tokens_per_s: float = 0.0

    def note(self, num_tokens: int, num_reads: int, seconds: float) -> None:
        """Take in a step: it computed `num_tokens` tokens, which attended to `num_reads` before them, in `seconds`."""
        self.cost.note(num_tokens, num_reads, seconds)
        self.step_s += (seconds - self.step_s) * (RATE_WEIGHT if self.step_s else 1.0)
        if num_tokens >= MIN_PREFILL_TOKENS and seconds > 0.0:
            rate = num_tokens / seconds
            self.prefill_tokens_per_s += (rate - self.prefill_tokens_per_s) * (
                RATE_WEIGHT if self.prefill_tokens_per_s else 1.0)
