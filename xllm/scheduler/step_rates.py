"""`StepRates`: how fast steps have been of late."""

from __future__ import annotations

import dataclasses

from xllm.scheduler.step_cost import StepCost

RATE_WEIGHT = 0.1  # of the newest step in a running mean
MIN_PREFILL_TOKENS = 64  # a step with fewer says nothing about how fast prompts are computed


@dataclasses.dataclass(slots=True)
class StepRates:
    """Running means over the steps so far; 0 before the first."""

    cost: StepCost = dataclasses.field(default_factory=StepCost)
    step_s: float = 0.0
    prefill_tokens_per_s: float = 0.0

    def note(self, num_tokens: int, num_reads: int, seconds: float) -> None:
        """A step computed so many tokens, which attended to so many before them, in that time."""
        self.cost.note(num_tokens, num_reads, seconds)
        self.step_s += (seconds - self.step_s) * (RATE_WEIGHT if self.step_s else 1.0)
        if num_tokens >= MIN_PREFILL_TOKENS and seconds > 0.0:
            rate = num_tokens / seconds
            self.prefill_tokens_per_s += (rate - self.prefill_tokens_per_s) * (
                RATE_WEIGHT if self.prefill_tokens_per_s else 1.0)
