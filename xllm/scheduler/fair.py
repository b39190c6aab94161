"""`FairQueue`: orders the waiting requests of several tenants by the tokens that each tenant has been served.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2, with
weights. Of the tenants that wait, the one served least is admitted next, so that a tenant that floods the queue delays
itself. Two tenants that both always wait differ by a bounded number of tokens, whatever they send.

The counters order the queue only. Three rules that are not in the paper keep running sequences from crowding others
out: a tenant that holds more than its share of the rows or blocks gives its latest row to a tenant that waits with less
(`rows_to_yield`), or to one that runs and needs more blocks (`rows_to_give`); no tenant's part of a step makes the step
so long that another falls below its share of the time (`limit_tokens`). A share that its tenant does not use goes to
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from xllm.cost.online import OnlineCost
from xllm.scheduler.policy import Key, tenant_key
from xllm.scheduler.queues import WaitingQueue
from xllm.scheduler.shares import LONGEST_STEP_S, SHORTEST_S, limit_rows, seconds_of_step, sums, who_gives, who_yields
from xllm.sequence import SequenceState

PROMPT_COST, OUTPUT_COST = 1.0, 2.0  # of a token, in served tokens; the paper's
# Rows that may make room at the same time. Chosen: more let a waiting tenant in sooner, and what they computed is lost.
MAX_LEAVING = 4


class FairQueue(WaitingQueue):
    """Within a tenant requests go by `tenant_key`, between tenants online before offline and then by counter.

    Letters: T tenants, R rows. Tenants are never forgotten: there are as many as an operator has named.
    """

    def __init__(self, key: Callable[[SequenceState], Key], num_rows: int):
        super().__init__(key)
        self._queues: dict[str, WaitingQueue] = {}  # of tenants that wait
        self._slots: dict[str, int] = {}
        self._served_T = np.zeros(1)  # the virtual counters
        self._weight_T = np.ones(1)
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
        """Queue a sequence. A tenant that did not wait before gets its counter raised (`_lift`), unless it is back from
        a preemption."""
        tenant = seq.request.tenant
        slot = self._slot(tenant)
        self._weight_T[slot] = seq.request.tenant_weight
        if tenant not in self._queues:
            if seq.num_preemptions == 0:
                self._lift(slot)
            self._queues[tenant] = WaitingQueue(tenant_key)
        self._queues[tenant].push(seq)

    def _slot(self, tenant: str) -> int:
        slot = self._slots.setdefault(tenant, len(self._slots))
        if slot >= len(self._served_T):
            self._served_T = np.pad(self._served_T, (0, slot))
            self._weight_T = np.pad(self._weight_T, (0, slot), constant_values=1.0)
        return slot

    def _lift(self, slot: int) -> None:
        """Raise the counter of a tenant that waits again to the lowest of those waiting: it gets no credit for the time
        in which it asked for nothing."""
        floor = min((self._served_T[self._slots[tenant]] for tenant in self._queues),
                    default=self._served_T[self._last_left])
        self._served_T[slot] = max(self._served_T[slot], floor)

    def peek(self) -> SequenceState | None:
        """The first request: online before offline, then of the tenant served least, then by its own order."""
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
        """Charge the tenant for the prompt tokens from `num_computed` on. Tokens found in a cache cost nothing, nor do
        those computed again after a preemption."""
        weight = seq.request.tenant_weight
        slot = self._slot_R[row] = self._slot(seq.request.tenant)
        self._cost_R[row] = OUTPUT_COST / weight
        if seq.num_preemptions == 0:
            self._served_T[slot] += (len(seq.token_ids) - num_computed) * PROMPT_COST / weight

    def limit_tokens(self, rows_R: np.ndarray, wanted_R: np.ndarray, context_R: np.ndarray, last_step_R: np.ndarray,
                     max_tokens: int, cost: OnlineCost) -> tuple[np.ndarray, int] | None:
        prices, slot_R, num_tenants = cost.prices(), self._slot_R[rows_R], len(self._served_T)
        if prices is None:
            return None
        wanted_R = np.minimum(wanted_R, max_tokens)
        alone_s = prices.token + (prices.read + prices.decode_read) * context_R  # of a token of a decode row
        price_R = np.where(wanted_R == 1, prices.row + (1 + cost.drafts_per_row) * alone_s,
                           prices.token + prices.read * (context_R + wanted_R / 2))
        tokens_T = sums(slot_R, wanted_R, num_tenants)
        demand_T = sums(slot_R, wanted_R * price_R, num_tenants)
        for tenant, queue in self._queues.items():
            if (head := queue.peek()) is not None:
                num, slot = len(head.token_ids), self._slots[tenant]
                tokens_T[slot] += num
                demand_T[slot] += num * (prices.token + prices.read * num / 2)
        demand_T *= np.minimum(1.0, max_tokens / np.maximum(tokens_T, 1.0))
        mean_price = max(float(demand_T.sum()) / max(float(np.minimum(tokens_T, max_tokens).sum()), 1.0), SHORTEST_S)
        longest = max(int(min(max(LONGEST_STEP_S - prices.step, 0.0) / mean_price, 2**31)), len(rows_R))
        allowed_T = seconds_of_step(demand_T, self._weight_T, prices.step)
        if allowed_T is None:
            return wanted_R, longest  # every row can have a token
        limit_R = limit_rows(wanted_R, price_R, slot_R, last_step_R, demand_T, allowed_T)
        left_s = max(float(allowed_T.sum() - (limit_R * price_R).sum()), 0.0)
        num_new = int(min(left_s / max(prices.token, SHORTEST_S), max_tokens))
        return limit_R, min(int(limit_R.sum()) + num_new, longest)

    def rows_to_give(self, row: int, rows_R: np.ndarray, blocks_R: np.ndarray, num_blocks: int) -> np.ndarray:
        slot_R, num_tenants = self._slot_R[rows_R], len(self._served_T)
        use_T = sums(slot_R, blocks_R, num_tenants) / num_blocks
        slot = int(self._slot_R[row])
        tenant = who_gives(slot, use_T, np.bincount(slot_R, minlength=num_tenants), self._weight_T)
        if tenant is None or tenant == slot:
            after = rows_R[int(np.flatnonzero(rows_R == row)[0]) + 1:]
            return after[::-1] if tenant is None else after[self._slot_R[after] == slot][::-1]
        return rows_R[slot_R == tenant][::-1]

    def rows_to_yield(self, seq: SequenceState, rows_R: np.ndarray, blocks_R: np.ndarray, num_blocks: int,
                      num_leaving: int) -> np.ndarray:
        slot, slot_R, num_tenants = self._slots[seq.request.tenant], self._slot_R[rows_R], len(self._served_T)
        if num_leaving >= min(len(self._queues[seq.request.tenant]), MAX_LEAVING):
            return rows_R[:0]
        num_rows_T = np.bincount(slot_R, minlength=num_tenants)
        num_rows_T[slot] += num_leaving  # which are for this tenant
        blocks_T = sums(slot_R, blocks_R, num_tenants)
        one_row = 1 / len(self._slot_R)
        tenant = who_yields(slot, np.maximum(num_rows_T * one_row, blocks_T / num_blocks), num_rows_T, self._weight_T,
                            self._served_T, one_row)
        return rows_R[:0] if tenant is None else rows_R[slot_R == tenant][::-1]

    def note_outputs(self, rows_S: np.ndarray, num_tokens_S: np.ndarray) -> None:
        """Charge each row's tenant for the tokens that a step gave the row."""
        np.add.at(self._served_T, self._slot_R[rows_S], num_tokens_S * self._cost_R[rows_S])


def make_queue(policy: str, key: Callable[[SequenceState], Key], num_rows: int) -> WaitingQueue:
    """Make the queue of a scheduling policy: a `FairQueue` for "fair", else a `WaitingQueue` ordered by `key`."""
    return FairQueue(key, num_rows) if policy == "fair" else WaitingQueue(key)
