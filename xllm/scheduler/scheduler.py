"""`Scheduler`: which rows compute which tokens, step by step.

There is no prefill phase and no decode phase: every sequence has tokens whose KV is not computed
yet, and each step computes some of them (`rows.py`). `schedule()` decides and returns a value;
`update()` takes in what came of it. With overlapped scheduling `schedule()` for step n + 1 runs
before `update()` for step n.

Neither touches the sequences one by one while they merely decode: the work is done on the row
table's arrays, and Python sees only the sequences whose state changes.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable

import numpy as np

from xllm.config import EngineConfig
from xllm.errors import IntegrityError, RequestError
from xllm.kv.eviction import make_policy
from xllm.kv.manager import KVManager
from xllm.kv.prefix_index import PrefixMatch
from xllm.request import FinishReason, OutputDelta, Request
from xllm.scheduler.budget import Share, TokenBudget
from xllm.scheduler.counters import Counters, StepRates
from xllm.scheduler.fair import make_queue
from xllm.scheduler.outputs import OutputWriter
from xllm.scheduler.plan import PlanBuilder
from xllm.scheduler.policy import Key, Phase, phases, request_key
from xllm.scheduler.promotions import Promotions
from xllm.scheduler.rows import RowTable
from xllm.sequence import SequenceState, Status
from xllm.step import NewRow, ScheduleOutput, StepOutput


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
        self.counters = Counters()
        self._writer = OutputWriter(self.rows, self.counters)
        self.rates = StepRates()
        self.promotions = Promotions(self.kv, self.rates, clock, cache.preemption_mode)
        self._clock = clock
        self._seed = config.model.seed
        self._watermark_blocks = int(cache.watermark * num_blocks)
        self._max_waiting, self._max_requests = s.max_waiting_requests, s.max_concurrent_requests
        self._preempt_offline = s.online_preempts_offline
        self._phases = phases(s.scheduling_policy)
        self._key = request_key(s.scheduling_policy, offline_last=s.online_preempts_offline)
        self._budget = TokenBudget(max_tokens=s.max_num_batched_tokens, max_chunk=s.long_prefill_token_threshold,
                                   allow_partial=s.enable_chunked_prefill,
                                   max_drafts=spec.num_speculative_tokens if spec.speculative_method else 0)
        self.waiting = make_queue(s.scheduling_policy, self._key, s.max_num_seqs)
        self._sequences: dict[str, SequenceState] = {}
        self._running: list[tuple[Key, int]] = []  # (key, row), sorted: the order of service
        self._order: np.ndarray | None = None  # the rows of _running as an array; None: make it anew
        self._preempting: list[int] = []  # rows whose sequence goes back to the queue when they settle
        self._released_rows: list[int] = []
        self._ready: list[OutputDelta] = []  # terminal outputs that no step produced
        self._admissions: list[tuple[str, float]] | None = None  # see `take_admissions`; None: nobody wants them
        self._stalled = False  # a running row found no block in this step
        self._blocked: tuple[SequenceState, int] | None = None  # head of the queue, blocks there were
        self._next_step = 0
        self._num_arrived = 0
        self._yielding: SequenceState | None = None  # the offline sequence to preempt before the next step

    # --- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never run or the queue is full."""
        num_tokens = len(request.prompt_token_ids)
        if num_tokens == 0:
            raise RequestError("the prompt is empty", field="prompt")
        if num_tokens >= self.max_model_len:
            raise RequestError(f"the prompt has {num_tokens} tokens; with max_model_len {self.max_model_len} it may "
                               f"have at most {self.max_model_len - 1}", field="prompt")
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
        self.counters.prompt_tokens += num_tokens

    def check_room(self, num_held: int = 0) -> None:
        """Raise RequestError if no more requests are taken. num_held: those that are still to come."""
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
        row = seq.row
        self._ready.append(self._finish(seq, FinishReason.ABORT))
        if row >= 0 and self.rows.in_flight[row] == 0:
            self._release_row(row)

    def take_ready(self) -> list[OutputDelta]:
        """Terminal outputs of requests that ended outside a step."""
        ready, self._ready = self._ready, []
        return ready

    def take_admissions(self) -> list[tuple[str, float]]:
        """(request id, time by the scheduler's clock) of requests that left the queue for the first time since the last
        call. Kept from the first call on."""
        taken, self._admissions = self._admissions or [], []
        return taken

    @property
    def num_running(self) -> int:
        return len(self._running)

    def oldest_waiting_s(self) -> float:
        """How long the head of the queue has waited, by the scheduler's clock; 0 if nobody waits."""
        head = self.waiting.head
        return max(0.0, self._clock() - head.request.arrival_s) if head is not None else 0.0

    def forget_runner(self) -> None:
        """No request is open, and the next plan goes to a runner that knows nothing yet."""
        assert not self._sequences and not self._running
        self._released_rows.clear()
        self.kv.pool.drop_cached()

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of all that have not ended."""
        return tuple(self._sequences)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Those that have not ended."""
        return tuple(seq.request for seq in self._sequences.values())

    @property
    def has_ready(self) -> bool:
        """Whether `take_ready` has anything to give."""
        return bool(self._ready)

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended, or has and its output was not taken."""
        return bool(self._sequences or self._ready)

    # --- deciding a step

    def schedule(self) -> ScheduleOutput:
        """Plan the next step. The plan may be empty: then the steps in flight must settle first."""
        plan = PlanBuilder()
        self._budget.reset()
        self._stalled = False
        if self.kv.tiers is not None:
            for seq in self.promotions.take_ready():
                seq.move(Status.WAITING)
                self.waiting.push(seq)
                self._blocked = None
        if self._yielding is not None:
            self._preempt_yielding()
        for phase in self._phases:
            if phase is Phase.ADMISSION:
                if len(self.waiting):
                    self._admit(plan)
            elif self._running:
                self._plan_running(plan, phase)
        return self._seal(plan)

    def _plan_running(self, plan: PlanBuilder, phase: Phase) -> None:
        rows, table = self._service_order(), self.rows
        room = table.limit[rows] - table.upper[rows]
        wanted = table.upper[rows] - table.cursor[rows]
        eligible = room > 0
        if plan.shares:  # in an earlier phase of this step
            eligible &= table.last_step[rows] < self._next_step
        if phase is Phase.DECODES:
            eligible &= wanted == 1
        elif phase is Phase.PREFILLS:
            eligible &= wanted > 1
        if not eligible.all():
            rows, room, wanted = rows[eligible], room[eligible], wanted[eligible]
        share = self._budget.share(rows, wanted, room)
        need = self.kv.blocks_needed(share.rows, table.cursor[share.rows] + share.tokens + share.drafts)
        total = int(need.sum())
        if total > self.kv.pool.num_available:
            share, need = self._make_fit(share, need)
            total = int(need.sum())
        if total:
            self._grow(plan, share.rows, need)
        if len(share.rows):
            self._commit_share(plan, share)

    def _service_order(self) -> np.ndarray:
        if self._order is None:
            self._order = np.array([row for _, row in self._running], dtype=np.int64)
        return self._order

    def _grow(self, plan: PlanBuilder, rows: np.ndarray, need: np.ndarray) -> None:
        growing = need > 0
        grown_rows, grown_ids = self.kv.grow(rows[growing], need[growing])
        plan.grown_rows.append(grown_rows)
        plan.grown_ids.append(grown_ids)

    def _commit_share(self, plan: PlanBuilder, share: Share) -> None:
        """The share stands: move the rows' counters as if every draft were accepted."""
        table, rows = self.rows, share.rows
        self._budget.take(share)
        samples = share.tokens == share.wanted
        table.upper[rows] += np.where(samples, 1 + share.drafts, 0)
        table.cursor[rows] += share.tokens + share.drafts
        table.in_flight[rows] += 1
        table.last_step[rows] = self._next_step
        plan.shares.append(share)

    def _seal(self, plan: PlanBuilder) -> ScheduleOutput:
        step, self._next_step = self._next_step, self._next_step + 1
        self.promotions.set_foreground(bool(plan.shares))
        if not plan.shares:  # an empty plan is never run: what it would carry waits for the next
            return plan.build(step)
        released, self._released_rows = tuple(self._released_rows), []
        replaced = self.kv.take_replaced()
        plan.tickets.update(self.kv.open_tickets(replaced[:, 2]))
        return plan.build(step, released, replaced)

    # --- too few blocks

    def _make_fit(self, share: Share, need: np.ndarray) -> tuple[Share, np.ndarray]:
        """Row by row: give up drafts, preempt rows that are served later, or leave the row out.

        Blocks freed here are often PENDING until the step in flight settles; a row that waits for
        them is left out of this step, and nobody else is preempted for it meanwhile.
        """
        self.promotions.give_up_all()  # running rows come before requests that wait with blocks in their hands
        pool, table = self.kv.pool, self.rows
        kept = np.zeros(len(share.rows), dtype=bool)
        drafts, need = share.drafts.copy(), need.copy()
        taken = 0
        gone: set[int] = set()
        for i, row in enumerate(share.rows.tolist()):
            if row in gone:
                continue
            if need[i] > pool.num_available - taken and drafts[i]:
                drafts[i] = 0
                end = table.cursor[row] + share.tokens[i]
                need[i] = self.kv.blocks_needed(np.array([row]), np.array([end]))[0]
            while need[i] > pool.num_available - taken:
                if need[i] <= pool.num_available + pool.num_pending - taken:
                    break  # enough is on its way
                victim = self._victim(after=row)
                if victim is None:
                    break
                gone.add(victim)
                self._preempt(victim)
            if need[i] > pool.num_available - taken:
                self._stalled = True
                continue
            kept[i] = True
            taken += int(need[i])
        return Share(share.rows, share.tokens, drafts, share.wanted).only(kept), need[kept]

    def _victim(self, after: int) -> int | None:
        """The running row that is served last, if that is after row `after` and not planned in this step."""
        for _, row in reversed(self._running):
            if row == after:
                return None
            if self.rows.last_step[row] < self._next_step:
                return row
        return None

    def _preempt(self, row: int) -> None:
        """Take a row's blocks away; its sequence will compute its tokens anew later."""
        seq = self.rows.seqs[row]
        assert seq is not None
        swap = self.promotions.swap_beats_recompute(int(self.rows.computed[row]))
        self.counters.swaps += swap
        self._stop_running(seq, used=False, swap=swap)
        seq.num_preemptions += 1
        self.counters.preemptions += 1
        seq.move(Status.PREEMPTED)
        if self.rows.in_flight[row]:
            self._preempting.append(row)
        else:
            self._requeue(row)

    def _stop_running(self, seq: SequenceState, *, commit: bool = True, used: bool = True, swap: bool = False,
                      ended_well: bool = False) -> None:
        """Off the service order, and its blocks given back. `commit`: those now full go to the prefix index.
        `used`: not if it will be back. `swap`: they are copied to host memory first. `ended_well`: there may be a
        next turn."""
        at = bisect.bisect_left(self._running, (self._key(seq), seq.row))
        assert self._running[at][1] == seq.row
        del self._running[at]
        self._order = None
        self._blocked = None
        if commit:
            self._commit_row(seq.row)
        if ended_well:
            self.kv.turn_ended(seq.session_key, seq.row, self._clock)
        self.kv.leave(seq.row, int(self.rows.last_step[seq.row]), used=used, swap=swap)

    def _requeue(self, row: int) -> None:
        seq = self.rows.seqs[row]
        assert seq is not None
        seq.token_ids = self.rows.tokens_of(row)
        if len(seq.token_ids) == seq.num_prompt_tokens:
            seq.restart_prompt_logprobs()  # not delivered yet: they will be computed anew
        seq.move(Status.WAITING)
        self._release_row(row)
        self.waiting.push(seq)

    def _release_row(self, row: int) -> None:
        seq = self.rows.seqs[row]
        assert seq is not None
        seq.row = -1
        self.rows.leave(row)
        self._released_rows.append(row)

    # --- admission

    def _admit(self, plan: PlanBuilder) -> None:
        """Admit from the head of the queue while tokens, rows and blocks last. Strictly in order, so that
        nobody starves behind smaller requests."""
        while self._budget.left > 0 and not self._stalled:
            seq = self.waiting.peek()
            if seq is None:
                return
            progress = self._try_admit(plan, seq) if self.rows.num_free else self._yield_offline(seq)
            if not progress:
                return

    def _try_admit(self, plan: PlanBuilder, seq: SequenceState) -> bool:
        """Whether the sequence got in, or something was freed so that another try is worth it."""
        pool = self.kv.pool
        unreserved = pool.num_available - self._reserved_blocks()
        others = bool(self._running or pool.num_pending or self.kv.num_loading
                      or self.rows.num_free < self.rows.num_rows)
        if others and self._blocked is not None and self._blocked[0] is seq and unreserved <= self._blocked[1]:
            return self._yield_offline(seq)
        tokens = self._reusable_tokens(seq)
        match = self.kv.lookup(tokens, seq.request.cache_salt)
        num_tokens = len(seq.token_ids)
        # The whole prompt and its first output are reserved: a prompt half computed helps nobody.
        need = num_tokens // self.kv.block_size + 1 - len(match.block_ids)
        spare = self._watermark_blocks if self._running else 0
        if need + spare > unreserved - self.kv.num_idle(match):
            if others:
                self._blocked = (seq, unreserved)
                return self._yield_offline(seq)
            if self.promotions.give_up_all(but=seq):
                return True
            self.promotions.give_up(seq)
            # Alone, a sequence may take all: it fits, since max_model_len does.
            tokens = seq.token_ids[:0]
            match = self.kv.lookup(tokens, seq.request.cache_salt)
        if self.promotions.begin(seq, tokens, match):
            self.waiting.pop()
            seq.move(Status.WAITING_KV)
            return True
        wanted = num_tokens - self.kv.num_cached_tokens(match)
        if not self._budget.allow_partial and wanted > self._budget.left:
            return False
        self._enter(plan, seq, match)
        return True

    def _reusable_tokens(self, seq: SequenceState) -> np.ndarray:
        """Its tokens, as far as their KV may come from a cache: prompt_logprobs and some embeddings need every position
        computed."""
        tokens = seq.token_ids
        pooling = seq.request.pooling
        needs_all = seq.request.sampling.prompt_logprobs is not None or (pooling and pooling.needs_every_token)
        if needs_all and len(tokens) == seq.num_prompt_tokens:
            tokens = tokens[:0]
        return tokens

    def _reserved_blocks(self) -> int:
        """Blocks that admitted prompts will still take."""
        rows = self._service_order()
        if not len(rows):
            return 0
        return int(self.kv.blocks_needed(rows, self.rows.known[rows]).sum())

    def _enter(self, plan: PlanBuilder, seq: SequenceState, match: PrefixMatch) -> None:
        self.waiting.pop()
        self._blocked = None
        seq.move(Status.RUNNING)
        num_tokens = len(seq.token_ids)
        num_cached, num_hot = self.kv.num_cached_tokens(match), self.kv.num_hot(match)
        first_time = seq.num_preemptions == 0
        if first_time:
            seq.num_cached_tokens = num_cached
            self.counters.cached_prompt_tokens += num_cached
            if self._admissions is not None:
                self._admissions.append((seq.request_id, self._clock()))
        self.counters.prefix_queries += num_tokens
        self.counters.prefix_hits += num_cached
        row = seq.row = self.rows.enter(seq, num_cached, self._length_limit(seq))
        self.waiting.note_admission(seq, row, num_cached)
        copy = self.kv.enter(row, match, self._next_step)
        if copy is not None:
            plan.copies.append(copy)
        plan.tickets.update(self.kv.open_tickets(self.kv.blocks_read(match)))
        if first_time and self.kv.tiers is not None:
            self._ready.append(self._tier_report(seq, num_hot))
            self.kv.turn_began(seq.session_key, match.block_ids, self._clock)
        self.promotions.forget(seq)
        bisect.insort(self._running, (self._key(seq), row))
        self._order = None
        plan.new_rows.append(self._new_row(seq, num_cached))
        rows = np.array([row])
        share = self._budget.share(rows, self.rows.upper[rows] - num_cached, self.rows.limit[rows] - num_tokens)
        share.drafts[:] = 0
        need = self.kv.blocks_needed(rows, num_cached + share.tokens)
        if need[0]:
            self._grow(plan, rows, need)
        self._commit_share(plan, share)

    def _tier_report(self, seq: SequenceState, num_hot: int) -> OutputDelta:
        """A delta without tokens that says where the sequence's cached tokens were."""
        delta = OutputDelta(seq.request_id, [], seq.num_cached_tokens)
        disk = min(seq.num_disk_tokens, seq.num_cached_tokens)
        host = min(seq.num_host_tokens, seq.num_cached_tokens - disk)
        device = seq.num_cached_tokens - disk - host
        protected = min(device, num_hot * self.kv.block_size)
        delta.cached_by_tier = {"l1": protected, "l2": device - protected, "l3": host, "l4": disk}
        for tier, num_tokens in delta.cached_by_tier.items():
            self.counters.hits_by_tier[tier] += num_tokens
        return delta

    def _length_limit(self, seq: SequenceState) -> int:
        max_tokens = seq.request.sampling.max_tokens
        longest = self.max_model_len if max_tokens is None else seq.num_prompt_tokens + max_tokens
        return min(longest, self.max_model_len)

    def _new_row(self, seq: SequenceState, num_cached: int) -> NewRow:
        params = seq.request.sampling
        seed = self._seed * 1_000_003 + seq.arrival_index if params.seed is None else params.seed
        return NewRow(row=seq.row, request_id=seq.request_id, token_ids=seq.token_ids,
                      num_prompt_tokens=seq.num_prompt_tokens, num_computed_tokens=num_cached,
                      block_ids=self.kv.blocks_of(seq.row), sampling=params,
                      eos_token_ids=seq.request.eos_token_ids, seed=seed, pooling=seq.request.pooling,
                      lora_slot=seq.request.lora_slot)

    def _yield_offline(self, seq: SequenceState) -> bool:
        """An online request cannot get in: preempt one offline row for it, unless one is on its way out.
        Whether that freed anything at once; otherwise it does when the step in flight settles."""
        if seq.request.offline or not self._preempt_offline or self._preempting or self.kv.pool.num_pending:
            return False
        for _, row in reversed(self._running):
            owner = self.rows.seqs[row]
            if owner is None or not owner.request.offline:
                continue
            if self.rows.last_step[row] == self._next_step:  # part of this step already: goes before the next
                self._yielding = owner
                return False
            at_once = not self.rows.in_flight[row]
            self._preempt(row)
            return at_once
        return False

    def _preempt_yielding(self) -> None:
        """Preempt the offline sequence that was found too late for the last step, if it is still needed."""
        owner, self._yielding = self._yielding, None
        head = self.waiting.peek()
        if owner is not None and owner.status is Status.RUNNING and head is not None and not head.request.offline:
            self._preempt(owner.row)

    # --- taking in a step's results

    def update(self, plan: ScheduleOutput, result: StepOutput) -> list[OutputDelta]:
        """Take in the results of a step, in the order of planning. Returns what changed, for all requests."""
        assert plan.step == result.step
        table, rows = self.rows, plan.rows_S.astype(np.int64)
        self.kv.pool.settle(plan.step)
        table.in_flight[rows] -= 1
        self._settle_counters(plan, result, rows)
        outputs, ended = self._writer.append(result, rows)
        for row, output in ended:
            self._finish_at(row, output)
        for i, reason in result.failed.items():
            seq = table.seqs[rows[i]]
            if seq is not None and seq.status is not Status.FINISHED:
                outputs.append(self._finish(seq, FinishReason.ERROR, error=reason))
        if self.kv.enable_prefix_caching:
            self._commit_blocks(rows)
        self._leave_settled(rows)
        if not self._running:
            self.promotions.set_foreground(False)
        return self.take_ready() + outputs if self._ready else outputs

    def _settle_counters(self, plan: ScheduleOutput, result: StepOutput, rows: np.ndarray) -> None:
        """Take back what was counted for drafts that were not accepted."""
        table = self.rows
        accepted = np.maximum(result.num_sampled_S - 1, 0)
        table.computed[rows] += plan.num_tokens_S + accepted
        self.waiting.note_outputs(rows, result.num_sampled_S)
        if self._budget.max_drafts:
            unused = np.where(plan.samples_S, plan.max_drafts_S - accepted, 0)
            table.upper[rows] -= unused
            table.cursor[rows] -= unused
            self.counters.drafts += int(np.count_nonzero(result.num_drafts_S))
            self.counters.draft_tokens += int(result.num_drafts_S.sum())
            self.counters.accepted_tokens += int(accepted.sum())

    def _finish_at(self, row: int, output: OutputDelta) -> None:
        """The row's last token, in `output`, ended it."""
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
        """End a sequence; returns a terminal output for the caller that has none yet."""
        if seq.status is Status.RUNNING:
            # What a failed step computed may not be finite either: nobody else must find it.
            self._stop_running(seq, commit=reason is not FinishReason.ERROR,
                               ended_well=reason in (FinishReason.STOP, FinishReason.LENGTH))
        elif seq.status is Status.PREEMPTED:
            self._preempting.remove(seq.row)
        seq.move(Status.FINISHED)
        seq.finish_reason = reason
        if seq.row >= 0:
            self.rows.alive[seq.row] = False
        del self._sequences[seq.request_id]
        self._writer.num_wanting_prompt_logprobs -= seq.prompt_logprobs is not None
        self.counters.finished[reason.value] += 1
        output = OutputDelta(seq.request_id, [], seq.num_cached_tokens)
        output.finish_reason, output.error, output.num_preemptions = reason, error, seq.num_preemptions
        return output

    def _commit_blocks(self, rows: np.ndarray) -> None:
        """Offer blocks that became full in this step to the prefix index."""
        table = self.rows
        full = table.computed[rows] // self.kv.block_size > self.kv.num_committed_R[rows]
        for row in rows[full].tolist():
            seq = table.seqs[row]
            if seq is not None and seq.status is Status.RUNNING:
                self._commit_row(row)

    def _commit_row(self, row: int) -> None:
        """Where a stop token stands among accepted drafts, KV is computed behind the last known token: not offered."""
        if self.kv.enable_prefix_caching:
            num_tokens = int(min(self.rows.computed[row], self.rows.known[row]))
            self.kv.commit(row, self.rows.token_ids[row], num_tokens, int(self.rows.last_step[row]))

    def _leave_settled(self, rows: np.ndarray) -> None:
        """Rows whose owner is gone and that no step in flight knows are free again."""
        gone = rows[~self.rows.alive[rows] & (self.rows.in_flight[rows] == 0)]
        for row in gone.tolist():
            if self.rows.seqs[row] is not None:
                self._release_row(row)
        for row in [r for r in self._preempting if self.rows.in_flight[r] == 0]:
            self._preempting.remove(row)
            self._requeue(row)

    # --- audit

    def check_integrity(self) -> None:
        """Raise IntegrityError if counters, queues, rows and blocks disagree."""
        self.kv.check_integrity()
        table = self.rows
        owners = [row for row in range(table.num_rows) if table.seqs[row] is not None]
        if len(owners) + table.num_free != table.num_rows:
            raise IntegrityError("a row is neither owned nor free")
        if self._running != sorted(self._running):
            raise IntegrityError("the service order is not sorted")
        for _, row in self._running:
            seq = table.seqs[row]
            if seq is None or seq.status is not Status.RUNNING or seq.row != row:
                raise IntegrityError(f"row {row} is served but its owner does not run")
            if not table.computed[row] < table.known[row] <= table.upper[row] <= table.limit[row]:
                raise IntegrityError(f"row {row}: counters out of order")
            if not table.computed[row] <= table.cursor[row] < table.upper[row]:
                raise IntegrityError(f"row {row}: cursor out of order")
            if self.kv.num_blocks_R[row] * self.kv.block_size < table.cursor[row]:
                raise IntegrityError(f"row {row}: tokens planned beyond its blocks")
        loading = self.kv.tiers is not None and self.kv.tiers.loader.num_open
        if not self._sequences and self.kv.pool.num_held and not loading:
            raise IntegrityError("blocks are held though no request is left")
