"""`BlockPool`: the one place that decides whether a KV block may be used again.

A block carries (ref_count, fence, pins, lease). `fence` is the last step that may touch it, `pins` are the
moves in flight that read it, `lease` keeps it for a transfer that has not begun. It becomes reusable
only when

    ref_count == 0  and  settled_step >= fence  and  pins == 0  and  no lease is alive

The states of a block:

    FREE     holds nothing; on the free stack
    HELD     ref_count > 0
    PENDING  ref_count == 0, but a running step (fence) or a transfer (pin, lease) may still touch it
    CACHED   ref_count == 0, findable through the prefix index, evictable unless a transfer guards it

A transfer may guard a cached block to copy it. Where eviction meets such a block it is no longer
findable, and PENDING until the last guard is gone.

A lease has a deadline: the transfer that took it may be stuck, and must not keep blocks from other requests for ever.
A pin has none, because the copy reads the block whatever the clock says: it ends with the move, or with the engine if
its worker dies. So an expired lease never lets a block be overwritten under a copy: a copy in flight has pinned its
blocks as well, and one that has not begun looks for its blocks again before it begins (`DeviceOrigin.take`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xllm.errors import IntegrityError
from xllm.kv.eviction import EvictionPolicy
from xllm.kv.prefix_index import PrefixIndex

FREE, HELD, PENDING, CACHED = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """Blocks kept for a transfer until a deadline (by the clock of `expire_leases`). Made by `BlockPool.lease`; ended
    by `BlockPool.end_lease`, or by `expire_leases` once the deadline has passed."""

    block_ids: np.ndarray
    deadline_s: float


class BlockPool:
    """Blocks 0 .. num_blocks - 1, of which the first `num_reserved` are HELD for good: the device's own use.

    Not thread-safe: the scheduler's thread owns it."""

    def __init__(self, num_blocks: int, index: PrefixIndex, policy: EvictionPolicy, *, num_reserved: int = 0):
        assert num_reserved < num_blocks
        self.num_blocks, self.num_reserved = num_blocks, num_reserved
        self.settled_step = -1
        self.num_evicted = 0
        self._index = index
        self._policy = policy
        self._state = np.full(num_blocks, FREE, dtype=np.int8)
        self._ref_count = np.zeros(num_blocks, dtype=np.int32)
        self._fence = np.full(num_blocks, -1, dtype=np.int64)
        self._state[:num_reserved], self._ref_count[:num_reserved] = HELD, 1
        self._free = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # a stack; its top is at _num_free
        self._num_free = num_blocks - num_reserved
        self._pending: deque[tuple[int, int, np.ndarray]] = deque()  # (step to wait for, entry, blocks)
        self._entry = np.zeros(num_blocks, dtype=np.int64)  # the newest entry that lists the block
        self._next_entry = 1
        self._num_pending = 0
        self._leases: dict[Lease, None] = {}  # in the order of taking
        self._num_guards = np.zeros(num_blocks, dtype=np.int32)  # pins and leases
        self._num_guarded = 0  # blocks that are CACHED and have a guard
        self._is_doomed = np.zeros(num_blocks, dtype=bool)  # not findable and guarded: FREE with its last guard

    # --- capacity

    @property
    def num_usable(self) -> int:
        """Blocks that rows can have: all but the reserved ones."""
        return self.num_blocks - self.num_reserved

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give now: free ones and evictable ones."""
        return self._num_free + len(self._policy) - self._num_guarded

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self._num_free

    @property
    def num_pending(self) -> int:
        """Blocks that become available by themselves once the running steps and transfers are done."""
        return self._num_pending + self._num_guarded

    @property
    def num_held(self) -> int:
        """Blocks with a holder, but for the reserved ones."""
        return self.num_usable - self.num_available - self.num_pending

    # --- taking and giving back

    def allocate(self, num_blocks: int) -> np.ndarray:
        """Take `num_blocks` blocks, evicting cached ones where too few are free; returns their ids, int32 [num_blocks].
        Each is HELD by one holder, who gives it back with `release`. The caller has checked `num_available`."""
        assert 0 <= num_blocks <= self.num_available
        if num_blocks > self._num_free:
            self._evict(num_blocks - self._num_free)
        self._num_free -= num_blocks
        # From the top down: the blocks of a row come back in its order, and the first ones taken are neighbours.
        block_ids = self._free[self._num_free : self._num_free + num_blocks][::-1].copy()
        at = block_ids.astype(np.intp)  # numpy scatters by this type several times faster
        self._state[at] = HELD
        self._ref_count[at] = 1
        return block_ids

    def admit(self, block_ids: np.ndarray, digests: Sequence[bytes], parents: np.ndarray) -> None:
        """Tell the eviction policy what held blocks contain; see `EvictionPolicy.admit`."""
        self._policy.admit(block_ids, digests, parents)

    def share(self, block_ids: np.ndarray) -> None:
        """Add one holder to each of these blocks (CACHED, PENDING or HELD), as a prefix hit does. No repeats."""
        assert not np.any(self._state[block_ids] == FREE)
        self._policy.revive(block_ids)
        if self._num_guarded:
            self._num_guarded -= self._count_guarded(block_ids)
        self._num_pending -= int(np.count_nonzero(self._state[block_ids] == PENDING))
        self._state[block_ids] = HELD
        self._ref_count[block_ids] += 1

    def num_idle(self, block_ids: np.ndarray) -> int:
        """How many of these count as available now and would not after `share`."""
        idle = self._state[block_ids] == CACHED
        if self._num_guarded:
            idle &= self._num_guards[block_ids] == 0
        return int(np.count_nonzero(idle))

    def _count_guarded(self, block_ids: np.ndarray) -> int:
        return int(np.count_nonzero((self._state[block_ids] == CACHED) & (self._num_guards[block_ids] > 0)))

    def release(self, block_ids: np.ndarray, fence: int) -> None:
        """Take one holder off each block. A block without holders becomes PENDING, and CACHED or FREE once `fence` has
        settled. block_ids: root first, without repeats. fence: the last step planned with them (-1: none)."""
        self._ref_count[block_ids] -= 1
        assert not np.any(self._ref_count[block_ids] < 0), "released more often than held"
        self._fence[block_ids] = np.maximum(self._fence[block_ids], fence)
        idle = block_ids[self._ref_count[block_ids] == 0][::-1]
        if not len(idle):
            return
        self._state[idle] = PENDING
        self._num_pending += len(idle)
        # Appending behind whatever still waits keeps children ahead of their parents.
        limit = int(self._fence[idle].max())
        if self._pending:
            limit = max(limit, self._pending[-1][0])
        self._entry[idle] = self._next_entry
        self._pending.append((limit, self._next_entry, idle))
        self._next_entry += 1
        self._drain()

    def settle(self, step: int) -> None:
        """Note that step `step` and all before it are done on the device; blocks that waited for them become CACHED or
        FREE."""
        self.settled_step = step
        self._drain()

    def _drain(self) -> None:
        while self._pending and self._pending[0][0] <= self.settled_step:
            _, entry, block_ids = self._pending[0]
            # The others were shared meanwhile; released again, they stand in a later entry.
            block_ids = block_ids[(self._state[block_ids] == PENDING) & (self._entry[block_ids] == entry)]
            self._pending.popleft()
            self._retire(block_ids)

    def _retire(self, block_ids: np.ndarray) -> None:
        self._num_pending -= len(block_ids)
        cached = self._index.contains(block_ids)
        keep, drop = block_ids[cached], block_ids[~cached]
        self._state[keep] = CACHED
        self._policy.retire(keep)
        if self._num_guards[block_ids].any():
            self._num_guarded += int(np.count_nonzero(self._num_guards[keep]))
            guarded = self._num_guards[drop] > 0
            self._doom(drop[guarded])
            drop = drop[~guarded]
        self._push_free(drop)

    def _push_free(self, block_ids: np.ndarray) -> None:
        self._state[block_ids] = FREE
        self._free[self._num_free : self._num_free + len(block_ids)] = block_ids
        self._num_free += len(block_ids)

    def _evict(self, num_blocks: int) -> None:
        """Free so many blocks; the caller has checked `num_available`."""
        while num_blocks:
            victims = self._policy.victims(num_blocks).astype(np.intp)
            self._index.remove(victims)
            if self._num_guarded and self._num_guards[victims].any():
                guarded = self._num_guards[victims] > 0
                self._num_guarded -= int(np.count_nonzero(guarded))
                self._doom(victims[guarded])
                victims = victims[~guarded]
            self._push_free(victims)
            self.num_evicted += len(victims)
            num_blocks -= len(victims)

    def _doom(self, block_ids: np.ndarray) -> None:
        self._state[block_ids] = PENDING
        self._num_pending += len(block_ids)
        self._is_doomed[block_ids] = True

    def drop_cached(self) -> int:
        """Evict every cached block that no transfer guards; returns how many."""
        count = len(self._policy) - self._num_guarded
        self._evict(count)
        return count

    # --- transfers

    def pin(self, block_ids: np.ndarray) -> None:
        """Guard these blocks for a move that reads them, until `unpin`. Pins add up; no repeats."""
        assert not np.any(self._state[block_ids] == FREE)
        self._num_guarded += self.num_idle(block_ids)
        self._num_guards[block_ids] += 1

    def unpin(self, block_ids: np.ndarray) -> None:
        """End one pin of each block: its move is over. A block that was evicted meanwhile becomes FREE with its last
        guard."""
        self._num_guards[block_ids] -= 1
        assert not np.any(self._num_guards[block_ids] < 0), "unpinned more often than pinned"
        bare = block_ids[self._num_guards[block_ids] == 0]
        self._num_guarded -= int(np.count_nonzero(self._state[bare] == CACHED))
        doomed = bare[self._is_doomed[bare]]
        self._is_doomed[doomed] = False
        self._num_pending -= len(doomed)
        self._push_free(doomed)

    def lease(self, block_ids: np.ndarray, deadline_s: float) -> Lease:
        """Keep these for a transfer until `end_lease` or the deadline, by the clock of `expire_leases`. No repeats."""
        lease = Lease(block_ids, deadline_s)
        self.pin(block_ids)
        self._leases[lease] = None
        return lease

    def end_lease(self, lease: Lease) -> None:
        """End a lease early and unguard its blocks. Does nothing if it has ended or expired."""
        if lease in self._leases:
            del self._leases[lease]
            self.unpin(lease.block_ids)

    def expire_leases(self, now_s: float) -> int:
        """End the leases whose deadline has passed; returns how many."""
        expired = [lease for lease in self._leases if lease.deadline_s <= now_s] if self._leases else []
        for lease in expired:
            self.end_lease(lease)
        return len(expired)

    # --- audit

    def ref_counts(self) -> np.ndarray:
        """A copy of every block's number of holders: int32 [num_blocks]."""
        return self._ref_count.copy()

    def check_integrity(self) -> None:
        """Raise IntegrityError if any count, state or list disagrees with another."""
        free = self._free[: self._num_free]
        pending = {b for _, _, ids in self._pending for b in ids.tolist() if self._state[b] == PENDING}
        pending |= set(np.flatnonzero(self._is_doomed).tolist())
        _require(len(np.unique(free)) == self._num_free, "a block is on the free stack twice")
        _require(bool(np.all(self._state[free] == FREE)), "a block on the free stack is not FREE")
        _require(int(np.count_nonzero(self._state == FREE)) == self._num_free, "a FREE block is not on the stack")
        _require(bool(np.all((self._ref_count > 0) == (self._state == HELD))), "HELD and ref_count disagree")
        _require(int(np.count_nonzero(self._state == CACHED)) == len(self._policy), "CACHED and the policy disagree")
        _require(len(pending) == self._num_pending == int(np.count_nonzero(self._state == PENDING)),
                 "PENDING and the waiting list disagree")
        leased = np.zeros(self.num_blocks, dtype=np.int32)
        for lease in self._leases:
            leased[lease.block_ids] += 1
        guarded = self._num_guards > 0
        _require(bool(np.all(self._num_guards >= leased)), "a lease does not guard its blocks")
        _require(not np.any(guarded & (self._state == FREE)), "a FREE block is guarded")
        _require(int(np.count_nonzero((self._state == CACHED) & guarded)) == self._num_guarded,
                 "the count of guarded cached blocks is wrong")
        _require(bool(np.all(guarded & (self._state == PENDING) | ~self._is_doomed)), "a doomed block is not")
        every_listed = self._index.contains(np.arange(self.num_blocks))
        for block in range(self.num_blocks):
            state, listed = self._state[block], every_listed[block]
            _require(not (state == FREE and listed), f"free block {block} is in the prefix index")
            _require(not (state == CACHED and not listed), f"cached block {block} is not in the prefix index")
            _require(not (state == CACHED and self._fence[block] > self.settled_step),
                     f"block {block} is evictable before its fence")
        self._index.check_integrity()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
