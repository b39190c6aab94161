"""`StepChecker`: digests of what a rank has computed, which the engine compares across ranks."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import replace

import numpy as np
import torch

from xllm.runner.kv_cache import KVCache
from xllm.runner.row_state import RowState
from xllm.step import ScheduleOutput, StepCheck, StepOutput


class StepChecker:
    """`note` is called for each step when it is started, `checked` when its results are there, in the same order."""

    def __init__(self, rows: RowState, kv_cache: KVCache | None):
        """kv_cache: None where ranks hold different heads, so that their contents cannot be compared."""
        self._rows, self._kv_cache = rows, kv_cache
        self._filled: deque[tuple[int, np.ndarray]] = deque()  # (step, blocks that it fills)

    def note(self, plan: ScheduleOutput, output: StepOutput | None) -> None:
        """Remember which blocks the step fills. output: None where it is not known yet, and there are no drafts."""
        if not plan.num_rows:
            return
        accepted_S = 0 if output is None else np.maximum(output.num_sampled_S - 1, 0)
        end_S = self._rows.num_computed[plan.rows_S]
        first_S = (end_S - plan.num_tokens_S - accepted_S) // self._rows.block_size
        last_S = end_S // self._rows.block_size
        parts = [self._rows.block_table[row, first:last].copy()
                 for row, first, last in zip(plan.rows_S.tolist(), first_S.tolist(), last_S.tolist()) if last > first]
        self._filled.append((plan.step, np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)))

    def checked(self, output: StepOutput) -> StepOutput:
        """The output with the digests of its tokens and of the blocks that it filled."""
        if not len(output.num_sampled_S):
            return output
        step, blocks_B = self._filled.popleft()
        assert step == output.step
        ids = _digest(output.token_ids_SR.tobytes())
        digests_B = np.array([self._block_digest(block) for block in blocks_B.tolist()], dtype=np.uint64)
        return replace(output, check=StepCheck(ids=ids, blocks_B=blocks_B, digests_B=digests_B))

    def _block_digest(self, block: int) -> int:
        if self._kv_cache is None:
            return 0
        contents = [cache[block].contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
                    for layer in self._kv_cache.layers for cache in layer]
        return _digest(*contents)


def _digest(*parts: bytes) -> int:
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return int.from_bytes(state.digest(), "little")
