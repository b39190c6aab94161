"""`Scheduler`: which rows compute which tokens, step by step.

There is no prefill phase and no decode phase: every sequence has tokens whose KV is not computed
yet, and each step computes some of them (`row_table.py`). `schedule()` plans a step and returns the
plan as a value; `update()` takes in the step's results. With overlapped scheduling `schedule()` for
step n + 1 runs before `update()` for step n.

Neither touches the sequences one by one while they merely decode: the work is done on the row
table's arrays, and Python sees only the sequences whose state changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from xllm.config import EngineConfig
from xllm.cost.online import OnlineCost
from xllm.errors import IntegrityError, RequestError
from xllm.kv.eviction import make_policy
from xllm.kv.manager import KVManager
from xllm.kv_offer import KVOffer
from xllm.request import FinishReason, OutputDelta, Request
from xllm.scheduler.admission import Admission
from xllm.scheduler.departures import Departures
from xllm.scheduler.fair import make_queue
from xllm.scheduler.kv_waits import Promotions
from xllm.scheduler.output_writer import OutputWriter
from xllm.scheduler.plan import PlanBuilder
from xllm.scheduler.policy import Phase, phases, request_key
from xllm.scheduler.preemption import Preemption
from xllm.scheduler.row_table import RowTable
from xllm.scheduler.running import Running
from xllm.scheduler.token_budget import TokenBudget
from xllm.sequence import SequenceState, Status
from xllm.stats import Counters
from xllm.step import ScheduleOutput, StepOutput
from xllm.token_ids import check_generated, check_prompt_length


class Scheduler:
    """Owns the queue, the row table and the KV manager. Single-threaded.

    config: resolved. num_blocks: KV blocks; one sequence of max_model_len tokens must fit, beside the first
    `num_reserved_blocks`, which the device keeps to itself.
    """

    def __init__(self, config: EngineConfig, *, num_blocks: int, num_reserved_blocks: int = 0,
                 clock: Callable[[], float] = time.monotonic):
        s, cache, spec = config.scheduler, config.cache, config.speculative
        assert config.model.max_model_len and cache.block_size and s.max_num_batched_tokens
        self.max_model_len = config.model.max_model_len
        num_usable = num_blocks - num_reserved_blocks
        assert num_usable * cache.block_size >= self.max_model_len, "the longest sequence must fit"
        self.kv = KVManager(num_blocks=num_blocks, block_size=cache.block_size, num_rows=s.max_num_seqs,
                            max_tokens_per_row=self.max_model_len, num_reserved_blocks=num_reserved_blocks,
                            enable_prefix_caching=cache.enable_prefix_caching,
                            policy=make_policy(cache.eviction_policy, num_blocks, lru_k=cache.lru_k,
                                               history=cache.eviction_history, l1_share=cache.l1_share))
        self.rows = RowTable(s.max_num_seqs, self.max_model_len)
        max_drafts = spec.num_speculative_tokens if spec.speculative_method else 0
        self.counters = Counters(
            spec_accepted_tokens_by_position_total=[0] * max_drafts,
            requests_finished_total={reason.value: 0 for reason in FinishReason},
            cached_tokens_by_tier_total=dict.fromkeys(("l1", "l2", "l3", "l4", "l5"), 0))
        self._writer = OutputWriter(self.rows, self.counters)
        self.cost = OnlineCost()
        self.promotions = Promotions(self.kv, self.cost, clock, cache.preemption_mode)
        self._clock = clock
        self._max_waiting, self._max_requests = s.max_waiting_requests, s.max_concurrent_requests
        self._phases = phases(s.scheduling_policy)
        self._budget = TokenBudget(max_tokens=s.max_num_batched_tokens, max_chunk=s.long_prefill_token_threshold,
                                   allow_partial=s.enable_chunked_prefill,
                                   max_drafts=max_drafts)
        key = request_key(s.scheduling_policy, offline_last=s.online_preempts_offline)
        self.waiting = make_queue(s.scheduling_policy, key, s.max_num_seqs)
        self.running = Running(key, self.rows, self.kv, clock)
        self._preemption = Preemption(self.kv, self.rows, self.running, self.waiting, self.promotions, self.counters,
                                      offline_yields=s.online_preempts_offline)
        self._admission = Admission(config, self.kv, self.rows, self.running, self.waiting, self.promotions,
                                    self._preemption, self.counters)
        self.departures = Departures(self.kv, self.rows)
        self._sequences: dict[str, SequenceState] = {}
        self._ready: list[OutputDelta] = []  # outputs that no step produced
        self._next_step = 0
        self._num_arrived = 0

    # --- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never run or the queue is full."""
        num_tokens = len(request.prompt_token_ids)
        check_prompt_length(num_tokens, self.max_model_len)
        check_generated(num_tokens, len(request.generated_token_ids), request.sampling.max_tokens, self.max_model_len)
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id!r} is in use", field="request_id")
        self.check_room()
        if request.deadline_s is not None and math.isnan(request.deadline_s):  # it has no place in an order
            raise RequestError("deadline_s must be a number, got nan", field="deadline_s")
        seq = SequenceState(request, self._num_arrived)
        self._writer.num_wanting_prompt_logprobs += seq.prompt_logprobs is not None
        self._num_arrived += 1
        self._sequences[request.request_id] = seq
        self.waiting.push(seq)
        self.promotions.prefetch(seq)
        if request.offer is not None:
            self.departures.begin(seq, request.offer)
        self.counters.prompt_tokens_total += num_tokens

    def check_room(self, num_held: int = 0) -> None:
        """Raise RequestError if the queue or the engine is full. num_held: requests that wait at a gate and will be
        added later; they count too."""
        if len(self.waiting) + num_held >= self._max_waiting:
            raise RequestError(f"the queue is full ({self._max_waiting} requests)")
        if 0 < self._max_requests <= len(self._sequences) + num_held:
            raise RequestError(f"the engine is full ({self._max_requests} requests)")

    def abort(self, request_id: str) -> None:
        """End a request early; unknown ids are ignored. Its terminal output comes with the next `update`
        or `take_ready`."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
        self.promotions.forget(seq)
        self._end(seq, FinishReason.ABORT)

    def _end(self, seq: SequenceState, reason: FinishReason) -> None:
        """End a sequence outside a step; what a step in flight still samples for it is dropped."""
        row = seq.row
        self._ready.append(self._finish(seq, reason))
        if row >= 0 and self.rows.in_flight[row] == 0:
            self.running.release(row)

    def depart(self, request_id: str, offer: KVOffer) -> None:
        """Have a request go on elsewhere once its KV is there; unknown ids are ignored."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self.departures.begin(seq, offer)

    def take_ready(self) -> list[OutputDelta]:
        """The terminal outputs of requests that ended outside a step, since the last call."""
        ready, self._ready = self._ready, []
        return ready

    def take_admissions(self) -> list[tuple[str, float]]:
        """(request id, time by the scheduler's clock) of the requests that were admitted for the first time since the
        last call. They are recorded from the first call on."""
        return self._admission.take_admitted()

    @property
    def num_running(self) -> int:
        return len(self.running)

    def oldest_waiting_s(self) -> float:
        """How long the head of the queue has waited, in seconds of the scheduler's clock; 0 if the queue is empty."""
        head = self.waiting.head
        return max(0.0, self._clock() - head.request.arrival_s) if head is not None else 0.0

    def forget_runner(self) -> None:
        """Drop the cached blocks and what the runner was to be told: the next plan goes to a runner without any state.
        No request may be open."""
        assert not self._sequences and not len(self.running)
        self.running.take_released()
        self.kv.reset_prefix_cache()

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The ids of the requests that have not ended."""
        return tuple(self._sequences)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests that have not ended."""
        return tuple(seq.request for seq in self._sequences.values())

    @property
    def has_ready(self) -> bool:
        """Whether `take_ready` has anything to give."""
        return bool(self._ready)

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended, or its terminal output was not taken (`take_ready`)."""
        return bool(self._sequences or self._ready)

    # --- deciding a step

    def schedule(self) -> ScheduleOutput:
        """Plan the next step. The plan may be empty: then the steps in flight must settle first."""
        self._budget.reset()
        plan = PlanBuilder(self._next_step, self.rows, self.kv, self._budget)
        self._next_step += 1
        self._admission.take_promoted()
        for seq in self.departures.take_sent() if len(self.departures) else ():
            self._end(seq, FinishReason.HANDED_OVER)
        self._preemption.begin_step()
        for phase in self._phases:
            if phase is Phase.ADMISSION:
                if len(self.waiting):
                    self._writer.untold.update(self._admission.admit(plan))
            elif len(self.running):
                self._plan_running(plan, phase)
        return self._seal(plan)

    def _plan_running(self, plan: PlanBuilder, phase: Phase) -> None:
        rows, table = self.running.rows(), self.rows
        upper = table.upper[rows]
        room, wanted = table.limit[rows] - upper, upper - table.cursor[rows]
        eligible = room > 0
        if plan.shares:  # in an earlier phase of this step
            eligible &= table.last_step[rows] < plan.step
        if phase is Phase.DECODES:
            eligible &= wanted == 1
        elif phase is Phase.PREFILLS:
            eligible &= wanted > 1
        if not eligible.all():
            rows, room, wanted = rows[eligible], room[eligible], wanted[eligible]
        limited = self.waiting.limit_tokens(rows, wanted, table.cursor[rows], table.last_step[rows],
                                            self._budget.max_tokens, self.cost)
        limit, in_all = limited or (None, self._budget.max_tokens)
        self._budget.lower(in_all)
        share = self._budget.share(rows, wanted, room, limit)
        need = self.kv.blocks_needed(share.rows, table.cursor[share.rows] + share.tokens + share.drafts)
        total = int(need.sum())
        if total > self.kv.num_free_blocks:
            share, need = self._preemption.make_fit(plan, share, need)
            total = int(need.sum())
        if total:
            plan.grow(share.rows, need)
        if len(share.rows):
            plan.commit(share)

    def _seal(self, plan: PlanBuilder) -> ScheduleOutput:
        self.kv.set_foreground(bool(plan.shares))
        if not plan.shares:  # an empty plan is never run: what it would carry waits for the next
            return plan.build()
        replaced = self.kv.take_replaced()
        plan.tickets.update(self.kv.open_tickets(replaced[:, 2]))
        if len(self.departures):
            plan.publish_ticket = self.departures.publish(plan.step)
        return plan.build(self.running.take_released(), replaced)

    # --- taking in a step's results

    def update(self, plan: ScheduleOutput, result: StepOutput) -> list[OutputDelta]:
        """Take in the results of a step; steps come in the order in which they were planned. Appends the sampled
        tokens, ends sequences, makes full blocks findable, frees rows. Returns an output for each request that
        changed."""
        assert plan.step == result.step
        table, rows = self.rows, plan.rows_S.astype(np.int64)
        self.kv.settle(plan.step)
        table.in_flight[rows] -= 1
        self._settle_counters(plan, result, rows)
        outputs, ended = self._writer.append(result, rows)
        for row, output in ended:
            self._finish_at(row, output)
        for i, reason in result.failed.items():
            seq = table.seqs[rows[i]]
            if seq is not None and not seq.has_ended:
                outputs.append(self._finish(seq, FinishReason.ERROR, error=reason))
        if self.kv.enable_prefix_caching:
            self._commit_blocks(rows)
        self._leave_settled(rows)
        if not len(self.running):
            self.kv.set_foreground(False)
        return self.take_ready() + outputs if self._ready else outputs

    def _settle_counters(self, plan: ScheduleOutput, result: StepOutput, rows: np.ndarray) -> None:
        """Advance the rows' settled counters, and take back what `upper` and `cursor` counted for drafts that were not
        accepted."""
        table = self.rows
        table.computed[rows] += plan.num_tokens_S
        self.waiting.note_outputs(rows, result.num_sampled_S)
        if self._budget.max_drafts:
            accepted = np.maximum(result.num_sampled_S - 1, 0)
            table.computed[rows] += accepted
            unused = np.where(plan.samples_S, plan.max_drafts_S - accepted, 0)
            table.upper[rows] -= unused
            table.cursor[rows] -= unused
            self._note_drafts(result.num_drafts_S, accepted)

    def _note_drafts(self, num_drafts_S: np.ndarray, num_accepted_S: np.ndarray) -> None:
        """What became of a step's drafts, row by row; the accepted ones of a row are its first."""
        c = self.counters
        c.spec_drafts_total += int(np.count_nonzero(num_drafts_S))
        c.spec_draft_tokens_total += int(num_drafts_S.sum())
        c.spec_accepted_tokens_total += int(num_accepted_S.sum())
        for position in range(int(num_accepted_S.max(initial=0))):
            c.spec_accepted_tokens_by_position_total[position] += int(np.count_nonzero(num_accepted_S > position))

    def _finish_at(self, row: int, output: OutputDelta) -> None:
        """End the row's sequence, whose last token in `output` is a stop token or reached the length limit; writes the
        reason into `output`."""
        seq = self.rows.seqs[row]
        assert seq is not None
        last, params = output.token_ids[-1], seq.request.sampling
        is_stop = self.rows.known[row] >= self.rows.min_known[row] and last in self.rows.stop_ids_RE[row].tolist()
        reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
        if is_stop and last in params.stop_token_ids:
            output.stop_reason = last
        output.finish_reason = reason
        output.num_preemptions = seq.num_preemptions
        self._finish(seq, reason)

    def _finish(self, seq: SequenceState, reason: FinishReason, *, error: str | None = None) -> OutputDelta:
        """End a sequence: release its blocks and forget it. Returns a terminal output, which a caller that has one
        already ignores."""
        if seq.status is Status.RUNNING:
            # The KV of a failed step may not be finite either: no other request may find it.
            self.running.leave(seq, commit=reason is not FinishReason.ERROR,
                               ended_well=reason in (FinishReason.STOP, FinishReason.LENGTH))
        elif seq.status is Status.PREEMPTED:
            self._preemption.forget(seq)
        if len(self.departures):
            self.departures.forget(seq)
        seq.move(Status.HANDED_OVER if reason is FinishReason.HANDED_OVER else Status.FINISHED)
        seq.finish_reason = reason
        if seq.row >= 0:
            self.rows.alive[seq.row] = False
        del self._sequences[seq.request_id]
        self._writer.num_wanting_prompt_logprobs -= seq.prompt_logprobs is not None
        self.counters.requests_finished_total[reason.value] += 1
        return OutputDelta(seq.request_id, [], seq.num_cached_tokens, finish_reason=reason, error=error,
                           num_preemptions=seq.num_preemptions,
                           cached_by_tier=self._writer.untold.pop(seq.request_id, None))

    def _commit_blocks(self, rows: np.ndarray) -> None:
        """Make the blocks that became full in this step findable in the prefix index."""
        table = self.rows
        full = table.computed[rows] // self.kv.block_size > self.kv.num_committed_R[rows]
        for row in rows[full].tolist():
            seq = table.seqs[row]
            if seq is not None and seq.status is Status.RUNNING:
                self.running.commit(row)

    def _leave_settled(self, rows: np.ndarray) -> None:
        """Free the rows whose sequence has ended or was preempted and that no step in flight uses."""
        gone = rows[~self.rows.alive[rows] & (self.rows.in_flight[rows] == 0)]
        for row in gone.tolist():
            if self.rows.seqs[row] is not None:
                self.running.release(row)
        self._preemption.settle()

    # --- audit

    def check_integrity(self) -> None:
        """Raise IntegrityError if counters, queues, rows and blocks disagree."""
        self.kv.check_integrity()
        table = self.rows
        owners = [row for row in range(table.num_rows) if table.seqs[row] is not None]
        if len(owners) + table.num_free != table.num_rows:
            raise IntegrityError("a row is neither owned nor free")
        self.running.check_integrity()
        if not self._sequences and self.kv.num_held_blocks and not self.kv.num_loading:
            raise IntegrityError("blocks are held though no request is left")
