"""`WaitingQueue`: the requests that own no row, in policy order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import numpy as np

from xllm.scheduler.policy import Key
from xllm.scheduler.step_cost import StepCost
from xllm.sequence import SequenceState

MAX_STALE = 64  # entries of removed sequences that are never worth a sweep


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
        """Arrival makes keys unique, so sequences are never compared."""
        heapq.heappush(self._heap, (self._key(seq), seq))
        self._live[seq.request_id] = seq

    def peek(self) -> SequenceState | None:
        """The first in order, or None."""
        while self._heap and self._live.get(self._heap[0][1].request_id) is not self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    @property
    def head(self) -> SequenceState | None:
        """Like `peek`, but changes nothing, so that another thread may ask; may be slightly stale."""
        try:
            return self._heap[0][1] if self._live else None
        except IndexError:
            return None

    def pop(self) -> SequenceState:
        seq = self.peek()
        assert seq is not None
        heapq.heappop(self._heap)
        del self._live[seq.request_id]
        return seq

    def note_admission(self, seq: SequenceState, row: int, num_computed: int) -> None:
        """For queues whose order depends on what has been served: `seq` got into `row`."""

    def note_outputs(self, rows_S: np.ndarray, num_tokens_S: np.ndarray) -> None:
        """For the same: a step gave these rows so many tokens."""

    def limit_tokens(self, rows_R: np.ndarray, wanted_R: np.ndarray, context_R: np.ndarray, last_step_R: np.ndarray,
                     max_tokens: int, cost: StepCost) -> tuple[np.ndarray, int] | None:
        """For queues that share a step out: how many tokens each running row may have (int64 [R]) of those that it
        wants behind its `context_R`, and how many there may be in all, with what is set apart for the waiting. None: no
        limit."""
        return None

    def rows_to_give(self, row: int, rows_R: np.ndarray, blocks_R: np.ndarray, num_blocks: int) -> np.ndarray:
        """The running rows whose blocks may be taken for `row`, which needs more, in that order. rows_R: in order of
        service, with the blocks that each holds, of `num_blocks`. Here those that are served after it, the last first.
        """
        return rows_R[int(np.flatnonzero(rows_R == row)[0]) + 1:][::-1]

    def rows_to_yield(self, seq: SequenceState, rows_R: np.ndarray, blocks_R: np.ndarray, num_blocks: int,
                      num_leaving: int) -> np.ndarray:
        """For queues that share rows out: the running rows one of which is to make room for `seq`, which cannot get in,
        the first first. rows_R: in order of service, with the blocks that each holds, of `num_blocks`. num_leaving:
        rows that make room already."""
        return rows_R[:0]

    def remove(self, seq: SequenceState) -> None:
        """Its entry stays until it comes to the top, or until such entries are the majority."""
        del self._live[seq.request_id]
        if len(self._heap) > 2 * len(self._live) + MAX_STALE:
            heap = [entry for entry in self._heap if self._live.get(entry[1].request_id) is entry[1]]
            heapq.heapify(heap)
            self._heap = heap
