"""`Demoter`: copies paths of KV blocks into the next tier, root first, a chunk at a time.

A path is the blocks of one sequence, root first. It is written in that order, so that at every moment the target tier
holds each block's parent too, and a crash or a full tier only ever cuts off a tail. One path is written at a time; a
more urgent one may overtake it between two chunks.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from xllm.kv import failpoints
from xllm.kv.block import ROOT
from xllm.kv.block_pool import Lease
from xllm.kv.moves import URGENT, WRITE, MoveDone, MoveError, OpenMoves
from xllm.kv.tier_index import NO_SLOT, TierIndex

# Of one move. Chosen: more blocks amortise its overhead better, fewer let an urgent path overtake sooner.
MAX_CHUNK_BLOCKS = 32
# Of one move too: about 0.4 ms of copying at the 1.9 GB/s measured in docs/performance.md, which is how long a step may
# wait where copies take the cores that compute. The step-time figures there were measured with it.
CHUNK_BYTES = 768 << 10
MAX_QUEUED_PATHS = 1024  # chosen: bounds the queue's memory; a path beyond it is not saved, and counted in num_cut
NORMAL = URGENT + 1  # priority of copies that no request waits for


class Origin(Protocol):
    """The tier that a path comes from, as its `Demoter` sees it. Items are block ids or slots, int32."""

    lane: str  # of the copies from here

    def take(self, items: np.ndarray, digests: Sequence[bytes]) -> int:
        """Protect items for a copy, up to the first that does not hold its digest any more; returns how many."""
        ...

    def is_coming(self, item: int, digest: bytes) -> bool:
        """Whether `take` refused this item only because a load is still filling it with these contents."""
        ...

    def give_back(self, items: np.ndarray) -> None:
        """End the protection of `take`: the copy is over, or was not begun."""
        ...

    def written(self, items: np.ndarray, digests: Sequence[bytes], slots: np.ndarray) -> None:
        """Record that the target's `slots` now hold the same contents as `items`."""
        ...

    def ended(self, path: Path) -> bool:
        """Release what is held for a path that this demoter writes no further. Returns whether another part of the
        store copies the blocks that were not written; else they are lost to the tier."""
        ...


class Path:
    """A path to write: `items` int32 and their `digests`, root first. The demoter writes the other fields: the first
    `done` items are in the target, at `slots`; the first `submitted` are there or on their way; `cut`: nothing more
    will be submitted. lease: keeps the blocks while the path waits, if it has one; the origin ends it."""

    __slots__ = ("cut", "digests", "done", "items", "lease", "overtaken", "priority", "slots", "submitted")

    def __init__(self, items: np.ndarray, digests: Sequence[bytes], priority: int, lease: Lease | None = None):
        self.items = items
        self.digests = digests
        self.priority = priority
        self.lease = lease
        self.slots = np.full(len(items), NO_SLOT, dtype=np.int32)
        self.done = 0
        self.submitted = 0
        self.cut = False
        self.overtaken = False

    def names(self, first: int, last: int) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """(digests of the items [first, last), digests of their parents); the first item's parent is `ROOT`."""
        parents = self.digests[first - 1 : last - 1] if first else (ROOT, *self.digests[: last - 1])
        return tuple(self.digests[first:last]), tuple(parents)


class Demoter:
    """Writes paths from one tier into `target`. Owned by the KV manager's thread."""

    def __init__(self, origin: Origin, target: TierIndex, moves: OpenMoves,
                 on_error: Callable[[MoveError], None], shall_wait: Callable[[Path, bool], bool] = lambda *_: False):
        """on_error: called with the reason when a copy fails. shall_wait(path, begun): with begun False, whether the
        path must not begin yet; with begun True, whether a path that finds no slot waits rather than ends. The caller
        then calls `pump` when the answer may have changed."""
        self._shall_wait = shall_wait
        self._origin, self._target, self._moves, self._on_error = origin, target, moves, on_error
        self._queue: list[tuple[int, int, Path]] = []
        self._order = itertools.count()
        self._active: Path | None = None
        self._in_flight = 0
        self.num_written = 0
        self.num_cut = 0  # blocks of paths that were not written: evicted before, no room, or an error
        self.disabled = False
        self._chunk = max(1, min(MAX_CHUNK_BLOCKS, CHUNK_BYTES // moves.payload_bytes))

    @property
    def is_idle(self) -> bool:
        return self._active is None and not self._queue

    @property
    def num_queued(self) -> int:
        return len(self._queue) + (self._active is not None)

    @property
    def num_queued_blocks(self) -> int:
        return sum(len(path.items) for _, _, path in self._queue)

    def add(self, path: Path) -> bool:
        """Queue a path and begin what can begin. Returns False, and drops the path, if the queue is full or the target
        has failed."""
        if self.disabled or len(self._queue) >= MAX_QUEUED_PATHS:
            if not self._origin.ended(path):
                self.num_cut += len(path.items)
            return False
        heapq.heappush(self._queue, (path.priority, next(self._order), path))
        self.pump()
        return True

    def disable(self) -> None:
        """Stop writing for good, because the target has failed: drop all queued paths, refuse new ones."""
        self.disabled = True
        while self._queue:
            self._origin.ended(heapq.heappop(self._queue)[2])

    def pump(self) -> None:
        """Submit chunks until two moves are in flight: the lane then never waits for the bookkeeping."""
        while self._in_flight < 2:
            path = self._active
            if path is None:
                if not self._queue or self._shall_wait(self._queue[0][2], False):
                    return
                path = self._active = heapq.heappop(self._queue)[2]
                self._begin(path)
            if self._queue and self._queue[0][0] < path.priority:
                path.cut = path.overtaken = True
            if not path.cut and path.submitted < len(path.items):
                if not self._submit(path):
                    return
            elif self._in_flight:
                return
            else:
                self._end(path)

    def _begin(self, path: Path) -> None:
        """Skip the path's blocks that the target has already, and hold those there until the path ends."""
        target, known = self._target, 0
        while known < len(path.items):
            slot = target.find(path.digests[known])
            if slot == NO_SLOT:
                break
            path.slots[known] = slot
            known += 1
        if known:
            target.hold(path.slots[:known])
            self._origin.written(path.items[:known], path.digests[:known], path.slots[:known])
        path.done = path.submitted = known

    def _submit(self, path: Path) -> bool:
        """Submit the next chunk, or cut the path. Returns False if it waits for slots."""
        first = path.submitted
        last = min(first + self._chunk, len(path.items))
        items, digests = path.items[first:last], path.digests[first:last]
        num = self._origin.take(items, digests)
        slots = self._target.reserve(num)
        if len(slots) < num:
            self._origin.give_back(items[len(slots) : num])
            waits = self._shall_wait(path, True)
        else:
            waits = num < last - first and self._origin.is_coming(int(items[num]), digests[num])
        path.cut = len(slots) < last - first and not waits
        if not len(slots):
            return not waits
        last = first + len(slots)
        path.slots[first:last] = slots
        path.submitted = last
        self._in_flight += 1
        names = path.names(first, last) if self._origin.lane == WRITE else ((), ())  # disk keeps them beside the block
        self._moves.submit(self._origin.lane, path.priority, path.items[first:last], slots,
                           functools.partial(self._finish, path, first, last), digests=names[0], parents=names[1])
        return True

    def _finish(self, path: Path, first: int, last: int, done: MoveDone) -> None:
        """Take in the end of a move: publish the chunk in the target, or cut the path if the copy failed."""
        self._in_flight -= 1
        items, slots, digests = path.items[first:last], path.slots[first:last], path.digests[first:last]
        if done.error is not None or path.done < first:  # an earlier chunk failed: this one lacks its parent
            self._target.abandon(slots)
            path.cut = True
        else:
            slots = self._target.publish(slots, digests, int(path.slots[first - 1]) if first else NO_SLOT)
            num = len(slots)
            path.slots[first : first + num] = slots
            self._origin.written(items[:num], digests[:num], slots)
            self.num_written += num
            path.done = first + num
            path.cut |= path.done < last
            if failpoints.armed is not None:
                failpoints.hit("tier.published")
        self._origin.give_back(items)
        if done.error is not None:
            self._on_error(done.error)
        self.pump()

    def _end(self, path: Path) -> None:
        self._active = None
        self._target.let_go(path.slots[: path.done])
        if path.overtaken and path.done == path.submitted < len(path.items):
            again = Path(path.items, path.digests, path.priority, path.lease)
            heapq.heappush(self._queue, (again.priority, next(self._order), again))
            return
        self._target.use(path.slots[: path.done])
        if not self._origin.ended(path):
            self.num_cut += len(path.items) - path.done
