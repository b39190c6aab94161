"""`FairQueue`: the waiting requests of several tenants, whose turn goes by the tokens that they have been served.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2, with
weights. Whoever has been served least among those that wait is admitted next, so that a tenant that floods the queue
delays itself. Two tenants that both always wait differ by a bounded number of tokens, whatever they send. Preempts
nobody, and leaves nothing idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from xllm.scheduler.policy import Key, tenant_key
from xllm.scheduler.queues import WaitingQueue
from xllm.sequence import SequenceState

PROMPT_COST, OUTPUT_COST = 1.0, 2.0  # of a token; the paper's


class FairQueue(WaitingQueue):
    """Within a tenant requests go by `tenant_key`, between tenants online before offline and then by counter.

    Letters: T tenants, R rows. Tenants are never forgotten: there are as many as an operator has named.
    """

    def __init__(self, key: Callable[[SequenceState], Key], num_rows: int):
        super().__init__(key)
        self._queues: dict[str, WaitingQueue] = {}  # of tenants that wait
        self._slots: dict[str, int] = {}
        self._served_T = np.zeros(1)  # the virtual counters
        self._slot_R = np.zeros(num_rows, dtype=np.int64)
        self._cost_R = np.zeros(num_rows)  # of one output token: smaller for a tenant of more weight
        self._last_left = 0  # the tenant of the last request that left an emptying queue

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[SequenceState]:
        return (seq for queue in self._queues.values() for seq in queue)

    def served(self, tenant: str) -> float:
        """The tenant's counter: weighted tokens so far."""
        return float(self._served_T[self._slot(tenant)])

    def push(self, seq: SequenceState) -> None:
        tenant = seq.request.tenant
        if tenant not in self._queues:
            if seq.num_preemptions == 0:
                self._lift(self._slot(tenant))
            self._queues[tenant] = WaitingQueue(tenant_key)
        self._queues[tenant].push(seq)

    def _slot(self, tenant: str) -> int:
        slot = self._slots.setdefault(tenant, len(self._slots))
        if slot >= len(self._served_T):
            self._served_T = np.pad(self._served_T, (0, slot))
        return slot

    def _lift(self, slot: int) -> None:
        """Whoever comes back has no credit for the time away: it starts where those who waited stand."""
        floor = min((self._served_T[self._slots[tenant]] for tenant in self._queues),
                    default=self._served_T[self._last_left])
        self._served_T[slot] = max(self._served_T[slot], floor)

    def peek(self) -> SequenceState | None:
        first: tuple[tuple, SequenceState] | None = None
        for tenant, queue in self._queues.items():
            seq = queue.peek()
            assert seq is not None, "empty queues are dropped"
            order = (seq.request.offline, self._served_T[self._slots[tenant]], self._key(seq))
            if first is None or order < first[0]:
                first = order, seq
        return None if first is None else first[1]

    @property
    def head(self) -> SequenceState | None:
        """The one that came first of all, for another thread; may be slightly stale."""
        heads = [queue.head for queue in list(self._queues.values())]
        return min((seq for seq in heads if seq is not None), key=lambda seq: seq.arrival_index, default=None)

    def pop(self) -> SequenceState:
        seq = self.peek()
        assert seq is not None
        self.remove(seq)
        return seq

    def remove(self, seq: SequenceState) -> None:
        tenant = seq.request.tenant
        self._queues[tenant].remove(seq)
        if not len(self._queues[tenant]):
            del self._queues[tenant]
            self._last_left = self._slots[tenant]

    def note_admission(self, seq: SequenceState, row: int, num_computed: int) -> None:
        """It got in, and its tokens from `num_computed` on will be computed; what was found in a cache costs nothing,
        nor does what is computed again after a preemption."""
        weight = seq.request.tenant_weight
        slot = self._slot_R[row] = self._slot(seq.request.tenant)
        self._cost_R[row] = OUTPUT_COST / weight
        if seq.num_preemptions == 0:
            self._served_T[slot] += (len(seq.token_ids) - num_computed) * PROMPT_COST / weight

    def note_outputs(self, rows_S: np.ndarray, num_tokens_S: np.ndarray) -> None:
        """A step gave each row so many tokens."""
        np.add.at(self._served_T, self._slot_R[rows_S], num_tokens_S * self._cost_R[rows_S])


def make_queue(policy: str, key: Callable[[SequenceState], Key], num_rows: int) -> WaitingQueue:
    """The queue that a scheduling policy needs."""
    return FairQueue(key, num_rows) if policy == "fair" else WaitingQueue(key)
