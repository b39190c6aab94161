"""`NullRunner`: takes the plans that `ModelRunner` takes and answers without a model (`backends/null.py`)."""

from __future__ import annotations

import numpy as np

from backends.null import NullTimes, VirtualClock, fixed_tokens
from xllm.step import ScheduleOutput, StepOutput


class NullRunner:
    """Answers steps with fixed tokens, without a model. `accept(rows, positions, max_drafts)` says how many drafts each
    row accepts."""

    def __init__(self, num_rows: int, *, vocab_size: int = 32_000, clock: VirtualClock | None = None,
                 cost: NullTimes | None = None):
        self.vocab_size = vocab_size
        self.clock = clock or VirtualClock()
        self.cost = cost or NullTimes()
        self.num_tokens_R = np.zeros(num_rows, dtype=np.int64)
        self.seed_R = np.zeros(num_rows, dtype=np.uint64)

    def prepare(self, plan: ScheduleOutput) -> None:
        """Nothing to do ahead."""

    def run(self, plan: ScheduleOutput) -> StepOutput:
        for new in plan.new_rows:
            self.num_tokens_R[new.row] = len(new.token_ids)
            self.seed_R[new.row] = new.seed & (2**64 - 1)
        rows = plan.rows_S
        accepted = self.num_accepted(plan)
        num_sampled = np.where(plan.samples_S, 1 + accepted, 0).astype(np.int32)
        token_ids = np.full((len(rows), int(num_sampled.max(initial=1))), -1, dtype=np.int32)
        for column in range(token_ids.shape[1]):
            at = num_sampled > column
            token_ids[at, column] = fixed_tokens(self.seed_R[rows[at]], self.num_tokens_R[rows[at]], self.vocab_size)
            self.num_tokens_R[rows[at]] += 1
        self.clock.advance(self.cost.step_s(int((plan.num_tokens_S + plan.max_drafts_S).sum()), len(rows)))
        return StepOutput(step=plan.step, num_sampled_S=num_sampled, token_ids_SR=token_ids,
                          num_drafts_S=plan.max_drafts_S)

    def start(self, plan: ScheduleOutput) -> StepOutput:
        return self.run(plan)

    def num_accepted(self, plan: ScheduleOutput) -> np.ndarray:
        """Drafts accepted per row: a fixed pattern over the row's length, from none to all."""
        return np.where(plan.samples_S, self.num_tokens_R[plan.rows_S] % (plan.max_drafts_S + 1), 0)
