"""`Ring`: ids in the order in which they were pushed; `Stamps`: which entries of such orders still count.

Several orders may list the same ids and share one `Stamps`: taking an id out of all of them is one array store.
"""

from __future__ import annotations

import numpy as np


class Stamps:
    """Each listed id's newest stamp. An entry of an order is live while it carries that stamp."""

    def __init__(self, num_ids: int):
        self.of = np.zeros(num_ids, dtype=np.int64)  # 0: not listed
        self.count = 0
        self._next = 1

    def issue(self, ids: np.ndarray) -> np.ndarray:
        """New stamps for these, which outdates their old entries: int64, rising."""
        n, at = len(ids), ids.astype(np.intp)  # numpy gathers and scatters by its own index type several times faster
        stamps = np.arange(self._next, self._next + n)
        self.count += n - int(np.count_nonzero(self.of[at]))
        self.of[at] = stamps
        self._next += n
        return stamps

    def clear(self, ids: np.ndarray) -> None:
        """Take these out of all orders; those not listed are ignored."""
        at = ids.astype(np.intp)
        self.count -= int(np.count_nonzero(self.of[at]))
        self.of[at] = 0


class Ring:
    """First pushed, first popped. Stale entries are skipped, and dropped when the buffer is full.

    The buffer has twice the room of what may be listed at once: O(1) amortised per push.
    """

    def __init__(self, max_listed: int, stamps: Stamps):
        self._capacity = max(64, 2 * max_listed)
        self._stamps = stamps
        self._ids = np.zeros(self._capacity, dtype=np.intp)
        self._marks = np.zeros(self._capacity, dtype=np.int64)
        self._head = 0
        self._tail = 0
        self.num_moved = 0  # entries pushed, looked at or compacted: what the work is proportional to

    def push(self, ids: np.ndarray, marks: np.ndarray) -> None:
        """Append; `marks` are the stamps issued for them."""
        if self._tail + len(ids) > self._capacity:
            self._compact()
        stop = self._tail + len(ids)
        self._ids[self._tail : stop] = ids
        self._marks[self._tail : stop] = marks
        self._tail = stop
        self.num_moved += len(ids)

    def pop(self, num_ids: int) -> np.ndarray:
        """Take out the oldest of the live (int32; fewer if there are not as many), and out of their stamps."""
        found: list[np.ndarray] = []
        wanted, width = num_ids, num_ids
        while wanted > 0 and self._head < self._tail:
            span = slice(self._head, min(self._head + width, self._tail))
            ids = self._ids[span]
            live = self._stamps.of[ids] == self._marks[span]
            chosen = ids if np.count_nonzero(live) == len(ids) else ids[live]
            self._head = span.stop
            if len(chosen) > wanted:
                self._head = span.start + int(np.flatnonzero(live)[wanted - 1]) + 1
                chosen = chosen[:wanted]
            self.num_moved += self._head - span.start
            self._stamps.of[chosen] = 0
            self._stamps.count -= len(chosen)
            wanted -= len(chosen)
            width *= 2  # a long stretch of stale entries costs few rounds
            found.append(chosen.astype(np.int32))
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)

    def live(self) -> np.ndarray:
        """A copy of the live ids, oldest first: int32."""
        ids, marks = self._ids[self._head : self._tail], self._marks[self._head : self._tail]
        return ids[self._stamps.of[ids] == marks].astype(np.int32)

    def _compact(self) -> None:
        ids, marks = self._ids[self._head : self._tail], self._marks[self._head : self._tail]
        live = self._stamps.of[ids] == marks
        kept = int(np.count_nonzero(live))
        self._ids[:kept], self._marks[:kept] = ids[live], marks[live]
        self.num_moved += len(ids)
        self._head, self._tail = 0, kept
