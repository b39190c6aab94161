"""`Preemption`: takes the blocks of running sequences away when there are too few, and queues those sequences again.

It is called in two cases. `make_fit`: running rows need more blocks than there are. `yield_for`: a waiting request may
take the place of a running one: an online request that of an offline one, or with the fair policy a tenant with too
little that of a tenant with too much. A preempted sequence goes back to the queue, at once or when the last step
planned with it has settled; its KV is computed anew, or copied to host memory and back if that is sooner.
"""

from __future__ import annotations

import numpy as np

from xllm.kv.manager import KVManager
from xllm.scheduler.kv_waits import Promotions
from xllm.scheduler.plan import PlanBuilder
from xllm.scheduler.queues import WaitingQueue
from xllm.scheduler.row_table import RowTable
from xllm.scheduler.running import Running
from xllm.scheduler.token_budget import Share
from xllm.sequence import SequenceState, Status
from xllm.stats import Counters


class Preemption:
    """Chooses victims, stops them, and queues them again. Owned by the scheduler.

    offline_yields: whether an online request that cannot get in preempts an offline one.
    """

    def __init__(self, kv: KVManager, rows: RowTable, running: Running, waiting: WaitingQueue, promotions: Promotions,
                 counters: Counters, *, offline_yields: bool):
        self._kv, self._rows, self._running, self._waiting = kv, rows, running, waiting
        self._promotions, self._counters = promotions, counters
        self._offline_yields = offline_yields
        self._leaving: list[int] = []  # rows whose sequence goes back to the queue when they settle
        self._yielding: SequenceState | None = None  # the offline sequence to preempt before the next step

    # --- too few blocks for the rows that run

    def make_fit(self, plan: PlanBuilder, share: Share, need: np.ndarray) -> tuple[Share, np.ndarray]:
        """Cut a share down to the blocks there are, row by row: drop the row's drafts, preempt other rows for it, or
        leave it out of the step (`plan.stalled`).

        need: blocks that each row of the share needs. Returns (the share, need) of the rows that stay.
        Blocks freed here are often PENDING until the step in flight settles; a row that waits for
        them is left out of this step, and no further row is preempted for it meanwhile.
        """
        self._promotions.give_up_all()  # running rows come before requests that wait with blocks in their hands
        kv, cursor = self._kv, self._rows.cursor
        kept, place = np.zeros(len(share.rows), dtype=bool), {row: i for i, row in enumerate(share.rows.tolist())}
        drafts, need = share.drafts.copy(), need.copy()
        gone, taken = set[int](), 0
        for row, i in place.items():
            if row in gone:
                continue
            if need[i] > kv.num_free_blocks - taken and drafts[i]:
                drafts[i] = 0
                need[i] = kv.blocks_needed(np.array([row]), np.array([cursor[row] + share.tokens[i]]))[0]
            while need[i] + taken > kv.num_free_blocks + kv.num_pending_blocks:
                victim = self._victim(plan, row)
                if victim is None:
                    break
                gone.add(victim)
                self._preempt(victim)
                if victim in place and kept[place[victim]]:
                    kept[place[victim]] = False
                    taken -= int(need[place[victim]])
            if need[i] + taken > kv.num_free_blocks:
                plan.stalled = True
                continue
            kept[i] = True
            taken += int(need[i])
        return Share(share.rows, share.tokens, drafts, share.wanted).only(kept), need[kept]

    def _victim(self, plan: PlanBuilder, row: int) -> int | None:
        """The running row to preempt for `row`: the first that the queue's policy names and this step does not plan."""
        rows = self._running.rows()
        givers = self._waiting.rows_to_give(row, rows, self._kv.num_blocks_R[rows], self._kv.num_usable_blocks)
        return next((giver for giver in givers.tolist() if not plan.has(giver)), None)

    # --- a request that cannot get in, and one that has to make room for it

    def yield_for(self, plan: PlanBuilder, seq: SequenceState) -> bool:
        """Preempt a running row to make room for `seq`, if the policy names one. A row that this step plans already is
        preempted before the next one instead (`begin_step`). Returns whether admission should try again now; if not,
        the row's blocks become free when the step in flight settles."""
        rows = self._rows_to_yield(seq)
        unplanned = [row for row in rows if not plan.has(row)]
        if not unplanned:  # goes before the next step
            self._yielding = self._rows.seqs[rows[0]] if rows else None
            return False
        at_once = not self._rows.in_flight[unplanned[0]]
        self._preempt(unplanned[0])
        return at_once or bool(self._rows_to_yield(seq))

    def _rows_to_yield(self, seq: SequenceState) -> list[int]:
        """The rows that could make room for `seq`, the first to go first: offline rows for an online request, else
        those that the queue's policy names."""
        num_leaving = len(self._leaving)
        if self._offline_yields and not seq.request.offline and not num_leaving and not self._kv.num_pending_blocks:
            offline = [row for row in self._running.last_first() if self._is_offline(row)]
            if offline:
                return offline
        rows = self._running.rows()
        return self._waiting.rows_to_yield(seq, rows, self._kv.num_blocks_R[rows], self._kv.num_usable_blocks,
                                           num_leaving).tolist()

    def _is_offline(self, row: int) -> bool:
        owner = self._rows.seqs[row]
        return owner is not None and owner.request.offline

    def begin_step(self) -> None:
        """Preempt the sequence that `yield_for` chose when the last step had planned it already, if it would still be
        chosen."""
        owner, self._yielding = self._yielding, None
        if owner is None or owner.status is not Status.RUNNING:
            return
        head = self._waiting.peek()
        if head is not None and owner.row in self._rows_to_yield(head)[:1]:
            self._preempt(owner.row)

    # --- away and back

    def _preempt(self, row: int) -> None:
        """Release a row's blocks, and queue its sequence again as soon as no step in flight uses the row."""
        seq = self._rows.seqs[row]
        assert seq is not None
        swap = self._promotions.swap_beats_recompute(int(self._rows.computed[row]))
        self._counters.swaps_total += swap
        self._running.leave(seq, used=False, swap=swap)
        seq.num_preemptions += 1
        self._counters.preemptions_total += 1
        seq.move(Status.PREEMPTED)
        if self._rows.in_flight[row]:
            self._leaving.append(row)
        else:
            self._requeue(row)

    def _requeue(self, row: int) -> None:
        seq = self._rows.seqs[row]
        assert seq is not None
        seq.token_ids = self._rows.tokens_of(row)
        if len(seq.token_ids) == seq.num_prompt_tokens:
            seq.restart_prompt_logprobs()  # not delivered yet: they will be computed anew
        seq.move(Status.WAITING)
        self._running.release(row)
        self._waiting.push(seq)

    def settle(self) -> None:
        """Queue the preempted sequences whose row no step in flight uses any longer. Called when a step has settled."""
        for row in [r for r in self._leaving if self._rows.in_flight[r] == 0]:
            self._leaving.remove(row)
            self._requeue(row)

    def forget(self, seq: SequenceState) -> None:
        """Do not queue a preempted sequence again: it has ended."""
        self._leaving.remove(seq.row)
