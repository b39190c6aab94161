"""`RunHeap`: ids ordered by an integer key, for keys that come in runs of equal ones."""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np

from xllm.kv.eviction.ring import Stamps


class RunHeap:
    """Smallest key first; among equal keys, first pushed first.

    Pushed ids lie in one buffer, and a heap orders the runs of equal keys: O(log runs) a run. When the buffer is
    full, what is live becomes one sorted stretch, `base`, and the heap begins anew: O(1) amortised per id, at numpy's
    speed. Entries are live as in `Ring`.
    """

    def __init__(self, max_listed: int, stamps: Stamps):
        self._capacity = max(64, 2 * max_listed)
        self._stamps = stamps
        self._ids = np.zeros(self._capacity, dtype=np.intp)
        self._marks = np.zeros(self._capacity, dtype=np.int64)
        self._keys = np.zeros(self._capacity, dtype=np.int64)
        self._base = slice(0, 0)
        self._runs: list[tuple[int, int, int]] = []  # (key, start, stop); a later run lies behind an earlier one
        self._tail = 0
        self.num_moved = 0

    def push(self, ids: np.ndarray, marks: np.ndarray, keys: np.ndarray) -> None:
        """Enter ids under `keys` (int64); `marks` are the stamps issued for them."""
        n = len(ids)
        if n == 0:
            return
        if self._tail + n > self._capacity:
            self._compact()
        start, stop = self._tail, self._tail + n
        self._ids[start:stop] = ids
        self._marks[start:stop] = marks
        self._keys[start:stop] = keys
        self._tail = stop
        self.num_moved += n
        cuts = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), n]
        for first, last in pairwise(cuts):
            heapq.heappush(self._runs, (int(keys[first]), start + first, start + last))

    def pop(self, num_ids: int) -> np.ndarray:
        """Take out the live ids with the smallest keys (int32; fewer if there are not as many), and their stamps."""
        found = [np.zeros(0, dtype=np.int32)]
        wanted = num_ids
        while wanted > 0 and (self._runs or self._base.start < self._base.stop):
            chosen = self._take(self._next_spans(wanted), wanted)
            wanted -= len(chosen)
            found.append(chosen)
        return np.concatenate(found)

    def _next_spans(self, wanted: int) -> list[slice]:
        """Take stretches out of the order, smallest keys first, until they have `wanted` entries, live or not."""
        spans, runs = [], self._runs
        while wanted > 0:
            base = self._base
            if base.start < base.stop and (not runs or self._keys[base.start] <= runs[0][0]):
                stop = min(base.start + wanted, base.stop)
                if runs:
                    stop = base.start + int(np.searchsorted(self._keys[base.start : stop], runs[0][0], side="right"))
                span = slice(base.start, stop)
                self._base = slice(stop, base.stop)
            elif runs:
                key, start, stop = runs[0]
                span = slice(start, min(start + wanted, stop))
                if span.stop < stop:
                    heapq.heapreplace(runs, (key, span.stop, stop))
                else:
                    heapq.heappop(runs)
            else:
                break
            spans.append(span)
            wanted -= span.stop - span.start
        return spans

    def _take(self, spans: list[slice], wanted: int) -> np.ndarray:
        ids = np.concatenate([self._ids[span] for span in spans])
        marks = np.concatenate([self._marks[span] for span in spans])
        chosen = ids[self._stamps.of[ids] == marks]
        assert len(chosen) <= wanted
        self.num_moved += len(ids)
        self._stamps.of[chosen] = 0
        self._stamps.count -= len(chosen)
        return chosen.astype(np.int32)

    def live(self) -> np.ndarray:
        """A copy of the live ids, smallest keys first: int32."""
        return self._ids[self._live_in_order()].astype(np.int32)

    def _live_in_order(self) -> np.ndarray:
        spans = [self._base, *(slice(start, stop) for _, start, stop in sorted(self._runs, key=lambda run: run[1]))]
        places = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        places = places[self._stamps.of[self._ids[places]] == self._marks[places]]
        return places[np.argsort(self._keys[places], kind="stable")]

    def _compact(self) -> None:
        live = np.flatnonzero(self._stamps.of[self._ids[: self._tail]] == self._marks[: self._tail])
        live = live[np.argsort(self._keys[live], kind="stable")]  # equal keys stay in the order of the pushes
        kept = len(live)
        for array in (self._ids, self._marks, self._keys):
            array[:kept] = array[live]
        self.num_moved += self._tail
        self._base, self._tail = slice(0, kept), kept
        self._runs.clear()
