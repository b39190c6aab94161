"""`Promotions`: requests whose prefix is on its way up from host memory or disk (status WAITING_KV).

Such a request has left the queue and owns no row; nobody waits behind it. When its blocks are there, or so near that
the step would not wait for them, it goes back to its place in the queue, and its blocks are kept until it gets in.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xllm.kv.kv_source import Extension
from xllm.kv.lift import Lift
from xllm.kv.manager import KVManager
from xllm.kv.prefix_index import PrefixMatch
from xllm.kv.promotion import Stage
from xllm.scheduler.step_rates import StepRates
from xllm.sequence import SequenceState

MAX_WAIT_S = 10.0  # for disk; then the prompt is computed
FLUSH_S = 10.0  # at most, for storing the KV cache when the engine stops
EARLY_SHARE = 0.5  # of a step's time that a load may take if its request is admitted before it is complete


class Promotions:
    """Decides whether a request waits for stored blocks and when it goes on: the scheduler's side of the KV tiers."""

    def __init__(self, kv: KVManager, rates: StepRates, clock: Callable[[], float], preemption_mode: str):
        self._kv, self._rates, self._clock, self._mode = kv, rates, clock, preemption_mode
        self._staging: dict[SequenceState, tuple[Stage, float]] = {}  # and when to give up
        self._loading: dict[SequenceState, tuple[tuple[int, ...], int]] = {}  # (tickets, blocks)
        self._lifting: dict[SequenceState, tuple[Lift, float]] = {}  # and when to give up
        self._stage_of: dict[SequenceState, Stage] = {}  # the last that was begun for it since it was queued
        self._tried: dict[SequenceState, int] = {}  # stages, loads and lifts begun for it since it was queued

    def __len__(self) -> int:
        return len(self._staging) + len(self._loading) + len(self._lifting)

    def prefetch(self, seq: SequenceState) -> None:
        """The request has just arrived: begin to read what is on disk."""
        if not self._kv.can_stage:
            return
        match = self._kv.lookup(seq.token_ids, seq.request.cache_salt)
        extension = self._kv.extend(match, seq.token_ids)
        if len(extension.disk_path):
            self._stage_of[seq] = self._kv.stage(extension, _priority(seq))

    def begin(self, seq: SequenceState, tokens: np.ndarray, match: PrefixMatch) -> bool:
        """Whether the request at the head of the queue shall wait for stored blocks that follow its device hit.

        tokens: those whose KV it may reuse. It has been found to fit, so the blocks to load to are available.
        """
        if self._tried.get(seq, 0) >= 3:
            return False
        extension = self._kv.extend(match, tokens)
        if self._tried.get(seq, 0) == 2:
            return self._begin_lift(seq, match, extension)
        if len(extension.disk_path) and self._tried.get(seq, 0) == 0:
            self._tried[seq] = 1
            stage = self._stage_of[seq] = self._kv.stage(extension, _priority(seq))
            if not stage.is_done:
                self._staging[seq] = (stage, self._clock() + MAX_WAIT_S)
                return True
            extension = self._kv.extend(match, tokens)
        num_blocks = extension.on_host(len(match.block_ids))
        if not num_blocks:
            return self._begin_lift(seq, match, extension)
        self._tried[seq] = 2
        self._count(seq, num_blocks)
        self.give_up(seq)  # what it keeps already is part of the longer path
        tickets = self._kv.load(seq.arrival_index, match, extension, _priority(seq))
        self._loading[seq] = (tickets, num_blocks)
        return True

    def _begin_lift(self, seq: SequenceState, match: PrefixMatch, extension: Extension) -> bool:
        """Whether to wait for what host memory had no room for. Its blocks fit, as all of the request's do."""
        if len(extension.disk_path) <= len(match.block_ids):
            return False
        self._tried[seq] = 3
        lift = self._kv.lift(match, extension, _priority(seq))
        if lift.is_done:
            return False
        self._lifting[seq] = (lift, self._clock() + MAX_WAIT_S)
        return True

    def _take_lifted(self, now: float) -> list[SequenceState]:
        """Those whose lift is done, or has taken too long. What it brought is kept until they get in."""
        ready = [seq for seq, (lift, give_up_s) in self._lifting.items() if lift.is_done or now >= give_up_s]
        for seq in ready:
            lift, _ = self._lifting.pop(seq)
            self.give_up(seq)
            if lift.is_done:
                self._kv.hold(seq.arrival_index, self._kv.lifted(lift))
            seq.num_disk_tokens += lift.num_read * self._kv.block_size
        return ready

    def _count(self, seq: SequenceState, num_blocks: int) -> None:
        """Where the blocks that are loaded for it came from."""
        stage = self._stage_of.get(seq)
        from_disk = min(num_blocks, stage.num_read) if stage is not None else 0
        seq.num_disk_tokens = from_disk * self._kv.block_size
        seq.num_host_tokens = (num_blocks - from_disk) * self._kv.block_size

    def take_ready(self) -> list[SequenceState]:
        """Take in what has moved; returns the requests that need not wait any longer."""
        now = self._clock()
        self._kv.poll(now)
        if not len(self):
            return []
        ready = [seq for seq, (stage, give_up_s) in self._staging.items() if stage.is_done or now >= give_up_s]
        for seq in ready:
            del self._staging[seq]
        ready += self._take_lifted(now)
        for seq, (tickets, num_blocks) in list(self._loading.items()):
            is_near = self._kv.load_s(num_blocks) <= EARLY_SHARE * self._rates.step_s
            if is_near or not self._kv.is_loading(tickets):
                del self._loading[seq]
                ready.append(seq)
        return ready

    def wait(self, timeout_s: float) -> bool:
        """No step can be planned: sleep until moves between the tiers change that. False: none is on its way."""
        return self._kv.wait(timeout_s) or bool(len(self))

    def idle_s(self) -> float | None:
        """How soon `tick` should be called while there is nothing to schedule; None: never."""
        return self._kv.idle_s(self._clock())

    def tick(self) -> None:
        """Carry on with what the KV tiers do in the background."""
        self._kv.set_foreground(False)
        self._kv.poll(self._clock())

    def close(self) -> None:
        """No step is planned any more: store what the device still has, as far as there is a disk for it."""
        self._kv.close(FLUSH_S)

    def swap_beats_recompute(self, num_tokens: int) -> bool:
        """Whether a preempted row's KV is sooner copied to host memory and back than computed again."""
        rate = self._rates.prefill_tokens_per_s
        if not self._kv.has_tiers or self._mode == "recompute":
            return False
        swap_s = self._kv.swap_s(num_tokens // self._kv.block_size)
        return self._mode == "swap" or (rate > 0.0 and swap_s < num_tokens / rate)

    def give_up(self, seq: SequenceState) -> None:
        """Release the KV blocks held for this request, if any."""
        if self._kv.holds(seq.arrival_index):
            self._kv.let_go(seq.arrival_index)

    def forget(self, seq: SequenceState) -> None:
        """The request got in or has ended. Loads that run go on; what they bring stays cached."""
        self._stage_of.pop(seq, None)
        if self._tried.pop(seq, 0):
            self._staging.pop(seq, None)
            self._loading.pop(seq, None)
            self._lifting.pop(seq, None)
            self.give_up(seq)

    def give_up_all(self, but: SequenceState | None = None) -> bool:
        """Blocks are short: waiting requests (all, or all but one) lose their claim; whether there was any."""
        spared = None if but is None else but.arrival_index
        keys = [key for key in self._kv.held_keys if key != spared]
        for key in keys:
            self._kv.let_go(key)
        return bool(keys)


def _priority(seq: SequenceState) -> int:
    """Of its moves: online before offline, then by the request's own priority."""
    return (2**31 if seq.request.offline else 0) + seq.request.priority
