"""`Admission`: takes requests from the queue, strictly in its order, and gives each a row."""

from __future__ import annotations

import numpy as np

from xllm.config import EngineConfig
from xllm.kv.manager import KVManager
from xllm.kv.prefix_index import PrefixMatch
from xllm.scheduler.kv_waits import Promotions
from xllm.scheduler.plan import PlanBuilder
from xllm.scheduler.preemption import Preemption
from xllm.scheduler.queues import WaitingQueue
from xllm.scheduler.row_table import RowTable
from xllm.scheduler.running import Running
from xllm.sequence import SequenceState, Status
from xllm.stats import Counters
from xllm.step import NewRow


class Admission:
    """Matches prefixes, reserves blocks and enters sequences into rows. Owned by the scheduler."""

    def __init__(self, config: EngineConfig, kv: KVManager, rows: RowTable, running: Running, waiting: WaitingQueue,
                 promotions: Promotions, preemption: Preemption, counters: Counters):
        assert config.model.max_model_len
        self._max_model_len, self._seed = config.model.max_model_len, config.model.seed
        self._watermark_blocks = int(config.cache.watermark * kv.num_blocks)
        self._kv, self._rows, self._running, self._waiting = kv, rows, running, waiting
        self._promotions, self._preemption = promotions, preemption
        self._counters, self._clock = counters, running.clock
        # (the head that did not fit, the blocks there were, `running.num_changes` then): the head is not tried again
        # before one of the three is different.
        self._blocked: tuple[SequenceState, int, int] | None = None
        self._admitted: list[tuple[str, float]] | None = None  # see `take_admitted`; None: not wanted
        self._found: dict[str, dict[str, int]] = {}

    def take_admitted(self) -> list[tuple[str, float]]:
        """(request id, time by the clock) of the requests that were admitted for the first time since the last call.
        They are recorded from the first call on."""
        taken, self._admitted = self._admitted or [], []
        return taken

    def take_promoted(self) -> None:
        """Put requests that need not wait for stored blocks any longer back into the queue, at their place in its
        order."""
        for seq in self._promotions.take_ready():
            seq.move(Status.WAITING)
            self._waiting.push(seq)
            self._blocked = None

    def admit(self, plan: PlanBuilder) -> dict[str, dict[str, int]]:
        """Admit requests from the head of the queue while tokens, rows and blocks last. Strictly in order, so that no
        request starves behind smaller ones. Returns, for each request admitted for the first time, by id: how many of
        its cached tokens came from each tier."""
        while plan.budget.left > 0 and not plan.stalled:
            seq = self._waiting.peek()
            if seq is None:
                break
            progress = self._try(plan, seq) if self._rows.num_free else self._preemption.yield_for(plan, seq)
            if not progress:
                break
        found, self._found = self._found, {}
        return found

    def _try(self, plan: PlanBuilder, seq: SequenceState) -> bool:
        """Try to admit the head of the queue. Returns whether it left the queue, or blocks were freed so that another
        try is worth it."""
        unreserved = self._kv.num_free_blocks - self._reserved_blocks()
        others = self._has_others()
        if others and self._is_still_blocked(seq, unreserved):
            return self._preemption.yield_for(plan, seq)
        tokens = self._reusable_tokens(seq)
        match = self._kv.lookup(tokens, seq.request.cache_salt)
        num_tokens = len(seq.token_ids)
        # Blocks for the whole prompt and its first output are reserved: a prompt half computed is of no use.
        need = num_tokens // self._kv.block_size + 1 - len(match.block_ids)
        spare = self._watermark_blocks if len(self._running) else 0
        if need + spare > unreserved - self._kv.num_idle(match):
            if others:
                self._blocked = (seq, unreserved, self._running.num_changes)
                return self._preemption.yield_for(plan, seq)
            if self._promotions.give_up_all(but=seq):
                return True
            self._promotions.give_up(seq)
            # Alone, a sequence may take all: it fits, since max_model_len does.
            tokens = seq.token_ids[:0]
            match = self._kv.lookup(tokens, seq.request.cache_salt)
        if self._promotions.begin(seq, tokens, match):
            self._waiting.pop()
            seq.move(Status.WAITING_KV)
            return True
        wanted = num_tokens - self._kv.num_cached_tokens(match)
        if not plan.budget.allow_partial and wanted > plan.budget.left:
            return False
        self._enter(plan, seq, match)
        return True

    def _has_others(self) -> bool:
        """Whether other requests, transfers or loads have blocks or rows that will become free."""
        return bool(len(self._running) or self._kv.num_pending_blocks or self._kv.num_loading
                    or self._rows.num_free < self._rows.num_rows)

    def _is_still_blocked(self, seq: SequenceState, unreserved: int) -> bool:
        if self._blocked is None:
            return False
        owner, had, num_changes = self._blocked
        return owner is seq and unreserved <= had and num_changes == self._running.num_changes

    def _reserved_blocks(self) -> int:
        """How many blocks the prompts of admitted requests will still take."""
        rows = self._running.rows()
        if not len(rows):
            return 0
        return int(self._kv.blocks_needed(rows, self._rows.known[rows]).sum())

    def _reusable_tokens(self, seq: SequenceState) -> np.ndarray:
        """The sequence's tokens whose KV may come from a cache: none where prompt_logprobs or its pooling needs every
        position of the prompt computed."""
        tokens = seq.token_ids
        pooling = seq.request.pooling
        needs_all = seq.request.sampling.prompt_logprobs is not None or (pooling and pooling.needs_every_token)
        if needs_all and len(tokens) == seq.num_prompt_tokens:
            tokens = tokens[:0]
        return tokens

    def _enter(self, plan: PlanBuilder, seq: SequenceState, match: PrefixMatch) -> None:
        self._waiting.pop()
        seq.move(Status.RUNNING)
        num_cached, num_hot = self._kv.num_cached_tokens(match), self._kv.num_hot(match)
        self._count(seq, num_cached)
        row = seq.row = self._rows.enter(seq, num_cached, self._length_limit(seq))
        self._waiting.note_admission(seq, row, num_cached)
        copy = self._kv.enter(row, match, plan.step)
        if copy is not None:
            plan.copies.append(copy)
        plan.tickets.update(self._kv.open_tickets(self._kv.blocks_read(match)))
        if seq.num_preemptions == 0:
            self._found[seq.request_id] = self._count_by_tier(seq, num_hot)
            if self._kv.has_tiers:
                self._kv.turn_began(seq.session_key, match.block_ids, self._clock)
        self._promotions.forget(seq)
        self._running.enter(seq)
        plan.new_rows.append(self._new_row(seq, num_cached))
        self._plan_first(plan, row, num_cached)

    def _count(self, seq: SequenceState, num_cached: int) -> None:
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = min(num_cached, seq.num_prompt_tokens)
            self._counters.cached_prompt_tokens_total += seq.num_cached_tokens
            if self._admitted is not None:
                self._admitted.append((seq.request_id, self._clock()))
        self._counters.prefix_queries_total += len(seq.token_ids)
        self._counters.prefix_hits_total += num_cached

    def _plan_first(self, plan: PlanBuilder, row: int, num_cached: int) -> None:
        """Plan the row's first tokens and take the blocks for them."""
        table, rows = self._rows, np.array([row])
        share = plan.budget.share(rows, table.upper[rows] - num_cached, table.limit[rows] - table.upper[rows])
        share.drafts[:] = 0
        need = self._kv.blocks_needed(rows, num_cached + share.tokens)
        if need[0]:
            plan.grow(rows, need)
        plan.commit(share)

    def _count_by_tier(self, seq: SequenceState, num_hot: int) -> dict[str, int]:
        """How many of the sequence's cached tokens came from each tier: l1 and l2 on the device, l3 host memory, l4
        disk, l5 the shared store. Adds them to the counters."""
        left = seq.num_cached_tokens
        left -= (store := min(seq.num_store_tokens, left))
        left -= (disk := min(seq.num_disk_tokens, left))
        host = min(seq.num_host_tokens, left)
        device = left - host
        protected = min(device, num_hot * self._kv.block_size)
        by_tier = {"l1": protected, "l2": device - protected, "l3": host, "l4": disk, "l5": store}
        for tier, num_tokens in by_tier.items():
            self._counters.cached_tokens_by_tier_total[tier] += num_tokens
        return by_tier

    def _length_limit(self, seq: SequenceState) -> int:
        max_tokens = seq.request.sampling.max_tokens
        longest = self._max_model_len if max_tokens is None else seq.num_prompt_tokens + max_tokens
        return min(longest, self._max_model_len)

    def _new_row(self, seq: SequenceState, num_cached: int) -> NewRow:
        params = seq.request.sampling
        seed = self._seed * 1_000_003 + seq.arrival_index if params.seed is None else params.seed
        return NewRow(row=seq.row, request_id=seq.request_id, token_ids=seq.token_ids,
                      num_prompt_tokens=seq.num_prompt_tokens, num_computed_tokens=num_cached,
                      block_ids=self._kv.blocks_of(seq.row), sampling=params,
                      eos_token_ids=seq.request.eos_token_ids, seed=seed, pooling=seq.request.pooling,
                      lora_slot=seq.request.lora_slot)
