"""`WaitingQueue`: the requests that own no row, in policy order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import numpy as np

from xllm.cost.online import OnlineCost
from xllm.scheduler.policy import Key
from xllm.sequence import SequenceState

MAX_STALE = 64  # entries of removed sequences below which the heap is not swept; chosen: so few cost nothing to keep


class WaitingQueue:
    """A heap with lazy removal: push and pop O(log n), remove O(1) amortised."""

    def __init__(self, key: Callable[[SequenceState], Key]):
        self._key = key
        self._heap: list[tuple[Key, SequenceState]] = []
        self._live: dict[str, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._live.values())

    def push(self, seq: SequenceState) -> None:
        """Queue a sequence. Keys contain the arrival index and so are unique: sequences are never compared."""
        heapq.heappush(self._heap, (self._key(seq), seq))
        self._live[seq.request_id] = seq

    def peek(self) -> SequenceState | None:
        """The first sequence in order, or None. Drops entries of removed sequences from the top of the heap."""
        while self._heap and self._live.get(self._heap[0][1].request_id) is not self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    @property
    def head(self) -> SequenceState | None:
        """Like `peek`, but changes nothing, so that another thread may call it; may be slightly stale."""
        try:
            return self._heap[0][1] if self._live else None
        except IndexError:
            return None

    def pop(self) -> SequenceState:
        """Remove and return the first sequence in order; there must be one."""
        seq = self.peek()
        assert seq is not None
        heapq.heappop(self._heap)
        del self._live[seq.request_id]
        return seq

    def note_admission(self, seq: SequenceState, row: int, num_computed: int) -> None:
        """Called when `seq` was admitted to `row` with `num_computed` cached tokens; for queues whose order depends on
        what has been served."""

    def note_outputs(self, rows_S: np.ndarray, num_tokens_S: np.ndarray) -> None:
        """Called when a step has sampled `num_tokens_S` tokens for these rows; for the same queues."""

    def limit_tokens(self, rows_R: np.ndarray, wanted_R: np.ndarray, context_R: np.ndarray, last_step_R: np.ndarray,
                     max_tokens: int, cost: OnlineCost) -> tuple[np.ndarray, int] | None:
        """For queues that share a step out: (how many of its `wanted_R` tokens each running row may compute, int64 [R];
        how many tokens the step may have in all, with what is set apart for waiting requests). None: no limit.
        context_R: tokens before the wanted ones; last_step_R: the last step that served the row."""
        return None

    def rows_to_give(self, row: int, rows_R: np.ndarray, blocks_R: np.ndarray, num_blocks: int) -> np.ndarray:
        """The running rows to preempt for `row`, which needs more blocks, the first to go first. rows_R: all running
        rows in order of service; blocks_R: how many of the `num_blocks` blocks each holds. Here: the rows that are
        served after `row`, the last first."""
        return rows_R[int(np.flatnonzero(rows_R == row)[0]) + 1:][::-1]

    def rows_to_yield(self, seq: SequenceState, rows_R: np.ndarray, blocks_R: np.ndarray, num_blocks: int,
                      num_leaving: int) -> np.ndarray:
        """For queues that share rows out: the running rows of which one is to be preempted for `seq`, which cannot be
        admitted, the first to go first. rows_R, blocks_R, num_blocks: as in `rows_to_give`. num_leaving: rows that are
        being preempted already."""
        return rows_R[:0]

    def remove(self, seq: SequenceState) -> None:
        """Take a sequence out of the queue. Its entry stays in the heap until it comes to the top, or until such
        entries are the majority."""
        del self._live[seq.request_id]
        if len(self._heap) > 2 * len(self._live) + MAX_STALE:
            heap = [entry for entry in self._heap if self._live.get(entry[1].request_id) is entry[1]]
            heapq.heapify(heap)
            self._heap = heap
