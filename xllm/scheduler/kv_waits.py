"""`Promotions`: the requests that wait for KV from host memory, disk or a shared store (status WAITING_KV).

Such a request has left the queue and owns no row, so no other request waits behind it. When its blocks are on the
device, or will be before a step would have to wait for them, it goes back to its place in the queue, and its blocks are
held until it is admitted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xllm.cost.online import OnlineCost
from xllm.kv.kv_source import Extension
from xllm.kv.landing import Lander
from xllm.kv.lift import Lift
from xllm.kv.manager import KVManager
from xllm.kv.prefix_index import PrefixMatch
from xllm.kv.promotion import Stage
from xllm.request import MAX_PRIORITY
from xllm.sequence import SequenceState

# How long a request waits for disk or the store before its prompt is computed. Chosen: longer than any healthy disk
# needs for a prompt, short enough that a request behind a stuck one is answered.
MAX_WAIT_S = 10.0
# Of a step's mean time: a load that is expected to take less is not waited for, its layers arrive before the step reads
# them. Chosen: the other half allows for loads that are slower than the mean.
EARLY_SHARE = 0.5
# Between looks of an idle engine at leases of KV that was not asked for. Chosen: it is kept so much longer.
LEASE_LOOK_S = 1.0


class Promotions:
    """Decides whether a request waits for stored blocks, and for how long: the scheduler's side of the KV tiers. Holds
    the blocks of waiting requests; belongs to the scheduler's thread."""

    def __init__(self, kv: KVManager, cost: OnlineCost, clock: Callable[[], float], preemption_mode: str):
        self._kv, self._cost, self._clock, self._mode = kv, cost, clock, preemption_mode
        self._staging: dict[SequenceState, tuple[Stage, float]] = {}  # and when to give up
        self._loading: dict[SequenceState, tuple[tuple[int, ...], int]] = {}  # (tickets, blocks)
        self._lifting: dict[SequenceState, tuple[Lift, float]] = {}  # and when to give up
        self._stage_of: dict[SequenceState, Stage] = {}  # the last that was begun for it since it was queued
        self._tried: dict[SequenceState, int] = {}  # stages, loads and lifts begun for it since it was queued
        self.lander: Lander | None = None  # of KV that other instances send

    def __len__(self) -> int:
        return len(self._staging) + len(self._loading) + len(self._lifting)

    def prefetch(self, seq: SequenceState) -> None:
        """Begin to read the blocks of a request that has just arrived from disk or the store, if it has any there."""
        if not self._kv.can_stage:
            return
        match = self._kv.lookup(seq.token_ids, seq.request.cache_salt)
        extension = self._kv.extend(match, seq.token_ids)
        if extension.is_below_host:
            self._stage_of[seq] = self._kv.stage(extension, _priority(seq))

    def begin(self, seq: SequenceState, tokens: np.ndarray, match: PrefixMatch) -> bool:
        """Begin to bring up the stored blocks that follow the device hit of the request at the head of the queue.
        Returns whether the request must wait for them; at most three attempts are made for one request (a stage, a
        load, a lift).

        tokens: those whose KV it may reuse. The caller has checked that the request fits, so the blocks to load into
        are available.
        """
        if self._tried.get(seq, 0) >= 3:
            return False
        extension = self._kv.extend(match, tokens)
        if self._tried.get(seq, 0) == 2:
            return self._begin_lift(seq, match, extension)
        if extension.is_below_host and self._tried.get(seq, 0) == 0:
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
        """Begin to lift the blocks below host memory that it had no room for; returns whether the request must wait.
        Device blocks for them are available, as for the whole request."""
        if not extension.is_below_host or extension.num_blocks <= len(match.block_ids):
            return False
        self._tried[seq] = 3
        lift = self._kv.lift(match, extension, _priority(seq))
        if lift.is_done:
            return False
        self._lifting[seq] = (lift, self._clock() + MAX_WAIT_S)
        return True

    def _take_lifted(self, now: float) -> list[SequenceState]:
        """The requests whose lift is done, or has taken too long; the lifted blocks are held until they are
        admitted."""
        ready = [seq for seq, (lift, give_up_s) in self._lifting.items() if lift.is_done or now >= give_up_s]
        for seq in ready:
            lift, _ = self._lifting.pop(seq)
            self.give_up(seq)
            if lift.is_done:
                self._kv.hold(seq.arrival_index, self._kv.lifted(lift))
            seq.num_disk_tokens += lift.num_read * self._kv.block_size
            seq.num_store_tokens += lift.num_fetched * self._kv.block_size
        return ready

    def _count(self, seq: SequenceState, num_blocks: int) -> None:
        """Record on the sequence how many of the tokens loaded for it come from the store, disk and host memory."""
        stage, left = self._stage_of.get(seq), num_blocks
        if stage is not None:
            left -= (fetched := min(left, stage.num_fetched))
            left -= (read := min(left, stage.num_read))
            seq.num_store_tokens, seq.num_disk_tokens = fetched * self._kv.block_size, read * self._kv.block_size
        seq.num_host_tokens = left * self._kv.block_size

    def take_ready(self) -> list[SequenceState]:
        """Take in the moves that have ended (`KVManager.poll`); returns the requests that need not wait any longer, and
        stops tracking them as waiting."""
        now = self.poll()
        if not len(self):
            return []
        ready = [seq for seq, (stage, give_up_s) in self._staging.items() if stage.is_done or now >= give_up_s]
        for seq in ready:
            del self._staging[seq]
        ready += self._take_lifted(now)
        for seq, (tickets, num_blocks) in list(self._loading.items()):
            is_near = self._kv.load_s(num_blocks) <= EARLY_SHARE * self._cost.step_s
            if is_near or not self._kv.is_loading(tickets):
                del self._loading[seq]
                ready.append(seq)
        return ready

    @property
    def now_s(self) -> float:
        """By the scheduler's clock."""
        return self._clock()

    def poll(self) -> float:
        """Take in the moves that have ended, and end what has lasted too long; returns the time by the scheduler's
        clock."""
        now = self._clock()
        self._kv.poll(now)
        if self.lander is not None:
            self.lander.expire(now)
        return now

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a move between the tiers has ended, at most `timeout_s`; for when no step can be planned. Returns
        False if no move is under way and no request waits for one."""
        return self._kv.wait(timeout_s) or bool(len(self))

    def idle_s(self) -> float | None:
        """In how many seconds `tick` should be called while there is nothing to schedule; None: not at all."""
        idle_s = self._kv.idle_s(self._clock())
        return LEASE_LOOK_S if idle_s is None and self.lander is not None and len(self.lander) else idle_s

    def tick(self) -> None:
        """Let the KV tiers go on with their background moves at full speed; called while nothing is scheduled."""
        self._kv.set_foreground(False)
        self.poll()

    def close(self, flush_s: float) -> None:
        """Copy the device's blocks to disk or the shared store, if there is one, for at most `flush_s`, and end all
        moves. No step may be planned afterwards."""
        self._kv.close(flush_s)

    def swap_beats_recompute(self, num_tokens: int) -> bool:
        """Whether a preempted row's KV should be copied to host memory and back rather than computed again: as
        `preemption_mode` says, with "auto" whichever is expected to be sooner."""
        if not self._kv.has_tiers or self._mode == "recompute":
            return False
        swap_s = self._kv.swap_s(num_tokens // self._kv.block_size)
        recompute_s = self._cost.prefill_s(num_tokens)
        return self._mode == "swap" or (recompute_s is not None and swap_s < recompute_s)

    def give_up(self, seq: SequenceState) -> None:
        """Release the KV blocks held for this request, if any."""
        if self._kv.holds(seq.arrival_index):
            self._kv.let_go(seq.arrival_index)

    def forget(self, seq: SequenceState) -> None:
        """Stop waiting for a request that was admitted or has ended, and release the blocks held for it. Loads that run
        go on; what they bring stays cached."""
        if self.lander is not None and seq.request.landing is not None:
            self.lander.give_up(seq.request.landing)
        self._stage_of.pop(seq, None)
        if self._tried.pop(seq, 0):
            self._staging.pop(seq, None)
            self._loading.pop(seq, None)
            self._lifting.pop(seq, None)
            self.give_up(seq)

    def give_up_all(self, but: SequenceState | None = None) -> bool:
        """Release the blocks held for all waiting requests, or all but `but`, because blocks are short. Returns whether
        any were held."""
        spared = None if but is None else but.arrival_index
        keys = [key for key in self._kv.held_keys if key != spared]
        for key in keys:
            self._kv.let_go(key)
        return bool(keys)


def _priority(seq: SequenceState) -> int:
    """The priority of the request's moves: online before offline, then by its own priority."""
    return (2 * MAX_PRIORITY + 1 if seq.request.offline else 0) + seq.request.priority
