"""Which cached block goes first. `EvictionPolicy` is the interface, `LRU` the policy.

A policy sees batches of block ids, so that its cost per block stays at numpy's.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class EvictionPolicy(Protocol):
    """Orders the evictable blocks. Ids are int32 arrays without repeats.

    The caller retires the blocks of one sequence tail first. Every holder of a block also holds its
    ancestors, so a policy that keeps the order of `retire` never lists a parent before its child.
    """

    def retire(self, block_ids: np.ndarray) -> None:
        """Nobody uses these any more; they may be evicted, the first of them before the last."""
        ...

    def revive(self, block_ids: np.ndarray) -> None:
        """These are in use again (or gone); must not be evicted until retired anew. Others are ignored."""
        ...

    def victims(self, num_blocks: int) -> np.ndarray:
        """Remove and return the `num_blocks` to evict first (fewer if there are not as many)."""
        ...

    def __len__(self) -> int:
        """How many blocks are evictable."""
        ...


class LRU:
    """Least recently retired first: a ring of (block, stamp) in which stale entries are skipped.

    An entry counts only while its stamp is the block's newest, so reviving a block is one array
    store. The ring holds twice the blocks and is compacted when full: O(1) amortised per block.
    """

    def __init__(self, num_blocks: int):
        self._capacity = max(64, 2 * num_blocks)
        self._ring = np.zeros(self._capacity, dtype=np.int32)
        self._ring_stamp = np.zeros(self._capacity, dtype=np.int64)
        self._stamp = np.zeros(num_blocks, dtype=np.int64)  # of the live entry; 0: not evictable
        self._head = 0
        self._tail = 0
        self._next_stamp = 1
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def retire(self, block_ids: np.ndarray) -> None:
        n = len(block_ids)
        if self._tail + n > self._capacity:
            self._compact()
        stop = self._tail + n
        self._count += n - int(np.count_nonzero(self._stamp[block_ids]))
        stamps = np.arange(self._next_stamp, self._next_stamp + n)
        self._ring[self._tail : stop] = block_ids
        self._ring_stamp[self._tail : stop] = stamps
        self._stamp[block_ids] = stamps
        self._next_stamp += n
        self._tail = stop

    def revive(self, block_ids: np.ndarray) -> None:
        self._count -= int(np.count_nonzero(self._stamp[block_ids]))
        self._stamp[block_ids] = 0

    def victims(self, num_blocks: int) -> np.ndarray:
        wanted = min(num_blocks, self._count)
        found: list[np.ndarray] = []
        while wanted > 0:
            span = slice(self._head, min(self._head + wanted, self._tail))
            ids = self._ring[span]
            live = self._stamp[ids] == self._ring_stamp[span]
            chosen = ids.copy() if live.all() else ids[live]
            self._stamp[chosen] = 0
            self._count -= len(chosen)
            wanted -= len(chosen)
            self._head = span.stop
            found.append(chosen)
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else self._ring[:0].copy()

    def order(self) -> np.ndarray:
        """All evictable blocks, next victim first (for audits)."""
        ids, stamps = self._ring[self._head : self._tail], self._ring_stamp[self._head : self._tail]
        return ids[self._stamp[ids] == stamps]

    def _compact(self) -> None:
        ids, stamps = self._ring[self._head : self._tail], self._ring_stamp[self._head : self._tail]
        live = self._stamp[ids] == stamps
        kept = int(np.count_nonzero(live))
        self._ring[:kept], self._ring_stamp[:kept] = ids[live], stamps[live]
        self._head, self._tail = 0, kept
