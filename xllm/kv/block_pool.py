"""`BlockPool`: the one place that decides whether a KV block may be used again.

A block carries (ref_count, fence, lease). `fence` is the last step that may touch it, `lease` a
transfer that holds it until a deadline. It becomes reusable only when

    ref_count == 0  and  settled_step >= fence  and  no lease is alive

The states of a block:

    FREE     holds nothing; on the free stack
    HELD     ref_count > 0
    PENDING  ref_count == 0, but a running step (fence) or a transfer (lease) may still touch it
    CACHED   ref_count == 0, findable through the prefix index, evictable
"""

from __future__ import annotations

from collections import deque

import numpy as np

from xllm.errors import IntegrityError
from xllm.kv.eviction import EvictionPolicy
from xllm.kv.prefix_index import PrefixIndex

FREE, HELD, PENDING, CACHED = range(4)


class BlockPool:
    """Blocks 0 .. num_blocks - 1. Not thread-safe: the scheduler's thread owns it."""

    def __init__(self, num_blocks: int, index: PrefixIndex, policy: EvictionPolicy):
        self.num_blocks = num_blocks
        self.settled_step = -1
        self.num_evicted = 0
        self._index = index
        self._policy = policy
        self._state = np.full(num_blocks, FREE, dtype=np.int8)
        self._ref_count = np.zeros(num_blocks, dtype=np.int32)
        self._fence = np.full(num_blocks, -1, dtype=np.int64)
        self._free = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # a stack; its top is at _num_free
        self._num_free = num_blocks
        self._pending: deque[tuple[int, int, np.ndarray]] = deque()  # (step to wait for, entry, blocks)
        self._entry = np.zeros(num_blocks, dtype=np.int64)  # the newest entry that lists the block
        self._next_entry = 1
        self._num_pending = 0
        self._leases: dict[int, float] = {}  # block -> deadline

    # --- capacity

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give now: free ones and evictable ones."""
        return self._num_free + len(self._policy)

    @property
    def num_pending(self) -> int:
        """Blocks that become available by themselves once the running steps and transfers are done."""
        return self._num_pending

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available - self._num_pending

    # --- taking and giving back

    def allocate(self, num_blocks: int) -> np.ndarray:
        """Take blocks for one holder: int32 [num_blocks]. The caller has checked `num_available`."""
        assert 0 <= num_blocks <= self.num_available
        if num_blocks > self._num_free:
            self._evict(num_blocks - self._num_free)
        self._num_free -= num_blocks
        block_ids = self._free[self._num_free : self._num_free + num_blocks].copy()
        self._state[block_ids] = HELD
        self._ref_count[block_ids] = 1
        return block_ids

    def share(self, block_ids: np.ndarray) -> None:
        """One more holder for cached (or held) blocks, as a prefix hit does. No repeats."""
        assert not np.any(self._state[block_ids] == FREE)
        self._policy.revive(block_ids)
        self._num_pending -= int(np.count_nonzero(self._state[block_ids] == PENDING))
        self._state[block_ids] = HELD
        self._ref_count[block_ids] += 1

    def num_idle(self, block_ids: np.ndarray) -> int:
        """How many of these count as available now and would not after `share`."""
        return int(np.count_nonzero(self._state[block_ids] == CACHED))

    def release(self, block_ids: np.ndarray, fence: int) -> None:
        """A holder lets go. `block_ids` from the root on, without repeats; `fence`: the last step that
        was planned with them (-1: none)."""
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
        """Step `step` and all before it are done on the device."""
        self.settled_step = step
        self._drain()

    def _drain(self) -> None:
        while self._pending and self._pending[0][0] <= self.settled_step:
            _, entry, block_ids = self._pending[0]
            # The others were shared meanwhile; released again, they stand in a later entry.
            block_ids = block_ids[(self._state[block_ids] == PENDING) & (self._entry[block_ids] == entry)]
            if self._leases and any(block in self._leases for block in block_ids.tolist()):
                return  # in order: what waits behind it may be its parent
            self._pending.popleft()
            self._retire(block_ids)

    def _retire(self, block_ids: np.ndarray) -> None:
        self._num_pending -= len(block_ids)
        cached = self._index.contains(block_ids)
        keep, drop = block_ids[cached], block_ids[~cached]
        self._state[keep] = CACHED
        self._policy.retire(keep)
        self._push_free(drop)

    def _push_free(self, block_ids: np.ndarray) -> None:
        self._state[block_ids] = FREE
        self._free[self._num_free : self._num_free + len(block_ids)] = block_ids
        self._num_free += len(block_ids)

    def _evict(self, num_blocks: int) -> None:
        victims = self._policy.victims(num_blocks)
        assert len(victims) == num_blocks
        self._index.remove(victims)
        self._push_free(victims)
        self.num_evicted += num_blocks

    def drop_cached(self) -> int:
        """Forget every cached block that nobody uses; returns how many."""
        count = len(self._policy)
        self._evict(count)
        return count

    # --- leases

    def lease(self, block_ids: np.ndarray, deadline_s: float) -> None:
        """A transfer reads or writes these until `unlease` or the deadline (the caller's clock)."""
        for block in block_ids.tolist():
            assert self._state[block] != FREE
            self._leases[block] = max(deadline_s, self._leases.get(block, deadline_s))

    def unlease(self, block_ids: np.ndarray) -> None:
        for block in block_ids.tolist():
            self._leases.pop(block, None)
        self._drain()

    def expire_leases(self, now_s: float) -> int:
        """Break the leases whose deadline has passed; returns how many."""
        expired = [block for block, deadline in self._leases.items() if deadline <= now_s]
        for block in expired:
            del self._leases[block]
        self._drain()
        return len(expired)

    # --- audit

    def ref_counts(self) -> np.ndarray:
        """A copy of every block's number of holders: int32 [num_blocks]."""
        return self._ref_count.copy()

    def check_integrity(self) -> None:
        """Raise IntegrityError if any count, state or list disagrees with another."""
        free = self._free[: self._num_free]
        pending = {b for _, _, ids in self._pending for b in ids.tolist() if self._state[b] == PENDING}
        _require(len(np.unique(free)) == self._num_free, "a block is on the free stack twice")
        _require(bool(np.all(self._state[free] == FREE)), "a block on the free stack is not FREE")
        _require(int(np.count_nonzero(self._state == FREE)) == self._num_free, "a FREE block is not on the stack")
        _require(bool(np.all((self._ref_count > 0) == (self._state == HELD))), "HELD and ref_count disagree")
        _require(int(np.count_nonzero(self._state == CACHED)) == len(self._policy), "CACHED and the policy disagree")
        _require(len(pending) == self._num_pending == int(np.count_nonzero(self._state == PENDING)),
                 "PENDING and the waiting list disagree")
        every_listed = self._index.contains(np.arange(self.num_blocks))
        for block in range(self.num_blocks):
            state, listed = self._state[block], every_listed[block]
            _require(not (state == FREE and listed), f"free block {block} is in the prefix index")
            _require(not (state == CACHED and not listed), f"cached block {block} is not in the prefix index")
            _require(not (state == CACHED and block in self._leases), f"leased block {block} is evictable")
            _require(not (state == CACHED and self._fence[block] > self.settled_step),
                     f"block {block} is evictable before its fence")
        self._index.check_integrity()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
