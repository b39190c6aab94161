"""A `NullRunner` that also plays the KV memory, to catch any block used too early, twice or wrongly.

Each slot holds a digest of the tokens up to its position. A row that computes position p first reads
the slots of all positions before p through its block table and finds out whether they hold its own
prefix. Steps run when `result` is asked for, long after they were planned, as on a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from backends.null import fixed_tokens
from xllm.runner.null_runner import NullRunner
from xllm.step import ScheduleOutput, StepOutput


def prefix_digests(token_ids: np.ndarray, salt: int = 0) -> np.ndarray:
    """A value for each position that depends on all tokens up to it: uint64."""
    digests, state = np.empty(len(token_ids), dtype=np.uint64), 1469598103934665603 ^ salt
    for i, token in enumerate(token_ids.tolist()):
        state = ((state ^ (token + 1)) * 1099511628211) & (2**64 - 1)
        digests[i] = state
    return digests


class MemoryRunner(NullRunner):
    """`num_blocks * block_size` slots; salts by request id prefix are not modelled: use one salt."""

    def __init__(self, num_rows: int, num_blocks: int, block_size: int, vocab_size: int = 50):
        super().__init__(num_rows, vocab_size=vocab_size)
        self.block_size = block_size
        self.slots = np.zeros(num_blocks * block_size, dtype=np.uint64)
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.wait_for: Callable[[tuple[int, ...]], None] = lambda tickets: None  # until loads have arrived

    def run(self, plan: ScheduleOutput) -> StepOutput:
        for row in plan.released_rows:
            del self.tables[row], self.tokens[row], self.computed[row]
        for new in plan.new_rows:
            assert new.row not in self.tables, "a row was given away twice"
            self.tables[new.row] = new.block_ids.tolist()
            self.tokens[new.row] = new.token_ids.tolist()
            self.computed[new.row] = new.num_computed_tokens
        for row, block in zip(plan.append_rows_B.tolist(), plan.append_ids_B.tolist()):
            self.tables[row].append(block)
        for row, place, block in zip(plan.replace_rows_C.tolist(), plan.replace_places_C.tolist(),
                                     plan.replace_ids_C.tolist()):
            self.tables[row][place] = block
        self.wait_for(plan.tickets)
        for src, dst in zip(plan.copy_src.tolist(), plan.copy_dst.tolist()):
            self._block(dst)[:] = self._block(src)
        self._forward(plan)
        result = super().run(plan)
        for i, row in enumerate(plan.rows_S.tolist()):
            n = int(result.num_sampled_S[i])
            self.tokens[row] += result.token_ids_SR[i, :n].tolist()
            self.computed[row] += int(plan.num_tokens_S[i]) + max(n - 1, 0)
        return result

    def _block(self, block: int) -> np.ndarray:
        return self.slots[block * self.block_size : (block + 1) * self.block_size]

    def _forward(self, plan: ScheduleOutput) -> None:
        slots_of = {row: self._slots(row) for row in plan.rows_S.tolist()}
        written: list[np.ndarray] = []
        for i, row in enumerate(plan.rows_S.tolist()):
            start, n = self.computed[row], int(plan.num_tokens_S[i])
            assert start + n <= len(self.tokens[row]), "told to compute tokens that do not exist"
            assert bool(plan.samples_S[i]) == (start + n == len(self.tokens[row]))
            drafts = int(plan.max_drafts_S[i])
            digests = prefix_digests(np.array(self._with_drafts(row, drafts)))
            stop = start + n + drafts
            mine = slots_of[row]
            assert stop <= len(mine), "planned beyond the row's blocks"
            np.testing.assert_array_equal(self.slots[mine[:start]], digests[:start], "somebody else's KV")
            written.append(mine[start:stop])
            self.slots[mine[start:stop]] = digests[start:stop]
        every = np.concatenate(written)
        assert len(np.unique(every)) == len(every), "two rows write the same slot"
        for i, row in enumerate(plan.rows_S.tolist()):  # nobody wrote into what another row reads
            stop = self.computed[row] + int(plan.num_tokens_S[i])
            digests = prefix_digests(np.array(self.tokens[row]))
            np.testing.assert_array_equal(self.slots[slots_of[row][:stop]], digests[:stop])

    def _with_drafts(self, row: int, drafts: int) -> list[int]:
        """The known tokens, and drafts that are right as far as they will be accepted."""
        tokens = self.tokens[row]
        accepted = len(tokens) % (drafts + 1)
        seed = self.seed_R[row : row + 1]
        right = [int(fixed_tokens(seed, np.array([len(tokens) + j]), self.vocab_size)[0]) for j in range(accepted)]
        return tokens + right + [-7] * (drafts - accepted)

    def _slots(self, row: int) -> np.ndarray:
        blocks = np.array(self.tables[row], dtype=np.int64)
        return (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()


class LateExecutor:
    """Holds plans back and runs each only when its result is asked for: the widest overlap there is."""

    def __init__(self, runner: NullRunner, depth: int):
        self.depth = depth
        self.runner = runner
        self._plans: deque[ScheduleOutput] = deque()

    def send(self, plan: ScheduleOutput) -> None:
        self._plans.append(plan)

    def result(self) -> StepOutput:
        return self.runner.run(self._plans.popleft())

    def shutdown(self) -> None:
        pass
